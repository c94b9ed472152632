"""to_bfloat16 against a comparison of distances in float64, and against torch's conversion."""

import itertools

import numpy as np
import pytest

import kernels

from .checks import OFFSETS, assert_same_bits, to_numpy
from .references import bfloat16

# Beside a number of 16 bits: exact, just above it, just below the tie, the tie, just above it, just below the next.
BELOW = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)


def _every_bfloat16(step=1):
    """float32 arrays of all signs, exponents and upper fractions, with what is beyond them around the ties."""
    return (np.arange(0, 2**16, step, np.uint32)[:, None] << 16 | BELOW).view(np.float32)


def _assert_equals_torch(result, x):
    """The same bits; of NaN, that it is a quiet NaN of its own sign: torch's have other bits."""
    torch = pytest.importorskip("torch")
    expected = torch.tensor(x).to(torch.bfloat16).view(torch.uint16).numpy()
    result, nan = to_numpy(result), np.isnan(x)
    assert_same_bits(result[~nan], expected[~nan])
    assert bool((result[nan] & 0x7FC0 == 0x7FC0).all())
    assert_same_bits(result[nan] >> 15, (x.view(np.uint32)[nan] >> 31).astype(np.uint16))


@pytest.mark.parametrize(("offset", "out_offset"), list(itertools.product(OFFSETS, (*OFFSETS, 4))))
def test_every_exponent_and_every_tie(form, offset, out_offset):
    x = _every_bfloat16(step=61 if form.name == "simt" else 1)
    y, intact = form.outputs(*x.shape, dtype=np.uint16, offset=out_offset)
    assert form.ops.to_bfloat16(form.array(x, offset=offset), out=y) is y
    intact()
    assert_same_bits(y, bfloat16(x))
    _assert_equals_torch(y, x)


def test_any_bits(backend, rng):
    """Enough for the CPU to share among threads."""
    x = rng.integers(0, 2**32, 2_500_003, np.uint32).view(np.float32)
    y = backend.ops.to_bfloat16(backend.array(x))
    assert y.dtype == np.uint16
    assert_same_bits(y, bfloat16(x))
    _assert_equals_torch(y, x)


@pytest.mark.parametrize("value, bits", [
    (0.0, 0x0000), (-0.0, 0x8000), (1.0, 0x3F80), (np.inf, 0x7F80), (-np.inf, 0xFF80), (np.nan, 0x7FC0),
    (-np.nan, 0xFFC0), (3.3895314e38, 0x7F7F), (3.4028235e38, 0x7F80), (-3.4028235e38, 0xFF80), (1.00390625, 0x3F80),
    (1.01171875, 0x3F82), (1e-45, 0x0000), (9.2e-41, 0x0001), (-9.2e-41, 0x8001), (1.1754944e-38, 0x0080),
])  # fmt: skip
def test_special_values(form, value, bits):
    """The largest number and the ones beyond it, ties to even, and denormals."""
    assert to_numpy(form.ops.to_bfloat16(form.array([value]))).tolist() == [bits]


def test_bfloat16_numbers_stay_what_they_are(form):
    x = np.arange(0, 2**16, 61, np.uint32) << 16
    numbers = ~np.isnan(x.view(np.float32))
    assert_same_bits(to_numpy(form.ops.to_bfloat16(form.array(x.view(np.float32))))[numbers],
                     (x[numbers] >> 16).astype(np.uint16))  # fmt: skip


def test_any_shape(form, rng):
    for shape in ((), (0,), (1,), (3, 5), (2, 0, 3), (2, 3, 5, 7), (1, 1, 4)):
        x = rng.normal(0, 1, shape).astype(np.float32)
        y = form.ops.to_bfloat16(form.array(x))
        assert y.shape == shape and y.dtype == np.uint16
        assert_same_bits(y, bfloat16(x.reshape(-1)).reshape(shape))


def test_torch_reads_the_result_as_bfloat16(rng):
    torch = pytest.importorskip("torch")
    x = torch.tensor(rng.normal(0, 1, (33, 47)).astype(np.float32))
    y = kernels.to_bfloat16(x)
    assert y.dtype == torch.uint16 and y.shape == x.shape
    assert torch.equal(y.view(torch.bfloat16), x.to(torch.bfloat16))
    out = torch.empty(33, 47, dtype=torch.bfloat16)
    assert kernels.to_bfloat16(x, out=out.view(torch.uint16)).data_ptr() == out.data_ptr()
    assert torch.equal(out, x.to(torch.bfloat16))
