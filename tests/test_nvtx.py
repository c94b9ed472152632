"""What a tool such as Nsight Systems hears of a run, through the interface that NVTX has for tools.

tests/host/nvtx_recorder.cpp takes the tool's place: NVTX loads it into train.py and calls it at every push and pop.
"""

import os
import shutil
import subprocess
import sys

import pytest

from mlp import ranges

from .test_ranges import a_step, an_epoch, forward
from .training import BACKENDS, ROOT, SCRIPT, environment, script_after, train, tree, write_npy


@pytest.fixture(scope="module")
def recorder_library(tmp_path_factory):
    """tests/host/nvtx_recorder.cpp as a shared library."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if sys.platform != "linux" or not compiler:
        pytest.skip("the listener needs Linux and a C++ compiler")
    library = tmp_path_factory.mktemp("nvtx") / "recorder.so"
    source = ROOT / "tests" / "host" / "nvtx_recorder.cpp"
    command = [*compiler.split(), "-std=c++17", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return library


@pytest.fixture
def listener(recorder_library, tmp_path, monkeypatch):
    """A function that reads what the processes of this test told NVTX."""
    monkeypatch.setenv("NVTX_INJECTION64_PATH", str(recorder_library))
    monkeypatch.setenv("NVTX_RECORD", str(tmp_path / "record"))
    write_npy(tmp_path / "good", rows=300)

    def lines():
        return (tmp_path / "record").read_text().splitlines() if (tmp_path / "record").exists() else []

    return lines


def replay(lines):
    """(depth, name) of every range, after checks: one domain, one thread, opaque colours, every push has its pop."""
    assert lines[0] == "domain mlp" and len({line.split()[1] for line in lines[1:]}) == 1
    heard, depth = [], 0
    for what, _, domain, *rest in map(str.split, lines[1:]):
        assert domain == "mlp"
        if what == "push":
            colour, name = rest
            assert int(colour, 16) == ranges.COLOURS[name.partition("/")[0]] and colour.startswith("ff")
            heard.append((depth, name))
        depth += 1 if what == "push" else -1
        assert what in ("push", "pop") and depth >= 0
    assert depth == 0
    return heard


OPTIONS = ("--model", "m1", "--device", "cpu", "--data", "good", "--hidden", "32,16", "--batch-size", 64, "--epochs", 2)
AFTERWARDS = 7 * [(0, "validation"), *forward(1)]  # validation and test images, and five times with noise
FIT_TORCH = """
from tests.test_ranges import make, watched_fit
from mlp.ranges import nvtx_annotate
watched_fit(make("torch"), nvtx_annotate())
"""


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_tool_hears_the_ranges_of_a_run(kind, listener, tmp_path):
    result = train(*OPTIONS, "--nvtx", *(("--fused",) if kind == "fused" else ()), "--out", "run", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert replay(listener()) == 2 * an_epoch(kind) + AFTERWARDS


def test_a_tool_hears_the_ranges_of_torch(listener):
    result = subprocess.run(
        [sys.executable, "-c", FIT_TORCH], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert replay(listener()) == 2 * an_epoch("torch")


def test_a_tool_hears_nothing_of_a_run_without_nvtx(listener, tmp_path):
    result = train(*OPTIONS, "--out", "run", cwd=tmp_path, python=("-X", "importtime", SCRIPT))
    assert result.returncode == 0 and listener() == []
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "mlp.run" in imported and "nvtx" not in imported


@pytest.mark.parametrize("act, status", [("signal.raise_signal(signal.SIGINT)", 130), ("1 / 0", 1)])
def test_a_tool_hears_balanced_ranges_of_a_run_cut_short(act, status, listener, tmp_path):
    plant = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from tests.test_ranges import spoil; from kernels import plain; "
        f"spoil(plain, 'gather_batch', lambda _: {act})"
    )
    result = train(*OPTIONS, "--nvtx", "--out", "run", cwd=tmp_path, python=script_after(plant))
    assert result.returncode == status, result.stderr
    heard = replay(listener())
    two_steps, third = [(0, "epoch"), *a_step("plain") * 2], a_step("plain")
    assert heard == two_steps + (third + AFTERWARDS if status == 130 else third[:2])


def test_nvtx_without_the_package_is_refused(tmp_path):
    write_npy(tmp_path / "good", rows=60)
    before = tree(tmp_path)
    result = train(*OPTIONS, "--nvtx", cwd=tmp_path, python=script_after("sys.modules['nvtx'] = None"))
    assert (result.returncode, result.stdout) == (2, "") and tree(tmp_path) == before
    assert len(result.stderr.splitlines()) == 1 and "pip install nvtx" in result.stderr
