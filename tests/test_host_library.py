"""The compiled CPU library: refused with one sentence where it cannot be right, and safe across fork."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import kernels
from kernels import host, source

from .checks import assert_same_bits

ROOT = Path(__file__).parents[1]


def _clear_caches(*modules):
    for module in modules:
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@pytest.fixture
def fresh():
    """Host and source modules that have looked at nothing yet; afterwards they look again."""
    _clear_caches(host, source)
    yield
    _clear_caches(host, source)


@pytest.fixture
def changed(fresh, monkeypatch):
    """A monkeypatch that is undone before the caches are cleared."""
    with monkeypatch.context() as patch:
        yield patch


def _assert_refused(pattern):
    """check() and an op raise the same one sentence, and do so every time."""
    for use in (host.check, lambda: kernels.bias_act(np.ones((2, 2), "f"), np.ones(2, "f")), host.check):
        with pytest.raises(kernels.BackendError, match=pattern) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_missing(changed, tmp_path):
    changed.setattr(host, "LIBRARY", tmp_path / "absent.so")
    _assert_refused(r"absent\.so is missing; run `make build`")


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF" + bytes(100)])
def test_unloadable(changed, tmp_path, content):
    (tmp_path / "broken.so").write_bytes(content)
    changed.setattr(host, "LIBRARY", tmp_path / "broken.so")
    _assert_refused(r"broken\.so cannot be loaded \(.*\); run `make build`")


def test_another_library(changed, tmp_path):
    """A file that loads, and is not this library."""
    shutil.copy(np._core._multiarray_umath.__file__, tmp_path / "other.so")
    changed.setattr(host, "LIBRARY", tmp_path / "other.so")
    _assert_refused(r"other\.so.*run `make build`")


def test_built_from_other_sources(changed):
    changed.setattr(source, "digest", lambda: "0" * 64)
    _assert_refused("other sources.*run `make build`")


def test_matches_the_sources(fresh):
    host.check()


@pytest.mark.parametrize("value", ["0", "-1", "four", "", "1.5"])
def test_number_of_threads_that_is_none(changed, value):
    changed.setenv("KERNELS_NUM_THREADS", value)
    _assert_refused(f"KERNELS_NUM_THREADS='{value}'")


@pytest.mark.parametrize("change", ["edit", "add", "rename", "delete"])
def test_digest_follows_every_header(changed, tmp_path, change):
    shutil.copytree(source.DIRECTORY, tmp_path / "src")
    before = source.digest()
    changed.setattr(source, "DIRECTORY", tmp_path / "src")
    _clear_caches(source)
    assert source.digest() == before, "a copy elsewhere has the same digest"
    header = tmp_path / "src" / "host" / "vocabulary.h"
    if change == "edit":
        header.write_text(header.read_text() + " ")
    elif change == "add":
        (tmp_path / "src" / "new.cuh").write_text("")
    elif change == "rename":
        header.rename(tmp_path / "src" / "a.h")
    else:
        header.unlink()
    _clear_caches(source)
    assert source.digest() != before


def _large():
    """Results of a fused op and of BLAS; whole numbers make a product exact in any order."""
    rng = np.random.default_rng(5)
    z = rng.normal(0, 2, (3000, 801)).astype(np.float32)
    a = rng.integers(-8, 9, (700, 700)).astype(np.float32)
    return *kernels.bias_act_backward(z, z, "gelu"), a @ a


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc, which Linux has")
def test_large_ops_wake_workers_and_small_ones_do_not():
    """In a process of its own, which has no other threads of Python's or BLAS's making."""
    script = """
import os, numpy as np, kernels
from kernels import host
host.set_threads(4)
count = lambda: len(os.listdir("/proc/self/task"))
x = np.ones((2000, 2000), np.float32)
kernels.bias_act(x[:4].copy(), x[0])
before = count()
kernels.bias_act(x, x[0], "gelu")
print(before, count())
"""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    before, after = map(int, result.stdout.split())
    assert before == 1 < after <= 4


def test_blas_computes_the_same_on_shared_threads():
    a = np.random.default_rng(5).integers(-8, 9, (700, 700))
    expected = a @ a
    try:
        for yes in (True, False, True):
            if host.share_blas_threads(yes) != yes:
                pytest.skip("NumPy's BLAS is not an OpenBLAS that lends its jobs")
            assert_same_bits(a.astype(np.float32) @ a.astype(np.float32), expected.astype(np.float32))
    finally:
        host.share_blas_threads(os.environ.get("KERNELS_SHARE_BLAS", "1") != "0")


def _wait_for(child, seconds) -> int:
    """The child's exit status; a child that hangs is killed and gives -1."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 warns wherever threads exist
def test_a_forked_child_computes_what_its_parent_does(set_threads):
    """The worker threads stay behind in the parent; a child that waited for them would hang."""
    set_threads(4)
    expected = _large()
    for _ in range(10):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for actual, reference in zip(_large(), expected, strict=True):
                    assert_same_bits(actual, reference)
                status = 0
            finally:
                os._exit(status)
        assert _wait_for(child, 20) == 0
        for actual, reference in zip(_large(), expected, strict=True):
            assert_same_bits(actual, reference)


def test_functions_together_run_at_the_same_time():
    """They wait for each other, which they could not one after another."""
    barrier, threads = threading.Barrier(3, timeout=30), set()

    def meet():
        barrier.wait()
        threads.add(threading.get_ident())

    for _ in range(5):
        host.together(meet, 3)
    assert len(threads) >= 3 and threading.get_ident() in threads


def test_an_exception_of_one_of_them_is_raised_when_all_are_done():
    numbers, done = itertools.count(), []

    def fail_once():
        number = next(numbers)
        if number == 1:
            raise ValueError("the second")
        time.sleep(0.05)
        done.append(number)

    with pytest.raises(ValueError, match="the second"):
        host.together(fail_once, 3)
    assert sorted(done) == [0, 2]
