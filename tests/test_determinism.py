"""The same bits twice, with any number of threads, and from several Python threads at once."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import kernels

from .checks import assert_same_bits, to_numpy

# Shapes with well over 0.4 ms of work, below which the CPU does not share, and an odd last chunk.
LARGE, SMALL = (5003, 601), (130, 47)


def _bias_act(backend, rng, B, N):
    z, bias = backend.array(rng.normal(0, 2, (B, N))), backend.array(rng.normal(0, 1, N))
    return lambda: (kernels.bias_act(z, bias, "gelu"),)


def _bias_act_backward(backend, rng, B, N):
    dy, z = backend.array(rng.normal(0, 2, (B, N))), backend.array(rng.normal(0, 2, (B, N)))
    return lambda: kernels.bias_act_backward(dy, z, "silu")


def _softmax_cross_entropy(backend, rng, B, C):
    logits, labels = backend.array(rng.normal(0, 5, (B, C))), backend.array(rng.integers(0, C, B), np.int32)

    def run():
        totals = backend.array([0.0, 0.0], np.float64)
        counts = backend.array(np.zeros((C - 1, C - 1)), np.int64)
        settings = dict(totals=totals, confusion=counts, classes=C - 1, label_smoothing=0.1)
        return *kernels.softmax_cross_entropy(logits, labels, **settings), totals, counts

    return run


def _adam_step(backend, rng, B, N):
    start = [rng.normal(0, 1, B * N).astype(np.float32) for _ in range(4)]
    start[3] = np.abs(start[3])

    def run():
        p, g, m, v = (backend.array(x) for x in start)
        kernels.adam_step(p, g, m, v, step=3, lr=0.1, weight_decay=0.1)
        return p, m, v

    return run


def _sgd_step(backend, rng, B, N):
    start = [rng.normal(0, 1, B * N).astype(np.float32) for _ in range(3)]

    def run():
        p, g, velocity = (backend.array(x) for x in start)
        kernels.sgd_step(p, g, velocity, lr=0.1, momentum=0.9)
        return p, velocity

    return run


def _gather_batch(backend, rng, B, N):
    D = 28 * 28 if N > 100 else 25
    images = backend.array(rng.integers(0, 256, (300, D)), np.uint8)
    labels, index = backend.array(np.arange(300), np.int32), backend.array(rng.integers(0, 300, B), np.int32)
    affine = backend.array(np.eye(2, 3) + rng.normal(0, 0.1, (B, 2, 3)))
    return lambda: kernels.gather_batch(images, labels, index, noise_sigma=0.1, seed=4, affine=affine)


def _gather_batch_augmented(backend, rng, B, N):
    D = 28 * 28 if N > 100 else 25
    images = backend.array(rng.integers(0, 256, (300, D)), np.uint8)
    labels, index = backend.array(np.arange(300), np.int32), backend.array(rng.integers(0, 300, B), np.int32)
    settings = dict(noise_sigma=0.1, noise_uniform=True, augment=kernels.Augment(10.0, 0.1, 0.1, 2.0))
    draw = backend.array([3], np.int64)
    return lambda: kernels.gather_batch(images, labels, index, seed=4, draw=draw, **settings)


def _average_step(backend, rng, B, N):
    average, p = (rng.normal(0, 1, B * N).astype(np.float32) for _ in range(2))

    def run():
        moved = backend.array(average)
        kernels.average_step(moved, backend.array(p), decay=0.9, step=3)
        return (moved,)

    return run


def _shuffle(backend, rng, B, N):
    index = backend.array(np.arange(B * N), np.int32)
    return lambda: (kernels.shuffle(index, seed=5, epoch=6),)


def _to_bfloat16(backend, rng, B, N):
    x = backend.array(rng.normal(0, 2, (B, N)))
    return lambda: (kernels.to_bfloat16(x),)


def _batch_norm_stats(backend, rng, B, N):
    z = backend.array(rng.normal(0, 2, (B, N)))
    return lambda: kernels.batch_norm_stats(z)


def _norm_act(backend, rng, B, N):
    z, bias = backend.array(rng.normal(0, 2, (B, N))), backend.array(rng.normal(0, 1, N))
    return lambda: (kernels.norm_act(z, bias, "gelu", dropout=0.5, seed=7),)


def _norm_act_backward(backend, rng, B, N):
    dy, z, bias = (backend.array(rng.normal(0, 2, shape)) for shape in ((B, N), (B, N), N))
    mean, var = kernels.batch_norm_stats(z)
    return lambda: kernels.norm_act_backward(dy, z, bias, "silu", mean=mean, var=var, weight=bias, dropout=0.5, seed=7)


def _matrix_product(backend, rng, B, N):
    """BLAS may run on the same threads; whole numbers make its result exact in any order."""
    a = backend.array(rng.integers(-8, 9, (min(B, 500), N)))
    return lambda: (a.T @ a,)


OPS = {f.__name__[1:]: f for f in (
    _bias_act, _bias_act_backward, _softmax_cross_entropy, _adam_step, _sgd_step, _average_step,
    _gather_batch, _gather_batch_augmented, _shuffle, _to_bfloat16, _batch_norm_stats, _norm_act, _norm_act_backward,
)}  # fmt: skip


def _assert_all_same(results, expected):
    for actual, reference in zip(results, expected, strict=True):
        assert_same_bits(actual, reference)


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("op", OPS)
def test_twice_the_same_bits(backend, rng, op, shape):
    run = OPS[op](backend, rng, *shape)
    expected = [to_numpy(x) for x in run()]
    for _ in range(3):
        _assert_all_same(run(), expected)


@pytest.mark.parametrize("op", OPS)
def test_the_number_of_threads_changes_no_bit(rng, set_threads, host_backend, op):
    run = OPS[op](host_backend, rng, *LARGE)
    set_threads(1)
    expected = run()
    for threads in (4, 2, 7, 4):
        set_threads(threads)
        for _ in range(3):
            _assert_all_same(run(), expected)


def test_python_threads_do_not_disturb_each_other(rng, set_threads, host_backend):
    """One caller at a time has the worker threads; the others do their work alone."""
    set_threads(4)
    makers = [*OPS.values(), _matrix_product]
    runs = [make(host_backend, rng, *shape) for make in makers for shape in (SMALL, LARGE)]
    expected = [run() for run in runs]
    with ThreadPoolExecutor(6) as executor:
        futures = [(k, executor.submit(run)) for _ in range(3) for k, run in enumerate(runs)]
        for k, future in futures:
            _assert_all_same(future.result(timeout=60), expected[k])
