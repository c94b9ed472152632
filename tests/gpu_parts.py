"""What gpu_check.py runs in other processes, and the facts of the machine that it reports."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
ERROR_EXIT = 86  # compute-sanitizer's exit status where it found something; a case that fails ends with 1
TIMEOUT = 600
TOO_LONG = f"took more than {TIMEOUT} s"
# Each tool and the kernel of planted.cu with a mistake of the kind that it finds: name, elements, arguments.
TOOLS = {
    "memcheck": ("off_by_one", 50, "x", "y", np.int32(50)),
    "racecheck": ("missing_barrier", 64, "x", "y"),
    "initcheck": ("uninitialised_output", 64, "x", "y"),
    "synccheck": ("part_of_a_warp", 64, "y"),
}
_SUMMARY = re.compile(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", re.MULTILINE)


def _run(command, timeout=None) -> tuple[int | None, str]:
    """Exit status and output of a command in the repository; None where it took too long."""
    try:
        done = subprocess.run(
            [str(word) for word in command], cwd=ROOT, timeout=timeout or TIMEOUT,
            text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        text = error.stdout or ""
        return None, text if isinstance(text, str) else text.decode(errors="replace")
    return done.returncode, done.stdout


def _last_line(command) -> str | None:
    """The last line that a program prints about itself, or None where there is no such program."""
    if shutil.which(command[0]) is None:
        return None
    code, text = _run(command, timeout=60)
    lines = text.strip().splitlines()
    return lines[-1].strip() if code == 0 and lines else None


def synchronize(backend) -> None:
    if backend.name != "simt":
        backend.xp.cuda.get_current_stream().synchronize()


def slug(name: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def device_facts(device: str) -> dict:
    if device == "simt":
        return {"name": "simt", "what": f"{platform.machine()} CPU, one OS thread per CUDA thread"}
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
    return {
        "name": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "multiprocessors": properties["multiProcessorCount"],
        "memory_bytes": properties["totalGlobalMem"],
    }


def _version(number: int) -> str:
    """13020 -> 13.2"""
    return f"{number // 1000}.{number % 1000 // 10}"


def _distribution(*names) -> str | None:
    """The version of the first of these packages that is installed."""
    for name in names:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def versions(device: str) -> dict:
    found = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cupy": _distribution("cupy-cuda13x", "cupy-cuda12x", "cupy"),
        "torch": _distribution("torch"),
        "compute_sanitizer": _last_line(["compute-sanitizer", "--version"]),
        "driver": _last_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "nvcc": _last_line(["nvcc", "--version"]),
    }
    if device == "cuda":
        import cupy

        found["cuda_driver"] = _version(cupy.cuda.runtime.driverGetVersion())
        found["cuda_runtime"] = _version(cupy.cuda.runtime.runtimeGetVersion())
        found["nvrtc"] = "{}.{}".format(*cupy.cuda.nvrtc.getVersion())
    return found


def revision() -> str:
    """The git revision, with a + where files differ from it; REVISION where the tree was copied without its history."""
    if "REVISION" in os.environ:
        return os.environ["REVISION"]
    git = ["git", "-C", ROOT]
    if shutil.which("git") is None:
        return "unknown"
    code, head = _run([*git, "rev-parse", "--short=12", "HEAD"], 60)
    _, changed = _run([*git, "status", "--porcelain", "--", "kernels", "tests", "mlp", "CMakeLists.txt"], 60)
    return head.strip() + ("+" if changed.strip() else "") if code == 0 else "unknown"


def facts(device: str) -> dict:
    return {
        "date": date.today().isoformat(), "revision": revision(),
        "device": device_facts(device), "versions": versions(device),
    }  # fmt: skip


def pytest_part() -> dict:
    """The tests marked gpu. Where none has passed, say because all were skipped, that is a failure."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
        code, text = _run([*command, f"--junitxml={file}"])
        counts, bad = {}, []
        if file.exists():
            suite = ElementTree.parse(file).getroot().find("testsuite")
            counts = {k: int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped")}
            counts["passed"] = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
            for test in suite.iter("testcase"):
                if test.find("failure") is not None or test.find("error") is not None:
                    bad.append(f"{test.get('classname')}.{test.get('name')}")
    result = {"status": "passed" if code == 0 and counts.get("passed") else "failed", **counts}
    if result["status"] == "failed":
        reason = f"{len(bad)} tests failed" if bad else "no test passed"
        result |= {"reason": TOO_LONG if code is None else reason, "failed_tests": bad}
        result |= {"output": text[-4000:]}
    return result


def _sanitized(tool: str, device: str, *arguments) -> tuple[int | None, int | None, str]:
    """Exit status, number of errors and output of gpu_check under a tool; no number where it gave no summary.

    No kernel is filtered out: a filter that matches nothing would pass everything, and CuPy's few kernels are
    short. API errors are not asked for, because looking for newer functions of the driver makes some.
    """
    options = ["--tool", tool, "--error-exitcode", ERROR_EXIT, "--report-api-errors", "no"]
    child = [sys.executable, "-m", "tests.gpu_check", "--device", device, *arguments]
    code, text = _run(["compute-sanitizer", *options, *child])
    found = _SUMMARY.findall(text)
    return code, int(found[-1]) if found else None, text


def _report(text: str) -> str:
    """The tool's own lines, from the first on."""
    return "\n".join([line for line in text.splitlines() if line.startswith("=========")][:40])


def sanitizer_part(tool: str, device: str) -> dict:
    """The verdict of one tool on the representative cases; void unless it finds the planted mistake."""
    if shutil.which("compute-sanitizer") is None:
        reason = "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit"
        return {"status": "not run", "reason": reason}
    _, planted, planted_text = _sanitized(tool, device, "--child-planted", tool)
    result = {"status": "failed", "planted_errors": planted}
    if not planted:
        reason = f"{tool} did not report the planted {TOOLS[tool][0]}: its word is worth nothing here"
        return result | {"reason": reason, "output": planted_text[-4000:]}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        code, errors, text = _sanitized(tool, device, "--child-cases", file)
        measured = json.loads(file.read_text()) if file.exists() else []
    failed = [f"{r['kernel']} {r['case']}" for r in measured if not r["passed"]]
    result |= {"errors": errors, "cases": len(measured), "failed": len(failed)}
    if code == 0 and errors == 0 and measured and not failed:
        return result | {"status": "passed"}
    if code is None:
        reason = TOO_LONG
    elif errors is None:
        reason = f"ended with status {code} and no summary"
    elif errors:
        reason = f"{errors} errors"
    elif failed:
        reason = f"{len(failed)} of {len(measured)} cases failed under it"
    else:
        reason = f"ended with status {code}"
    result |= {"reason": reason, "failed_cases": failed, "report": _report(text)}
    return result | {"output": text[-4000:]}
