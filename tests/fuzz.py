"""Fuzzes what reads files of others, guided by coverage: python -m tests.fuzz --seconds 60 [--seed S] [--out FILE.json]

Atheris (libFuzzer for Python) changes small valid files and keeps what reaches new code. A reader may do two things
with any bytes: succeed, or raise InputError with one line that names the file. All else is a failure: other exceptions,
warnings, a hang of 10 s, 2 GB of memory. Its input is kept in `fuzz-failures`, beside FILE.json.

A further reader is a further function in READERS.
"""

import argparse
import functools
import gzip
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlp import InputError, checkpoint, configs, data

ROOT = Path(__file__).resolve().parents[1]
HANG, MEMORY, LONGEST = 10, 2048, 4096  # seconds, MB, bytes of an input
# What is instrumented: our readers, and what they leave the work to.
INSTRUMENTED = ["mlp", "numpy.lib", "zipfile", "gzip", "json", "tokenize"]
CHILD = f"""
import sys, atheris
with atheris.instrument_imports(include={INSTRUMENTED!r}):
    from tests import fuzz
fuzz.fuzz_one(atheris, *sys.argv[1:])
"""


@dataclass(frozen=True)
class Reader:
    """read(folder, input) writes `input` as a file or a pair of files into the empty folder, and reads them."""

    read: Callable[[Path, bytes], object]
    seeds: list[bytes]  # with which it succeeds


def forms(writers, valid: list[bytes]) -> tuple[Callable, list[bytes]]:
    """Several ways to make files of an input, the first byte of which chooses; and a seed for each."""

    def write(folder: Path, content: bytes) -> None:
        which, content = content[:1] or b"\0", content[1:]
        writers[which[0] % len(writers)](folder, content)

    return write, [bytes([k]) + content for k, content in enumerate(valid)]


def idx_reader() -> Reader:
    """A pair of IDX files: one of them changed, plain, gzipped and changed, or changed and gzipped."""
    pair = {data.IMAGES: _idx(0x803, 2, 28, 28) + bytes(range(196)) * 8, data.LABELS: _idx(0x801, 2) + b"\0\1"}
    writers, valid = [], []
    for changed, other in ((data.IMAGES, data.LABELS), (data.LABELS, data.IMAGES)):
        for suffix, stored, sound in (
            ("", bytes, pair[changed]),
            (".gz", bytes, gzip.compress(pair[changed], mtime=0)),
            (".gz", lambda content: gzip.compress(content, 1, mtime=0), pair[changed]),
        ):
            files = {f"toy{other}": lambda _, other=other: pair[other], f"toy{changed}{suffix}": stored}
            writers.append(functools.partial(_write, files))
            valid.append(sound)
    write, seeds = forms(writers, valid)
    return Reader(lambda folder, content: (write(folder, content), data.load(folder)), seeds)


def npy_reader() -> Reader:
    """X_images.npy and y_images.npy, one of them changed."""
    pair = {
        "X_images.npy": _npy(np.arange(2 * 784, dtype=np.uint8).reshape(2, 28, 28)),
        "y_images.npy": _npy(np.arange(2)),
    }
    writers = [
        functools.partial(_write, {other: lambda _, other=other: pair[other], changed: bytes})
        for changed, other in (pair, reversed(pair))
    ]
    write, seeds = forms(writers, list(pair.values()))
    return Reader(lambda folder, content: (write(folder, content), data.load(folder)), seeds)


def checkpoint_reader() -> Reader:
    """A changed checkpoint, and where it is a zip file, changed members with checksums to match: else none gets far."""
    arrays = {"weight0": np.ones((3, 2), np.float32), "bias0": np.zeros(2, np.float32)}
    with tempfile.TemporaryDirectory(dir=fast_folder()) as folder:
        path = Path(folder) / "checkpoint.npz"
        checkpoint.save(path, arrays, configs.preset("m1", hidden=(2,)), ("a", "b"), "toy")
        whole = path.read_bytes()
    members = {}
    if zipfile.is_zipfile(io.BytesIO(whole)):
        with zipfile.ZipFile(io.BytesIO(whole)) as file:
            members = {name: file.read(name) for name in file.namelist()}

    def zipped(changed, content):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as file:
            for name, sound in members.items():
                file.writestr(name, content if name == changed else sound)
        return packed.getvalue()

    writers = [
        functools.partial(_write, {"checkpoint.npz": stored})
        for stored in (bytes, *(functools.partial(zipped, name) for name in members))
    ]
    write, seeds = forms(writers, [whole, *members.values()])
    return Reader(lambda folder, content: (write(folder, content), checkpoint.read(folder / "checkpoint.npz")), seeds)


READERS = {"idx": idx_reader, "npy": npy_reader, "checkpoint": checkpoint_reader}


def _idx(*header) -> bytes:
    return np.array(header, ">u4").tobytes()


def _npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _write(files: dict, folder: Path, content: bytes) -> None:
    """Files by name; what each holds, as a function of the input."""
    for name, stored in files.items():
        (folder / name).write_bytes(stored(content))


def fast_folder() -> str | None:
    """A folder in memory where there is one; else None, for the usual one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def failure(reader: Reader, folder: Path, content: bytes) -> str | None:
    """What is wrong with how the reader took `content`, in the empty `folder`; None: nothing."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for hidden in (DeprecationWarning, ResourceWarning):  # by default, as on the command line
            warnings.simplefilter("ignore", hidden)
        try:
            reader.read(folder, content)
            message = None
        except InputError as error:
            message = str(error)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}"
        finally:
            names = [path.unlink() or str(path) for path in list(folder.iterdir())]
    if warned:
        return f"{warned[0].category.__name__} in {Path(warned[0].filename).name}:{warned[0].lineno}"
    if message is not None and ("\n" in message or not any(name in message for name in names)):
        return f"a sentence that is not one line or names no file: {message[:80]!r}"
    return None


class Failures:
    """Inputs that failed, one of each kind, as files `<name>-<number>` in a folder, with what was wrong beside them."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name, self.found = folder, name, {}

    def note(self, what: str | None, content: bytes) -> None:
        if what and what not in self.found:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / f"{self.name}-{len(self.found)}"
            file.write_bytes(content)
            file.with_suffix(".txt").write_text(what)
            self.found[what] = file


def fuzz_one(atheris, name: str, work: str, *options: str) -> None:
    """Fuzz a reader until libFuzzer's options end it; it ends the process."""
    reader, work = READERS[name](), Path(work)
    corpus, files = work / "corpus", work / "files"
    for folder in (corpus, files):
        folder.mkdir()
    for k, seed in enumerate(reader.seeds):
        (corpus / f"seed-{k}").write_bytes(seed)
    failures = Failures(work / "failures", name)

    def take(content: bytes) -> None:
        failures.note(failure(reader, files, content), content)

    atheris.Setup([sys.argv[0], str(corpus), *options], take)
    atheris.Fuzz()


def run(name: str, seconds: int, seed: int, keep: Path) -> dict:
    """Fuzz a reader in a process of its own; what is reported of it. Inputs that fail are kept in `keep`."""
    with tempfile.TemporaryDirectory(dir=fast_folder()) as work:
        options = [f"-max_total_time={seconds}", f"-seed={seed}", f"-timeout={HANG}", f"-rss_limit_mb={MEMORY}",
                   f"-max_len={LONGEST}", f"-artifact_prefix={work}/", "-print_final_stats=1"]  # fmt: skip
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
        log = subprocess.run(
            [sys.executable, "-c", CHILD, name, work, *options],
            cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace",
        )  # fmt: skip
        return report(name, log.returncode, log.stderr, Path(work), keep)


def report(name: str, status: int, log: str, work: Path, keep: Path) -> dict:
    """A row of the report, from libFuzzer's log and what it and Failures have left in `work`."""
    found = [(file, file.with_suffix(".txt").read_text()) for file in work.glob("failures/*") if not file.suffix]
    for kind, what in (("timeout", f"takes more than {HANG} s"), ("oom", f"takes more than {MEMORY} MB"),
                       ("crash", "ends the process")):  # fmt: skip
        found += [(file, what) for file in work.glob(f"{kind}-*")]
    rows = []
    for file, what in sorted(found):
        keep.mkdir(parents=True, exist_ok=True)
        rows.append({"what": what, "input": str(keep / f"{name}-{file.name.removeprefix(f'{name}-')}")})
        shutil.copyfile(file, rows[-1]["input"])
    executed = re.search(r"stat::number_of_executed_units:\s*(\d+)", log)
    reached = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", log)
    if not rows and (status or not executed):
        rows.append({"what": f"the fuzzer ended with status {status}: {' '.join(log.split())[-300:]}", "input": None})
    edges, features, corpus = map(int, reached[-1]) if reached else (None, None, None)
    return {
        "reader": name, "executions": int(executed[1]) if executed else None, "edges": edges, "features": features,
        "corpus": corpus, "failures": rows,
    }  # fmt: skip


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=60, help="for all readers together (default: 60)")
    parser.add_argument("--seed", type=int, default=1, help="of the changes, from 1 on (default: 1)")
    parser.add_argument("--out", type=Path, help="JSON file to write the report to")
    args = parser.parse_args(argv)
    if not importlib.util.find_spec("atheris"):
        print("error: Atheris is not installed, expected it for coverage guidance; run `pip install atheris`",
              file=sys.stderr)  # fmt: skip
        return 2
    keep = (args.out.parent if args.out else Path()) / "fuzz-failures"
    rows = []
    for name in READERS:
        rows.append(run(name, max(1, args.seconds // len(READERS)), args.seed, keep))
        print(" ".join(f"{key} {value}" for key, value in rows[-1].items() if key != "failures"), flush=True)
        for found in rows[-1]["failures"]:
            print(f"  FAILED: {found['what']}: {found['input']}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 1 if any(row["failures"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
