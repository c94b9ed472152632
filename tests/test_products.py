"""The matrix products of a layer: by the array module, and by cuBLASLt, on its stand-in and on a GPU."""

import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from mlp import InputError
from mlp.cublaslt import CublasLt
from mlp.gemm import ArrayGemm
from mlp.tuning import ALGORITHMS

from .checks import REDUCTION, Backend, assert_close, assert_same_bits, max_error, to_numpy
from .products import (  # noqa: F401  (the fixtures)
    SIZES,
    TOLERANCE,
    Data,
    check_products,
    every_precision,
    every_size,
    gpu_fixture,
    library_fixture,
    mask_output,
    offered,
    products_fixture,
)


# ---------------------------------------------------------------------------------------- by the array module


@every_size
def test_numpy(rng, sizes):
    check_products(Backend("host", np, None), ArrayGemm(np), "fp32", sizes, rng)
    assert not ArrayGemm.captures


@pytest.mark.gpu
@every_size
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_cupy(rng, precision, sizes):
    import cupy

    try:
        gemm = ArrayGemm(cupy, precision)
    except InputError as error:
        pytest.skip(str(error))
    check_products(Backend("cuda", cupy, None), gemm, precision, sizes, rng)


@pytest.fixture
def linalg(library):
    """Where CuPy keeps how it multiplies float32, with a setting of its own."""
    linalg = sys.modules["cupy._core"]._routines_linalg
    linalg.now, linalg.possible = "somebody's", True

    def set_compute_type(dtype, to):
        assert dtype == np.float32
        linalg.now = to if to != "tf32" or linalg.possible else "default"

    linalg.set_compute_type, linalg.get_compute_type = set_compute_type, lambda dtype: linalg.now
    return linalg


def test_tf32_is_set_for_the_call_alone(library, linalg):
    gemm = ArrayGemm(library.gpu.xp, "tf32")
    assert linalg.now == "somebody's"
    during = []
    gemm._xp = SimpleNamespace(matmul=lambda a, b, out: during.append((linalg.now, a.shape, b.shape)))
    gemm.forward(np.ones((2, 3)), np.ones((3, 4)), None)
    gemm.input_gradient(np.ones((2, 4)), np.ones((3, 4)), None)
    gemm.weight_gradient(np.ones((2, 3)), np.ones((2, 4)), None)
    assert during == [("tf32", (2, 3), (3, 4)), ("tf32", (2, 4), (4, 3)), ("tf32", (3, 2), (2, 4))]
    assert linalg.now == "somebody's"
    gemm._xp = SimpleNamespace(matmul=lambda a, b, out: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gemm.forward(None, None, None)
    assert linalg.now == "somebody's"


def test_fp32_leaves_cupy_as_it_is(library, linalg):
    del linalg.set_compute_type
    check_products(library.gpu, ArrayGemm(library.gpu.xp), "fp32", SIZES[1], np.random.default_rng(0))


def test_tf32_on_an_old_gpu(library, linalg):
    linalg.possible = False
    with pytest.raises(InputError, match="compute capability 8.0"):
        ArrayGemm(library.gpu.xp, "tf32")
    assert linalg.now == "somebody's"


@pytest.mark.parametrize("precision, error, match", [
    ("bf16", InputError, "pip install nvmath-python"), ("tf32", InputError, "take fp32"),
    ("float32", ValueError, "one of fp32, tf32, bf16, got 'float32'"),
])  # fmt: skip
def test_what_numpy_has_not(precision, error, match):
    with pytest.raises(error, match=match):
        ArrayGemm(np, precision)


# ---------------------------------------------------------------------------------------- by cuBLASLt


@every_precision
@every_size
def test_products(gpu, products, precision, sizes, rng):
    check_products(gpu, products(precision), precision, sizes, rng)


@every_precision
@pytest.mark.parametrize("offset", [1, 2])
def test_products_of_misaligned_arrays(gpu, products, precision, offset, rng):
    check_products(gpu, products(precision), precision, (5, 33, 47), rng, offset)


def test_fp32_is_more_than_tf32(gpu, products, rng):
    """REDUCTION tells them apart, so test_products would notice TF32 where fp32 was asked for."""
    (x, x64), (weight, weight64) = (Data(gpu, "tf32", rng).factor(*shape) for shape in ((128, 256), (256, 128)))
    out, _ = gpu.outputs(128, 128)
    products("tf32").forward(x, weight, out)
    assert max_error(out, x64 @ weight64, np.abs(x64) @ np.abs(weight64)) > 2 * REDUCTION


@every_precision
@every_size
@pytest.mark.parametrize("activation, masked", [("identity", False), ("relu", False), ("relu", True)])
def test_forward_with_bias_and_activation(gpu, products, precision, sizes, activation, masked, rng):
    (B, K, N), data, lt = sizes, Data(gpu, precision, rng), products(precision)
    (x, x64), (weight, weight64), (bias, bias64) = data.factor(B, K), data.factor(K, N), data.vector(N)
    out, assert_out_intact = gpu.outputs(B, N)
    mask, assert_mask_intact = mask_output(gpu, B, N) if masked else (None, lambda: None)
    offered(gpu, lt.forward_act, x, weight, bias, activation, out, mask)
    z = x64 @ weight64 + bias64
    reference = np.maximum(z, 0.0) if activation == "relu" else z
    assert_close(out, reference, TOLERANCE[precision], magnitude=np.abs(x64) @ np.abs(weight64) + np.abs(bias64))
    assert_out_intact()
    assert_mask_intact()


@every_precision
@pytest.mark.parametrize("sizes", [(395, 784, 400, 240), (5, 33, 129, 47), (31, 2, 1, 2)])
def test_the_mask_of_forward_in_backward(gpu, products, precision, sizes, rng):
    (B, D, K, N), data, lt = sizes, Data(gpu, precision, rng), products(precision)
    (x, _), (first, _), (bias, _) = data.factor(B, D), data.factor(D, K), data.vector(K)
    (dz, dz64), (second, second64) = data.factor(B, N), data.factor(K, N)
    y, _ = gpu.outputs(B, K)
    mask, assert_mask_intact = mask_output(gpu, B, K)
    offered(gpu, lt.forward_act, x, first, bias, "relu", y, mask)
    positive = to_numpy(y) > 0
    assert positive.any() and not positive.all()
    before = to_numpy(mask).copy()
    out, assert_out_intact = gpu.outputs(B, K)
    bias_grad, assert_bias_grad_intact = gpu.outputs(K)
    offered(gpu, lt.input_gradient_relu, dz, second, mask, out, bias_grad)
    reference = np.where(positive, dz64 @ second64.T, 0.0)
    magnitude = np.where(positive, np.abs(dz64) @ np.abs(second64.T), 0.0)
    assert_close(out, reference, TOLERANCE[precision], magnitude=magnitude)
    assert_close(bias_grad, reference.sum(0), TOLERANCE[precision], magnitude=magnitude.sum(0))
    assert_same_bits(mask, before)
    assert_mask_intact()
    assert_out_intact()
    assert_bias_grad_intact()


@every_precision
@pytest.mark.parametrize("sizes", SIZES[:2])
def test_weight_gradient_with_bias_gradient(gpu, products, precision, sizes, rng):
    (B, K, N), data, lt = sizes, Data(gpu, precision, rng), products(precision)
    (x, x64), (dz, dz64) = data.factor(B, K), data.factor(B, N)
    out, assert_out_intact = gpu.outputs(K, N)
    bias_grad, assert_bias_grad_intact = gpu.outputs(N)
    offered(gpu, lt.weight_gradient_bias, x, dz, out, bias_grad)
    assert_close(out, x64.T @ dz64, TOLERANCE[precision], magnitude=np.abs(x64.T) @ np.abs(dz64))
    assert_close(bias_grad, dz64.sum(0), TOLERANCE[precision], magnitude=np.abs(dz64).sum(0))
    assert_out_intact()
    assert_bias_grad_intact()


@pytest.mark.parametrize("columns, bytes_per_row", [(1, 16), (47, 16), (128, 16), (129, 32), (400, 64)])
def test_mask_shape(columns, bytes_per_row):
    assert CublasLt.mask_shape(5, columns) == (5, bytes_per_row)


def test_repeated_products_are_the_same(gpu, products, rng):
    """In the sums over the batch, where algorithms split k: again and again, and by another CublasLt."""
    data = Data(gpu, "tf32", rng)
    (x, _), (dz, _) = data.factor(2048, 240), data.factor(2048, 47)
    first, again = gpu.outputs(240, 47)[0], gpu.outputs(240, 47)[0]
    lt = products("tf32")
    lt.weight_gradient(x, dz, first)
    for gemm in (lt, lt, products("tf32")):
        again[...] = np.nan
        gemm.weight_gradient(x, dz, again)
        assert_same_bits(first, again)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("number", range(ALGORITHMS))
def test_every_algorithm_computes_the_same(gpu, products, precision, number, rng):
    """In a form with an epilogue, and in one whose sums are long enough to be split; and again the same bits."""
    (B, K, N), data, lt = (512, 400, 240), Data(gpu, precision, rng), products(precision)
    (x, x64), (dz, dz64), (weight, weight64) = data.factor(B, K), data.factor(B, N), data.factor(K, N)
    bias, bias64 = data.vector(N)
    y, again, grad = (gpu.outputs(*shape)[0] for shape in ((B, N), (B, N), (K, N)))
    masks = [mask_output(gpu, B, N)[0] for _ in range(2)]
    for out, mask in zip((y, again), masks):
        offered(gpu, partial(lt.forward_act, x, weight, bias, "relu", out, mask, algorithm=number))
    offered(gpu, partial(lt.weight_gradient, x, dz, grad, algorithm=number))
    magnitude = np.abs(x64) @ np.abs(weight64) + np.abs(bias64)
    assert_close(y, np.maximum(x64 @ weight64 + bias64, 0.0), TOLERANCE[precision], magnitude=magnitude)
    assert_close(grad, x64.T @ dz64, TOLERANCE[precision], magnitude=np.abs(x64.T) @ np.abs(dz64))
    bits = [np.unpackbits(to_numpy(mask), axis=1, count=N, bitorder="little") for mask in masks]
    assert_same_bits(y, again)
    for found in bits:
        assert_same_bits(found.astype(bool), to_numpy(y) > 0)


@every_precision
def test_a_captured_graph(gpu, products, precision, rng):
    """What a graph computes is what the calls computed; one plan serves two calls with different biases."""
    data, lt, xp = Data(gpu, precision, rng), products(precision), gpu.xp
    (x, _), (weight, _), (dz, _) = data.factor(5, 33), data.factor(33, 47), data.factor(5, 47)
    (bias, _), (other, _) = data.vector(47), data.vector(47)
    outs = [gpu.outputs(*shape)[0] for shape in ((5, 47), (5, 47), (5, 33), (33, 47))]

    def step():
        lt.forward_act(x, weight, bias, "relu", outs[0])
        lt.forward_act(x, weight, other, "relu", outs[1])
        lt.input_gradient(dz, weight, outs[2])
        lt.weight_gradient(x, dz, outs[3])

    stream = xp.cuda.Stream(non_blocking=True)
    xp.cuda.Device().synchronize()
    with stream:
        offered(gpu, step)
        stream.synchronize()
        expected = [to_numpy(out).copy() for out in outs]
        stream.begin_capture()
        step()
        graph = stream.end_capture()
        for out in outs:
            out[...] = np.nan
        graph.upload(stream)
        graph.launch(stream)
        stream.synchronize()
    for out, before in zip(outs, expected):
        assert_same_bits(out, before)


def test_two_streams_at_once(gpu, products, rng):
    data, lt, xp = Data(gpu, "tf32", rng), products("tf32"), gpu.xp
    (x, _), (dz, _) = data.factor(2048, 240), data.factor(2048, 47)
    alone, outs = gpu.outputs(240, 47)[0], [gpu.outputs(240, 47)[0] for _ in range(8)]
    lt.weight_gradient(x, dz, alone)
    streams = [xp.cuda.Stream(non_blocking=True) for _ in range(2)]
    xp.cuda.Device().synchronize()
    for k, out in enumerate(outs):
        with streams[k % 2]:
            lt.weight_gradient(x, dz, out)
    for stream in streams:
        stream.synchronize()
    for out in outs:
        assert_same_bits(out, alone)
