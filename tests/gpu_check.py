"""Check every kernel on this machine's GPU, and write what was found, whether it is good or bad.

    python -m tests.gpu_check                               # profile/results/<gpu>/correctness.json
    python -m tests.gpu_check --out folder --parts cases,memcheck
    python -m tests.gpu_check --device simt --out folder    # without a GPU, thread by thread

Parts: `pytest`, the tests marked gpu; `cases`, every kernel's largest relative error on every case of
cases.py and gemm_cases.py; and the tools of compute-sanitizer, each on the representative cases and on a
kernel with a planted mistake that it must find. Exits with 0 where all parts that were asked for ran and
passed, with 1 where not.
"""

import argparse
import json
import math
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np

import kernels
from kernels import cuda, simt

from . import cases, gemm_cases, gpu_parts
from .backends import simt_backend
from .checks import SHAPES, Backend

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("pytest", "cases", *gpu_parts.TOOLS)
SIZES = (0, 1, 2, 3, 4, 5, 31, 32, 33, 127, 1023, 32_769)


def backend_of(device: str, exact: bool = False) -> Backend:
    """exact: every array in an allocation of its own, unpadded, so that a sanitizer sees where it ends."""
    if device == "simt":
        return simt_backend()
    import cupy

    if exact:
        cupy.cuda.set_allocator(None)
        return Backend("cuda", cupy, kernels, device=cuda, padding=0)
    return Backend("cuda", cupy, kernels, device=cuda)


@contextmanager
def recorded_launches(device):
    """The names of the kernels that are launched on it from here on."""
    launched, function = set(), device.function
    with mock.patch.object(device, "function", lambda name, *more: launched.add(name) or function(name, *more)):
        yield launched


def run_cases(backend: Backend, listed: list) -> list[dict]:
    """What each case gave; one that launched other kernels than its own has failed."""
    results = []
    for case in listed:
        with recorded_launches(backend.device) as launched:
            result = case.measure(backend)
        if result["passed"] and launched != {case.kernel, *case.also}:
            result |= {"passed": False, "error": f"launched {', '.join(sorted(launched)) or 'nothing'}"}
        results.append(result)
    return results


def run_planted(backend: Backend, tool: str) -> None:
    """Launch the kernel with the mistake that the tool must find."""
    path = Path(__file__).parent / "cuda" / "planted.cu"
    if backend.name == "simt":
        function = simt.Device(simt.Runner(path)).function
    else:
        function = backend.xp.RawModule(code=path.read_text(), options=cuda.OPTIONS).get_function
    name, elements, *arguments = gpu_parts.TOOLS[tool]
    arrays = {"x": backend.array(np.ones(elements)), "y": backend.device.empty(elements)}
    function(f"{name}_wrong")((1,), (64,), tuple(arrays[a] if isinstance(a, str) else a for a in arguments))
    gpu_parts.synchronize(backend)


def cases_part(backend: Backend) -> tuple[dict, list]:
    """The verdict by kernel, and the results of all cases."""
    simulated = backend.name == "simt"
    listed = cases.representative() if simulated else cases.every(SHAPES, SIZES, large=True)
    listed += gemm_cases.few() if simulated else gemm_cases.products()
    results = run_cases(backend, listed)
    failed = [r for r in results if not r["passed"]]
    by_kernel = {}
    for kernel in dict.fromkeys(r["kernel"] for r in results):
        mine = [r for r in results if r["kernel"] == kernel]
        share = [r["max_relative_error"] / r["tolerance"] for r in mine if r.get("tolerance")]
        by_kernel[kernel] = {
            "cases": len(mine), "failed": sum(not r["passed"] for r in mine),
            "largest_share_of_tolerance": max(share, default=math.inf),
        }  # fmt: skip
    verdict = {"status": "failed" if failed else "passed", "cases": len(results), "failed": len(failed)}
    return verdict | {"kernels": len(by_kernel), "by_kernel": by_kernel}, results


def _finite(value):
    """JSON has no infinity and no NaN, and three digits of an error say all."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.3g}") if math.isfinite(value) else str(value)
    return value


def write(path: Path, report: dict, results: list[dict]) -> None:
    """The report, indented, and each case on a line of its own."""
    lines = ",\n".join(json.dumps(_finite(r)) for r in results)
    text = json.dumps(_finite(report), indent=1).removesuffix("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{text},\n "results": [\n{lines}\n]}}\n')


def check(device: str, parts: tuple, path: Path) -> bool:
    """Run the parts and write the report after each, so that a machine that dies leaves what it had."""
    backend, results, began = backend_of(device), [], time.perf_counter()
    options = {"device": device, "compiler": list(cuda.OPTIONS + cuda.CUPY_OPTIONS)}
    report = gpu_parts.facts(device) | {"options": options, "passed": False}
    report["parts"] = {part: {"status": "not run", "reason": "not reached"} for part in parts}
    write(path, report, results)
    for part in parts:
        print(f"{part} ...", file=sys.stderr, flush=True)
        try:
            if part == "cases":
                report["parts"][part], results = cases_part(backend)
            elif part == "pytest":
                report["parts"][part] = gpu_parts.pytest_part()
            else:
                report["parts"][part] = gpu_parts.sanitizer_part(part, device)
        except Exception as error:
            report["parts"][part] = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        report["parts"][part]["at_second"] = time.perf_counter() - began
        write(path, report, results)
    report["passed"] = all(part["status"] == "passed" for part in report["parts"].values())
    write(path, report, results)
    return report["passed"]


def summary(path: Path) -> str:
    """One line per part, for people."""
    report = json.loads(path.read_text())
    lines = [f"{report['device']['name']}, revision {report['revision']}, {report['date']}"]
    for name, part in report["parts"].items():
        counts = [f"{v} {k}" for k, v in part.items() if isinstance(v, int)]
        lines.append(f"  {name:10} {part['status']:8} {', '.join(counts)} {part.get('reason', '')}".rstrip())
    failed = [r for r in report["results"] if not r["passed"]]
    for r in failed[:20]:
        why = r.get("error") or f"{r['what']}: {r['max_relative_error']} > {r['tolerance']}"
        lines.append(f"  {r['kernel']} {r['case']}: {why}")
    return "\n".join([*lines, f"written to {path}"])


def arguments(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "simt"), default="cuda")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)} (default: all)")
    parser.add_argument("--out", type=Path, help="folder of the report (default: profile/results/<gpu>)")
    parser.add_argument("--child-cases", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--child-planted", choices=gpu_parts.TOOLS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.parts = tuple(args.parts.split(","))
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"--parts must be of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    if args.device == "simt" and not (args.out or args.child_cases or args.child_planted):
        parser.error("--device simt needs --out: its report is no result of a GPU")
    return args


def main(argv=None) -> int:
    args = arguments(argv)
    if args.device == "cuda":
        try:
            cuda.check()
        except kernels.BackendError as error:
            print(f"error: there is no GPU to check: {error}", file=sys.stderr)
            return 2
    if args.child_planted:
        run_planted(backend_of(args.device, exact=True), args.child_planted)
        return 0
    if args.child_cases:
        listed = [*cases.representative(), *gemm_cases.few()]
        results = run_cases(backend_of(args.device, exact=True), listed)
        args.child_cases.write_text(json.dumps(_finite(results)))
        return int(not all(r["passed"] for r in results))
    name = gpu_parts.device_facts(args.device)["name"]
    path = (args.out or ROOT / "profile" / "results" / gpu_parts.slug(name)) / "correctness.json"
    passed = check(args.device, args.parts, path)
    print(summary(path))
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
