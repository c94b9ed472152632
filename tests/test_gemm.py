"""The products of a layer on tensor cores: right to the last rounding, clean under each sanitizer, and the same bits in
any order of blocks and threads, whatever uninitialised memory holds."""

import functools
import re

import numpy as np
import pytest

from kernels import cuda, simt
from kernels.gemm import PRECISIONS, Gemm

from . import gemm_cases
from .backends import simt_backend
from .checks import EPS, Backend, assert_close, assert_same_bits, to_numpy
from .gemm_cases import FORMS, LAYERS, ROUND

# Sanitizer, order of blocks and threads, what uninitialised memory holds.
FLAVOURS = [("thread", 3, 0xFF), ("address", 1, 0x7F)]  # the latter with UBSan


def _bits(backend, listed) -> dict:
    """By case: the bytes of its results, which are right, and which its kernel alone has made."""
    bits = {}
    for c in listed:
        backend.device.launched.clear()
        checks = c.run(backend)
        for check in checks:
            check.verify()
        assert backend.device.launched == {c.kernel}
        bits[str(c)] = [(check.what, to_numpy(check.actual).tobytes()) for check in checks]
    return bits


@functools.cache
def _first() -> dict:
    """Without a sanitizer, threads and blocks in ascending order."""
    return _bits(simt_backend(), gemm_cases.few())


def test_every_kernel_has_a_case():
    table = (simt.build().parent / "simt_table.inc").read_text()
    kernels = set(re.findall(r"SIMT_ENTRY\((gemm_\w+)\)", table))
    assert {c.kernel for c in gemm_cases.few()} == kernels and len(kernels) == 12
    names = [str(c) for c in gemm_cases.products()]
    assert len(names) == len(set(names))


def test_every_kernel_is_right():
    assert len(_first()) == len(gemm_cases.few())


@pytest.mark.parametrize("form", FORMS)
def test_more_shapes_and_activations(form):
    listed = [c for c in gemm_cases.products()[len(gemm_cases.few()) :] if c.kernel.startswith(f"gemm_{form}_")]
    _bits(simt_backend(), listed)


def _identity_products(backend, precision, x):
    """x times the identity, by each form."""
    n, gemm = len(x), Gemm(backend.device, precision)
    one, outs = backend.array(np.eye(n)), [backend.outputs(n, n)[0] for _ in FORMS]
    gemm.forward(backend.array(x), one, outs[0])
    gemm.input_gradient(backend.array(x), one, outs[1])
    gemm.weight_gradient(backend.array(x.T), one, outs[2])
    return outs


def _awkward(rng, n):
    """Finite numbers: ties and their neighbours on both sides, in all sizes that keep products normal."""
    bits = rng.integers(0x20000000, 0x5F000000, (n, n), np.uint32)
    ends = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x7FFF, 0x8000, 0x8001, 0x18000], np.uint32)
    signs = rng.integers(0, 2, (n, n), np.uint32) << 31
    return ((bits & np.uint32(0xFFFE0000)) + rng.choice(ends, (n, n)) | signs).view(np.float32)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_factors_are_rounded_to_nearest(rng, precision):
    x = _awkward(rng, 24)
    for out in _identity_products(simt_backend(), precision, x):
        assert_same_bits(out, ROUND[precision](x))


def test_the_roundings_are_what_they_are_called(rng):
    x = np.append(_awkward(rng, 40).ravel(), [3.4028235e38, -0.0, 0.0, np.inf, -np.inf, np.nan]).astype(np.float32)
    finite = np.isfinite(x) & (x != 0)
    unit = 2.0 ** (np.frexp(x[finite].astype(np.float64))[1] - 11)
    quotient = x[finite].astype(np.float64) / unit
    away = np.trunc(quotient + np.copysign(0.5, quotient)) * unit
    with np.errstate(over="ignore"):
        assert_same_bits(ROUND["tf32"](x)[finite], away.astype(np.float32))
    assert_close(ROUND["tf32"](x)[~finite], x[~finite], 0.0)
    torch = pytest.importorskip("torch")
    assert_close(ROUND["bf16"](x), torch.tensor(x).bfloat16().float(), 0.0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nan_and_infinity_stay_in_their_rows_and_columns(rng, precision):
    """Also a NaN whose payload a rounding would carry into its sign: 0x7fffffff is what a GPU makes."""
    x, w = (rng.normal(0, 1, (9, 9)).astype(np.float32) for _ in range(2))
    x[1, 2], x[3, 8], x[5, 0] = np.array([0x7FFFFFFF, 0x7FC00000, 0x7F800000], np.uint32).view(np.float32)
    w[4, 7] = -np.inf
    device = simt_backend().device
    out, dx, dbias = np.empty((9, 9), np.float32), np.empty((9, 9), np.float32), np.empty(9, np.float32)
    Gemm(device, precision).forward(x, w, out)
    expected, bound, _ = gemm_cases.product(x, w, precision, True)
    assert_close(out, expected, 1.0, magnitude=bound)
    Gemm(device, precision).input_gradient(x[:5].copy(), w, dx[:5], bias_grad=dbias)
    expected, _, _ = gemm_cases.product(x[:5], w.T, precision, True)
    assert_close(dbias, expected.sum(0), 1e-5, magnitude=9.0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_beyond_the_batch_are_not_added_to_the_bias_gradient(rng, precision):
    """They are zeros in the tile, and a zero times an infinite or undefined weight is NaN."""
    w, gemm = rng.normal(0, 1, (9, 6)).astype(np.float32), Gemm(simt_backend().device, precision)
    w[3, 2], dx, dbias = np.inf, np.empty((5, 9), np.float32), np.full(9, np.nan, np.float32)
    gemm.input_gradient(np.ones((5, 6), np.float32), w, dx, bias_grad=dbias)
    assert dbias[3] == np.inf and np.isfinite(np.delete(dbias, 3)).all()
    w[3, 2] = np.nan
    gemm.input_gradient(np.ones((0, 6), np.float32), w, dx[:0], bias_grad=dbias)
    assert_same_bits(dbias, np.zeros(9, np.float32))


def test_what_the_layers_need_of_one_kernel_is_one_launch(rng):
    """z serves the backward pass as saved, with the bias again."""
    device = simt_backend().device
    x, w, bias = (rng.normal(0, 1, s).astype(np.float32) for s in ((6, 5), (5, 7), 7))
    y, z, dx, dz = (np.empty(s, np.float32) for s in ((6, 7), (6, 7), (6, 7), (6, 3)))
    gemm = Gemm(device, "tf32")
    gemm.forward(x, w, y, bias=bias, activation="gelu", z=z)
    dz[...], above = 1.0, rng.normal(0, 1, (7, 3)).astype(np.float32)
    device.launched.clear()
    gemm.input_gradient(dz, above, dx, saved=z, activation="gelu", bias=bias)
    assert device.launched == {"gemm_input_gradient_tf32_64"}
    checks = gemm_cases.input_gradient_checks(dz, above, z + bias, "gelu", dx, None, "tf32", True)
    for check in checks:
        check.verify()


@pytest.mark.parametrize("flavour", FLAVOURS, ids=lambda f: f"{f[0]}-seed-{f[1]}-{f[2]:02x}")
def test_right_and_clean_and_the_same_bits(flavour, every_case):
    listed = gemm_cases.few()
    if flavour[0] == "thread" and not every_case:
        listed = [listed[k] for k in (0, 3, 5, 7, 8, 10)]  # each form in both precisions, one with each size of tile
    backend = simt_backend(*flavour)
    bits = _bits(backend, listed)
    backend.device.runner.close()
    assert [c for c in bits if bits[c] != _first()[c]] == []


def _cuda() -> Backend:
    import cupy

    return Backend("cuda", cupy, None, device=cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("c", gemm_cases.products(), ids=str)
def test_gpu_cases(c):
    for check in c.run(_cuda()):
        check.verify()


def _layer_products(gemm, backend, rng, B, K, N):
    """By form: a function that writes the product of a layer into an array, its shape, and the factors."""
    x, w, dz = (rng.normal(0, 1, s).astype(np.float32) for s in ((B, K), (K, N), (B, N)))
    gx, gw, gdz = (backend.array(a) for a in (x, w, dz))
    yield lambda out: gemm.forward(gx, gw, out), (B, N), (x, w)
    yield lambda out: gemm.input_gradient(gdz, gw, out), (B, K), (dz, w.T)
    yield lambda out: gemm.weight_gradient(gx, gdz, out), (K, N), (x.T, dz)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("B", [395, 512, 16384])
@pytest.mark.parametrize("layer", LAYERS, ids="{0[0]}-{0[1]}".format)
def test_gpu_layers(rng, precision, B, layer):
    """With the device's own launch shapes: right, twice the same bits, and close to CuPy's product."""
    backend = _cuda()
    for call, shape, factors in _layer_products(Gemm(cuda, precision), backend, rng, B, *layer):
        outs = [backend.outputs(*shape)[0] for _ in range(2)]
        for out in outs:
            call(out)
        assert_same_bits(*outs)
        expected, bound, unrounded = gemm_cases.product(*factors, precision, False)
        assert_close(outs[0], expected, 1.0, magnitude=bound)
        a, b = (backend.xp.asarray(np.ascontiguousarray(f)) for f in factors)
        size = np.abs(factors[0]) @ np.abs(factors[1])
        assert_close(outs[0], backend.xp.matmul(a, b), 1.0, magnitude=unrounded + len(factors[1]) * EPS * size)
