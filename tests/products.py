"""What the tests of the matrix products share: data, tolerances, and where they run, a stand-in and a GPU."""

import numpy as np
import pytest

from mlp import InputError
from mlp.cublaslt import CublasLt, Unsupported
from mlp.gemm import PRECISIONS

from . import fake_nvmath, stand_in_gpu
from .checks import EPS, REDUCTION, Backend, assert_close
from .column_major import from_bfloat16, to_bfloat16

SIZES = [(395, 784, 400), (5, 33, 47), (1, 1, 1)]  # B, K, N
# Of the sum of absolute products: TF32 keeps 10 bits of each factor, at worst truncated; the sums of bfloat16
# products, which are exact, may lose a rounding per term.
TOLERANCE = {"fp32": REDUCTION, "tf32": 2.0**-9, "bf16": 784 * EPS}
SMALL_WORKSPACE = 4096

every_precision = pytest.mark.parametrize("precision", PRECISIONS)
every_size = pytest.mark.parametrize("sizes", SIZES)


@pytest.fixture(name="library")
def library_fixture(monkeypatch):
    """The stand-in for nvmath.bindings.cublasLt; library.gpu has the one for CuPy."""
    cupy = stand_in_gpu.install(monkeypatch)
    library = fake_nvmath.install(monkeypatch, cupy)
    library.gpu = Backend("stand-in", cupy, None)
    return library


@pytest.fixture(name="gpu", params=["stand-in", pytest.param("cuda", marks=pytest.mark.gpu)])
def gpu_fixture(request):
    """The stand-ins, and a GPU with nvmath-python."""
    if request.param == "stand-in":
        return request.getfixturevalue("library").gpu
    pytest.importorskip("nvmath.bindings.cublasLt")
    import cupy

    return Backend("cuda", cupy, None)


@pytest.fixture(name="products")
def products_fixture(gpu):
    """products(precision): a CublasLt that is closed after the test, or what the GPU lacks as a reason to skip."""
    made = []

    def make(precision):
        try:
            made.append(CublasLt(precision, SMALL_WORKSPACE if gpu.name == "stand-in" else 2**25))
        except InputError as error:
            assert gpu.name == "cuda", error
            pytest.skip(str(error))
        return made[-1]

    yield make
    for one in made:
        one.close()


def offered(gpu, call, *args):
    """Do call(*args), or skip with the reason if this GPU's cuBLASLt has no algorithm for it."""
    try:
        call(*args)
    except Unsupported as error:
        assert gpu.name == "cuda", error
        pytest.skip(str(error))


def mask_output(gpu, rows, columns):
    """An output for a mask, full of something, and a check that nothing beside it was written."""
    rows, size = CublasLt.mask_shape(rows, columns)
    words, assert_surroundings_intact = gpu.outputs(rows, size // 4, dtype=np.int32)
    return words.view(np.uint8), assert_surroundings_intact


class Data:
    """Arrays by shape on the device, and the values in them in float64."""

    def __init__(self, backend, precision, rng):
        self._backend, self._bf16, self._rng = backend, precision == "bf16", rng

    def factor(self, *shape, offset=0):
        values = self._rng.standard_normal(shape, np.float32)
        if self._bf16:
            values = to_bfloat16(values)
        array = self._backend.array(values, values.dtype, offset)
        return array, (from_bfloat16(values) if self._bf16 else values).astype(np.float64)

    def vector(self, size):
        values = self._rng.standard_normal(size, np.float32)
        return self._backend.array(values), values.astype(np.float64)


def check_products(backend, gemm, precision, sizes, rng, offset=0):
    """The three products, into arrays whose surroundings are guarded."""
    (B, K, N), data = sizes, Data(backend, precision, rng)
    (x, x64), (dz, dz64), (weight, weight64) = (data.factor(*s, offset=offset) for s in ((B, K), (B, N), (K, N)))
    for method, left, right, left64, right64 in (
        (gemm.forward, x, weight, x64, weight64),
        (gemm.input_gradient, dz, weight, dz64, weight64.T),
        (gemm.weight_gradient, x, dz, x64.T, dz64),
    ):
        out, assert_surroundings_intact = backend.outputs(len(left64), right64.shape[1], offset=offset)
        method(left, right, out)
        magnitude = np.abs(left64) @ np.abs(right64)
        assert_close(out, left64 @ right64, TOLERANCE[precision], magnitude=magnitude)
        assert_surroundings_intact()
