"""gpu_check.py without a GPU: its cases thread by thread, and a compute-sanitizer that says what it is told."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from kernels import cuda

from . import cases, gemm_cases, gpu_check, gpu_parts
from .case import Case, bias_act
from .checks import Check
from .training import ROOT

FAKE = '''#!{python}
import json, os, subprocess, sys
arguments, how = sys.argv[1:], os.environ["FAKE"]
if arguments == ["--version"]:
    sys.exit(print("Version 0.fake"))
assert arguments[arguments.index("--error-exitcode") + 1] == "86"
planted = "--child-planted" in arguments
tool = arguments[arguments.index("--tool") + 1]
code, errors = (86, 1) if planted else (0, 0)
if how == "real":
    code = subprocess.call(arguments[arguments.index(sys.executable):], stderr=subprocess.DEVNULL)
    errors = int(code != 0)
elif not planted:
    passed = how != "wrong result"
    result = dict(kernel="adam", case="5", passed=passed, what="p", max_relative_error=2.0, tolerance=1.0)
    with open(arguments[arguments.index("--child-cases") + 1], "w") as file:
        json.dump([result], file)
    code, errors = {{"errors": (86, 3), "wrong result": (1, 0), "crash": (7, None)}}.get(how, (0, 0))
elif how == "blind":
    code, errors = 0, 0
if errors:
    print("========= Invalid __global__ write of size 4 bytes")
if errors is not None and tool == "racecheck":
    print(f"========= RACECHECK SUMMARY: {{errors}} hazards displayed ({{errors}} errors, 0 warnings)")
elif errors is not None:
    print(f"========= ERROR SUMMARY: {{errors}} errors")
sys.exit(code)
'''


@pytest.fixture
def fake_sanitizer(tmp_path, monkeypatch):
    """A function that puts a compute-sanitizer of the given behaviour ahead on the PATH."""
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text(FAKE.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return lambda how: monkeypatch.setenv("FAKE", how)


def _main(tmp_path, parts):
    code = gpu_check.main(["--device", "simt", "--out", str(tmp_path / "out"), "--parts", parts])
    report = json.loads((tmp_path / "out" / "correctness.json").read_text(), parse_constant=pytest.fail)
    assert report["passed"] == (code == 0)
    return code, report


def test_a_clean_run_through_every_process(tmp_path, fake_sanitizer):
    fake_sanitizer("real")
    code, report = _main(tmp_path, "cases,memcheck")
    assert code == 0
    assert report["device"]["name"] == "simt" and report["revision"] and report["date"]
    assert report["versions"]["numpy"] == np.__version__
    assert report["versions"]["compute_sanitizer"] == "Version 0.fake"
    assert report["options"]["device"] == "simt" and list(report["parts"]) == ["cases", "memcheck"]
    number = len(cases.representative()) + len(gemm_cases.few())
    assert report["parts"]["cases"]["kernels"] == 52 and report["parts"]["cases"]["cases"] == number
    memcheck = report["parts"]["memcheck"]
    assert (memcheck["errors"], memcheck["planted_errors"], memcheck["cases"]) == (0, 1, number)
    assert len(report["results"]) == number
    for result in report["results"]:
        assert result["passed"] and result["max_relative_error"] <= result["tolerance"]


def _wrong(rng, backend):
    return [Check("y", np.array([1.0, np.nan]), np.ones(2), 1e-6)]


def _crash(rng, backend):
    raise RuntimeError("an illegal memory access")


def test_failing_cases_are_recorded_and_turn_the_exit_status(tmp_path, monkeypatch, capsys):
    good = bias_act("relu", 2, 3)
    strangers = Case("adam", "another kernel", good.compute)
    bad = [Case("sgd", "wrong", _wrong), Case("sgd", "crash", _crash), strangers]
    monkeypatch.setattr(cases, "representative", lambda: [good, *bad])
    monkeypatch.setattr(gemm_cases, "few", list)
    code, report = _main(tmp_path, "cases")
    assert code == 1 and report["parts"]["cases"]["failed"] == 3
    assert [r["passed"] for r in report["results"]] == [True, False, False, False]
    assert report["results"][1]["max_relative_error"] == "inf"
    assert report["results"][2]["error"] == "RuntimeError: an illegal memory access"
    assert report["results"][3]["error"] == "launched bias_act_relu"
    assert report["parts"]["cases"]["by_kernel"]["sgd"]["failed"] == 2
    assert "sgd wrong: y: inf > 1e-06" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("how", "reason", "errors"),
    [
        ("errors", "3 errors", 3),
        ("wrong result", "1 of 1 cases failed under it", 0),
        ("crash", "ended with status 7 and no summary", None),
        ("blind", "did not report the planted", None),
    ],
)
def test_a_sanitizers_findings_are_recorded(tmp_path, fake_sanitizer, how, reason, errors):
    fake_sanitizer(how)
    code, report = _main(tmp_path, "memcheck,racecheck")
    assert code == 1
    for part in report["parts"].values():
        assert part["status"] == "failed" and reason in part["reason"] and part.get("errors") == errors
    if how == "errors":
        assert "Invalid __global__ write" in report["parts"]["memcheck"]["report"]


def test_without_compute_sanitizer_nothing_passes(tmp_path, monkeypatch):
    which = gpu_parts.shutil.which
    monkeypatch.setattr(gpu_parts.shutil, "which", lambda name: None if "sanitizer" in name else which(name))
    code, report = _main(tmp_path, "synccheck")
    assert code == 1 and report["parts"]["synccheck"]["status"] == "not run"
    assert "compute-sanitizer is not on the PATH" in report["parts"]["synccheck"]["reason"]


def test_a_part_that_takes_too_long_is_recorded(monkeypatch):
    command = [sys.executable, "-uc", "print('begun'); import time; time.sleep(60)"]
    assert gpu_parts._run(command, timeout=2) == (None, "begun\n")
    monkeypatch.setattr(gpu_parts, "_run", lambda command: (None, "begun"))
    assert gpu_parts.pytest_part()["reason"] == "took more than 600 s"


def _junit(tests, failures, skipped):
    case = '<testcase classname="tests.test_x" name="bad"><failure/></testcase>' * failures
    counts = f'tests="{tests}" failures="{failures}" errors="0" skipped="{skipped}"'
    return f"<testsuites><testsuite {counts}>{case}</testsuite></testsuites>"


@pytest.mark.parametrize(
    ("code", "counts", "status"),
    [(0, (9, 0, 1), "passed"), (1, (9, 1, 0), "failed"), (0, (9, 0, 9), "failed"), (2, None, "failed")],
)
def test_pytest_is_counted(monkeypatch, code, counts, status):
    def run(command):
        if counts:
            file = next(w for w in command if w.startswith("--junitxml=")).removeprefix("--junitxml=")
            open(file, "w").write(_junit(*counts))
        return code, "what it printed"

    monkeypatch.setattr(gpu_parts, "_run", run)
    part = gpu_parts.pytest_part()
    assert part["status"] == status
    if counts:
        assert part["passed"] == counts[0] - counts[1] - counts[2] and part["skipped"] == counts[2]
    if status == "failed":
        assert part["output"] == "what it printed" and len(part["failed_tests"]) == (counts or (0, 0))[1]


def _run(*arguments, **environment):
    command = [sys.executable, "-m", "tests.gpu_check", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    result = _run("--out", tmp_path, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 2 and list(tmp_path.iterdir()) == []
    assert result.stderr.startswith("error: there is no GPU to check: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [("--parts", "everything"), ("--device", "simt")])
def test_what_it_cannot_do_is_refused(arguments):
    result = _run(*arguments)
    assert result.returncode == 2 and "Traceback" not in result.stderr and "error: --" in result.stderr


def test_the_folder_is_named_after_the_gpu():
    assert gpu_parts.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_the_planted_kernels_are_for_nvrtc_too():
    """gpu_check compiles them on the GPU's machine; here at least the compiler reads them."""
    from .test_compile import compiled

    text = (ROOT / "tests" / "cuda" / "planted.cu").read_text()
    ptx = compiled(text, *cuda.OPTIONS, *cuda.CUPY_OPTIONS, "-arch=compute_90")
    assert all(f"{name}_wrong" in str(ptx) for name, *_ in gpu_parts.TOOLS.values())
