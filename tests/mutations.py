"""Mutation check: each of the small faults in mutations.toml must make a test fail.

    python -m tests.mutations             all of them, and that the tests pass without
    python -m tests.mutations WORD ...    those whose file or name contains one of the words
    python -m tests.mutations --new       those that have no verdict yet

tests/mutations.csv has the last verdict of each fault as it is listed now, with the sources on which it was made.

A fault is planted in a copy of the tree, the host library and the SIMT runner are built from it, and tests run until
one fails: first those that most likely do, then all of TESTS, which are the normal suite's tests that execute
kernels. The verdict is caught, survived, did not build, timed out, or not observable on a CPU, which is not tried.
A survivor is a missing test.
"""

import csv
import hashlib
import os
import platform
import queue
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from kernels import simt, source

ROOT = Path(__file__).parents[1]
LIST, RESULTS = ROOT / "tests" / "mutations.toml", ROOT / "tests" / "mutations.csv"
COLUMNS = ("file", "name", "verdict", "test", "seconds", "sources", "fault")
CAUGHT, SURVIVED, BROKEN, LATE = "caught", "survived", "did not build", "timed out"
UNSEEN = "not observable on a CPU"
SECONDS = 600  # that one run of tests may take
WORKERS = 2

TESTS = tuple(
    f"tests/test_{name}.py"
    for name in ("launch_shapes", "softmax_cross_entropy", "gather_batch", "bias_act", "optimizer_steps",
                 "augment", "shuffle", "to_bfloat16", "advance", "batch_norm", "dropout", "norm_act", "sanitizers",
                 "determinism", "host_library", "host_sanitizers", "gemm_launches", "gemm")
)  # fmt: skip
_, XENT, GATHER, BIAS_ACT, STEPS, AUGMENT, SHUFFLE, CONVERT, *_, GEMM_LAUNCHES, GEMM = TESTS
# file -> the tests that most likely notice, and where it runs, unless a mutation says otherwise
FIRST = {
    "kernels/src/bias_act.cuh": (BIAS_ACT, ""),
    "kernels/src/softmax_xent.cuh": (XENT, ""),
    "kernels/src/adam.cuh": (STEPS, ""),
    "kernels/src/augment.cuh": (AUGMENT, ""),
    "kernels/src/batch.cuh": (GATHER, ""),
    "kernels/src/random.cuh": (GATHER, ""),
    "kernels/src/shuffle.cuh": (SHUFFLE, ""),
    "kernels/src/convert.cuh": (CONVERT, ""),
    "kernels/src/batch_norm.cuh": ("tests/test_batch_norm.py", ""),
    "kernels/src/dropout.cuh": ("tests/test_dropout.py", ""),
    "kernels/src/norm_act.cuh": ("tests/test_norm_act.py", ""),
    "kernels/src/common.cuh": (BIAS_ACT, "simt"),
    "kernels/src/module.cu": (BIAS_ACT, "simt"),
    "kernels/launches.py": (BIAS_ACT, "simt"),
    "kernels/gemm.py": (GEMM_LAUNCHES, "simt"),
    "kernels/src/gemm.cuh": (GEMM, "simt"),
    "kernels/src/gemm_product.cuh": (GEMM, "simt"),
    "kernels/src/gemm_operand.cuh": (GEMM, "simt"),
    "kernels/src/mma.cuh": (GEMM_LAUNCHES, "simt"),
    "kernels/src/host/vocabulary.h": (BIAS_ACT, "host"),
    "kernels/src/host/augment.h": (GATHER, "host"),
    "kernels/src/host/fast.cpp": (BIAS_ACT, "host"),
    "kernels/src/host/gather.h": (GATHER, "host"),
    "kernels/src/host/philox.h": (GATHER, "host"),
    "kernels/src/host/stream.h": (STEPS, "host"),
    "mlp/cublaslt.py": ("tests/test_cublaslt.py", "host"),
    "mlp/cublaslt_plans.py": ("tests/test_cublaslt.py", "host"),
    "mlp/forms.py": ("tests/test_tuning.py", "host"),
    "mlp/products.py": ("tests/test_forms.py", "host"),
    "mlp/tuning.py": ("tests/test_tuning.py", "host"),
}
# pytest -k for the forms of conftest.py, none of them the plain ops, which have no kernel in them
FORMS = {
    "": "not plain-host",
    "simt": "simt or launch_shapes or test_sanitizers or test_gemm",
    "host": "not plain-host and not simt and not test_sanitizers and not test_gemm",
}


@dataclass(frozen=True)
class Mutation:
    """A fault: the text that occurs once in the file, and what takes its place. See mutations.toml."""

    file: str
    name: str
    find: str
    replace: str
    breaks: str
    tests: str
    on: str
    unseen: str = ""  # why nothing on a CPU can notice

    @property
    def fault(self) -> str:
        """A hash of what is replaced by what: another one is another fault."""
        return hashlib.sha256(f"{self.find}\0{self.replace}".encode()).hexdigest()[:8]

    def apply(self, text: str) -> str:
        count = text.count(self.find)
        if count != 1:
            raise ValueError(f"{self.file}: {self.name}: {self.find!r} occurs {count} times, expected 1")
        return text.replace(self.find, self.replace)


def mutations() -> list[Mutation]:
    found = []
    for file, entries in tomllib.loads(LIST.read_text()).items():
        tests, on = FIRST[file]
        found += [Mutation(file, name, **{"tests": tests, "on": on} | entry) for name, entry in entries.items()]
    return found


class Verdict(Exception):
    """What became of a mutation, and the first test that failed. Raised where it ends the work on it."""

    def __init__(self, verdict: str, test: str = ""):
        super().__init__(verdict, test)
        self.verdict, self.test = verdict, test


def _run(folder: Path, command: list) -> tuple[int, str]:
    """The exit status and all output of a command; raises a Verdict when it takes too long."""
    settings = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}  # all output, if the process crashes
    process = subprocess.Popen(
        command, cwd=folder, env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output = process.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the SIMT runners
        process.communicate()
        raise Verdict(LATE) from None
    return process.returncode, output


class Tree:
    """A copy of what the kernel tests need. Its files are new, so that nothing built from a mutation before stays."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("kernels", "mlp", "tests"):
            shutil.rmtree(folder / name, ignore_errors=True)
            ignore = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignore, copy_function=shutil.copy)
        for name in ("CMakeLists.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)

    def build(self, on: str) -> None:
        """Build the host library, the SIMT runner, or both."""
        cmake, ninja = simt._tool("cmake"), simt._tool("ninja")
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        host = [
            [cmake, "-S", ".", "-B", "build/host", *generator],
            [cmake, "--build", "build/host"],
            [sys.executable, "-c", "from kernels import host; host.check()"],
        ]
        runner = [[sys.executable, "-c", "from kernels import simt; simt.Runner()"]]
        for command in (host if on != "simt" else []) + (runner if on != "host" else []):
            if _run(self.folder, command)[0]:
                raise Verdict(BROKEN)

    def test(self, tests, form: str) -> None:
        """Run tests until one fails: the last one that was begun, also where it ended the process."""
        status, output = _run(
            self.folder,
            [sys.executable, "-m", "pytest", "-o", "addopts=", "-x", "-v", "--tb=no", "-p", "no:cacheprovider",
             "--hypothesis-seed=0", "-m", "not gpu", "-k", form, *tests],
        )  # fmt: skip
        begun = re.findall(r"^(tests/\w+\.py::\w+(?:\[[^\]]*\])?)", output, re.MULTILINE)
        if status == 1 or status < 0:  # a test failed, or the mutation ended the process
            raise Verdict(CAUGHT, begun[-1])
        if status:
            raise RuntimeError(f"pytest ended with status {status}:\n{output}")

    def judge(self, m: Mutation, everything=TESTS) -> Verdict:
        """Plant a fault, build, run its own tests and then everything, and take it out again.

        At first only what is likely to show it is built: of what both compilers see the host library, and of the
        kernels those of matrix products, half of the work, only for faults in them.
        """
        path, module = self.folder / m.file, self.folder / "kernels" / "src" / "module.cu"
        original, kernels = path.read_text(), module.read_text()
        try:
            path.write_text(m.apply(original))
            soonest, planted = m.on or "host", module.read_text()
            if "gemm" not in m.tests:
                module.write_text(re.sub(r"^GEMM\(.*", "", planted, flags=re.MULTILINE))
            self.build(soonest)
            self.test([m.tests], FORMS[soonest])
            module.write_text(planted)
            self.build(m.on)
            self.test(everything, FORMS[m.on])
            return Verdict(SURVIVED)
        except Verdict as verdict:
            return verdict
        finally:
            module.write_text(kernels)
            path.write_text(original)

    def check_unmutated(self) -> None:
        try:
            self.build("")
            self.test(TESTS, FORMS[""])
        except Verdict as verdict:
            sys.exit(f"without a mutation: {verdict.verdict} {verdict.test}")


def judge_all(chosen: list[Mutation], unmutated: bool):
    """Yield (mutation, verdict, test, seconds) in order, from WORKERS trees at a time."""
    trees = queue.SimpleQueue()
    for k in range(WORKERS):
        trees.put(Tree(ROOT / "build" / "mutations" / str(k)))

    def work(m):
        tree, begin = trees.get(), time.perf_counter()
        try:
            if m is None:
                return tree.check_unmutated()
            found = Verdict(UNSEEN) if m.unseen else tree.judge(m)
            return m, found.verdict, found.test, round(time.perf_counter() - begin, 1)
        finally:
            trees.put(tree)

    with ThreadPoolExecutor(WORKERS) as executor:
        futures = [executor.submit(work, m) for m in [None] * unmutated + chosen]
        try:
            yield from filter(None, (future.result() for future in futures))
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise


def known() -> dict[tuple[str, str], list[str]]:
    """The rows of RESULTS that are about faults of the list, by file and name."""
    with open(RESULTS, newline="") as file:
        file.readline()
        rows = {(row[0], row[1]): row for row in list(csv.reader(file))[1:]}
    return {(m.file, m.name): row for m in mutations() if (row := rows.get((m.file, m.name))) and row[-1] == m.fault}


def write(rows: dict) -> None:
    """Put the rows, by file and name, beside the others in RESULTS."""
    rows = known() | rows
    with open(RESULTS, "w", newline="") as file:
        file.write(f"# {date.today()}; python {platform.python_version()}, numpy {np.__version__}\n")
        listed = [rows[m.file, m.name] for m in mutations() if (m.file, m.name) in rows]
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *listed])


def chosen(words: list[str]) -> list[Mutation]:
    if words == ["--new"]:
        return [m for m in mutations() if (m.file, m.name) not in known()]
    return [m for m in mutations() if not words or any(w in f"{m.file}:{m.name}" for w in words)]


def main(words: list[str]) -> int:
    begin, digest, rows = time.perf_counter(), source.digest()[:12], {}
    try:
        for m, verdict, test, seconds in judge_all(chosen(words), unmutated=not words):
            rows[m.file, m.name] = m.file, m.name, verdict, test, seconds, digest, m.fault
            print(f"{verdict:>13}  {seconds:5.1f} s  {m.file}:{m.name}  {test}", flush=True)
            write(rows)  # now, for a run that is cut short
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    verdicts = [row[2] for row in rows.values()]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    print(f"{len(rows)} mutations: {counts}; {(time.perf_counter() - begin) / 60:.1f} minutes")
    return int(any(verdict not in (CAUGHT, UNSEEN) for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
