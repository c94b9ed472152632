"""The SIMT runner's process and its build: what is refused, and that nothing stale is executed."""

import shutil
import threading
import time

import numpy as np
import pytest

from kernels import BackendError, simt

KERNEL = """
#include "factor.cuh"
extern "C" __global__ void scale(float* x, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] *= FACTOR;
}
"""


@pytest.fixture
def source(tmp_path):
    """A kernel that multiplies by 2, with a header; what is built of it goes afterwards."""
    path = tmp_path / "scale.cu"
    path.write_text(KERNEL)
    (tmp_path / "factor.cuh").write_text("#define FACTOR 2.0f\n")
    yield path
    for folder in (simt._ROOT / "build" / "simt").glob("scale-*"):
        shutil.rmtree(folder)


def _scaled(runner):
    x = np.arange(5, dtype=np.float32)
    runner.launch("scale", (1,), (32,), (x, np.int32(5)))
    runner.close()
    return list(x)


def test_builds_of_one_program_take_turns(monkeypatch, tmp_path):
    """Tests may run in several processes; a lock per open file tells threads apart just as well."""
    at_work, most, guard = [], [], threading.Lock()

    def run(command):
        with guard:
            at_work.append(command)
            most.append(len(at_work))
        time.sleep(0.02)
        at_work.remove(command)

    monkeypatch.setattr(simt, "_run", run)
    monkeypatch.setattr(simt, "_ROOT", tmp_path)
    (tmp_path / "CMakeLists.txt").touch()
    threads = [threading.Thread(target=lambda: pytest.raises(simt.MissingSanitizer, simt.build)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6


def test_an_edited_header_or_source_is_built_anew(source):
    assert _scaled(simt.Runner(source)) == [0, 2, 4, 6, 8]
    source.with_name("factor.cuh").write_text("#define FACTOR 3.0f\n")
    assert _scaled(simt.Runner(source)) == [0, 3, 6, 9, 12]
    source.write_text(KERNEL.replace("*=", "+="))
    assert _scaled(simt.Runner(source)) == [3, 4, 5, 6, 7]


def test_a_source_that_does_not_compile_or_has_no_kernel(source):
    source.write_text(KERNEL.replace("FACTOR;", "UNKNOWN;"))
    with pytest.raises(BackendError, match="UNKNOWN"):
        simt.Runner(source)
    source.write_text("int x;")
    with pytest.raises(BackendError, match=r"has\s+no\s+kernel"):
        simt.Runner(source)
    with pytest.raises(BackendError, match="absent.cu"):
        simt.Runner(source.with_name("absent.cu"))


def test_a_compiler_without_a_sanitizer(source, tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *=thread*) exit 1;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert _scaled(simt.Runner(source)) == [0, 2, 4, 6, 8]
    with pytest.raises(simt.MissingSanitizer, match="no -fsanitize=thread; install"):
        simt.Runner(source, "thread")


@pytest.mark.parametrize(
    ("grid", "block", "message"),
    [
        ((1,), (1025,), "a block has 1 to 1024 threads, got 1025 x 1 x 1"),
        ((1,), (32, 32, 2), "a block has 1 to 1024 threads, got 32 x 32 x 2"),
        ((1,), (0,), "a block has 1 to 1024 threads"),
        ((0,), (32,), "a grid has 1 to"),
        ((1, 65536), (32,), "1 to 2147483647 x 65535 x 65535 blocks, got 1 x 65536 x 1"),
    ],
)
def test_launch_shapes_that_cuda_refuses(grid, block, message):
    with pytest.raises(simt.SimtError, match=message):
        simt.Runner().launch("sgd", grid, block, (np.uintp(0),) * 3)


def test_a_process_that_ends_is_replaced(source):
    runner = simt.Runner(source)
    for _ in range(2):
        with pytest.raises(simt.SimtError, match="no such kernel"):
            runner.launch("absent", (1,), (32,), ())
        assert _scaled(runner) == [0, 2, 4, 6, 8]


def test_the_process_ends_with_its_runner(source):
    runner = simt.Runner(source)
    runner.launch("scale", (1,), (32,), (np.ones(1, np.float32), np.int32(1)))
    process = runner._process
    runner.close()
    assert process.poll() is not None
