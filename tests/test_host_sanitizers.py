"""The fast host library and its thread pool, compiled with sanitizers and called in a process of their own.

ThreadSanitizer needs no suppression here: the pool's locks and atomics are of kinds that it models. Stores
that go around the caches are ordinary ones in the sanitized builds: no sanitizer sees the others (stream.h).
"""

import numpy as np
import pytest

from kernels import simt

from . import cases
from .backends import host_runner, host_runner_backend

FLAVOURS = ("", *simt.SANITIZERS)
SHARED, SLEEPING = 20_000, 450_000  # nanoseconds of work from which threads share it, on watch and asleep


@pytest.fixture(scope="module", autouse=True)
def close_runners():
    yield
    for sanitizer in FLAVOURS:
        host_runner(sanitizer).close()


def _caught(sanitizer, match, name, *args):
    with pytest.raises(simt.SimtError, match=match):
        host_runner(sanitizer).launch(name, (1,), (1,), args)


def _pool(runner, helpers=3):
    runner.launch("kernels_set_helpers", (1,), (1,), (np.int32(helpers),))
    runner.launch("kernels_serve_blas", (1,), (1,), (np.int32(1), np.int32(helpers)))


@pytest.mark.parametrize("sanitizer", FLAVOURS)
def test_the_host_kernels_are_right_and_clean(sanitizer, every_case):
    if sanitizer in ("", "undefined") and not every_case:
        pytest.skip("AddressSanitizer comes with UBSan: give --every-case")
    for helpers, serve_blas, listed in [
        (0, False, cases.representative()),
        (3, True, cases.shared(SHARED)),
        (2, False, cases.shared(SLEEPING)[3:6]),
    ]:
        backend = host_runner_backend(sanitizer, helpers, serve_blas)
        for case in listed:
            for check in case.run(backend):
                check.verify()


@pytest.mark.parametrize("sanitizer", FLAVOURS)
def test_blas_jobs_run_at_the_same_time_and_share_no_memory(sanitizer):
    _pool(host_runner(sanitizer))
    for jobs in (1, 2, 4):
        x = np.arange(2 * jobs, dtype=np.float32)
        for _ in range(20):
            before = x[:jobs].copy()
            host_runner(sanitizer).launch("blas_jobs", (1,), (1,), (x, np.int32(jobs)))
            assert np.array_equal(x[:jobs], before + 1) and np.array_equal(x[jobs:], np.roll(before + 1, -1))


@pytest.mark.parametrize("sanitizer", FLAVOURS)
def test_the_right_twins_of_the_planted_mistakes_pass(sanitizer):
    runner = host_runner(sanitizer)
    _pool(runner)
    runner.launch("race_right", (1,), (1,), (np.zeros(200, np.float32), np.int64(200)))
    runner.launch("past_the_end_right", (1,), (1,), (np.zeros(50_000, np.float32), np.int64(50_000)))
    runner.launch("stream_right", (1,), (1,), (np.zeros(64, np.float32), np.int64(64)))
    runner.launch("overflow_right", (1,), (1,), (np.zeros(1, np.int32), np.int32(40_000)))


def test_a_race_between_chunks_is_found():
    _pool(host_runner("thread"))
    _caught("thread", "data race", "race_wrong", np.zeros(200, np.float32), np.int64(200))


@pytest.mark.parametrize("sanitizer", ["", "address"])
@pytest.mark.parametrize("name", ["past_the_end_wrong", "stream_wrong"])
def test_a_store_past_the_end_is_found(sanitizer, name):
    match = "AddressSanitizer" if sanitizer else "wrote outside argument 0"
    _caught(sanitizer, match, name, np.zeros(50_000, np.float32), np.int64(50_000))


def test_an_overflow_is_found():
    _caught("undefined", "signed integer overflow", "overflow_wrong", np.zeros(1, np.int32), np.int32(40_000))
