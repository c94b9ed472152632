"""What the kernel tests share: shapes that trip kernels, back ends, and a comparison that NaN cannot pass.

Tolerances are multiples of EPS, the largest relative error of one float32 rounding. The error of a sum of
n terms grows like sqrt(n) EPS times the sum of their absolute values where the roundings are independent,
and at worst like n EPS; every op adds through shorter partial sums, so 1e-5 holds for all shapes here.
"""

import math
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np

WIDTHS = (1, 2, 3, 31, 32, 33, 47, 48, 127, 400, 1023)  # around the warp, the pack of 4 and the tile of 128
ROWS = (0, 1, 2, 511, 512, 513)
SHAPES = [(B, N) for B in ROWS for N in WIDTHS]
FEW_SHAPES = [
    (0, 1), (0, 47), (1, 1), (1, 400), (2, 3), (3, 1023), (9, 1), (9, 127), (17, 48), (33, 31), (33, 33), (65, 32), (513, 2)
]  # fmt: skip
OFFSETS = (0, 1)  # elements past an aligned address: 1 rules out 16-byte accesses

EPS = 2.0**-24
ELEMENTWISE = 1e-6  # about 16 roundings: a formula with an exponential, and no reduction
REDUCTION = 1e-5

_PAD, _SENTINEL = 64, 12345  # elements beside an output, and what they hold


def one_misaligned(count: int) -> list[tuple]:
    """Offsets for `count` arrays, one of which rules out 16-byte accesses: it starts on 4 or on 8 bytes."""
    return [tuple(past if k == array else 0 for k in range(count)) for array in range(count) for past in (1, 2)]


def to_numpy(array) -> np.ndarray:
    """A NumPy array of the values of a NumPy, CuPy or torch array or a number."""
    if hasattr(array, "get"):
        return array.get()
    return array.cpu().numpy() if hasattr(array, "cpu") else np.asarray(array)


def _compared(actual, reference, magnitude):
    """Both and the magnitude in float64, and where both are the same value: NaN and infinities included."""
    actual, reference = (to_numpy(x).astype(np.float64) for x in (actual, reference))
    assert actual.shape == reference.shape, f"shape {actual.shape} instead of {reference.shape}"
    magnitude = (
        np.abs(reference) if magnitude is None else np.broadcast_to(to_numpy(magnitude), reference.shape)
    )
    return actual, reference, magnitude, (actual == reference) | (np.isnan(actual) & np.isnan(reference))


def assert_close(actual, reference, rtol, atol=0.0, magnitude=None):
    """|actual - reference| <= rtol * magnitude + atol everywhere; magnitude defaults to |reference|.

    NaN is expected exactly where the reference has it; an infinity must be the same infinity; where the
    bound is not finite nothing but equality will do.
    """
    actual, reference, magnitude, same = _compared(actual, reference, magnitude)
    with np.errstate(invalid="ignore", over="ignore"):
        error, bound = np.abs(actual - reference), rtol * magnitude + atol
        good = same | (np.isfinite(reference) & np.isfinite(bound) & (error <= bound))
    if not good.all():
        with np.errstate(all="ignore"):
            excess = np.where(good, -1.0, np.nan_to_num(error / bound, nan=np.inf))
        worst = np.unravel_index(np.argmax(excess), excess.shape)
        raise AssertionError(
            f"{np.count_nonzero(~good)} of {good.size} values differ; worst at {tuple(map(int, worst))}: "
            f"{actual[worst]!r} instead of {reference[worst]!r}, allowed {bound[worst]:.3g}"
        )


def max_error(actual, reference, magnitude=None) -> float:
    """The largest |actual - reference| / magnitude; infinity where nothing but equality would do."""
    actual, reference, magnitude, same = _compared(actual, reference, magnitude)
    finite = np.isfinite(actual) & np.isfinite(reference) & np.isfinite(magnitude)
    with np.errstate(all="ignore"):
        error = np.where(finite, np.abs(actual - reference) / magnitude, np.inf)
    return float(np.where(same, 0.0, error).max(initial=0.0))


@dataclass(frozen=True)
class Check:
    """A result and what it must be: |actual - reference| <= tolerance * magnitude, as in assert_close."""

    what: str
    actual: object
    reference: np.ndarray
    tolerance: float
    magnitude: object = None

    def error(self) -> float:
        return max_error(self.actual, self.reference, self.magnitude)

    def share(self) -> float:
        """The error as a part of the tolerance: more than 1 is too much."""
        error = self.error()
        return error / self.tolerance if self.tolerance else math.inf if error else 0.0

    def verify(self) -> None:
        assert_close(self.actual, self.reference, self.tolerance, magnitude=self.magnitude)


def assert_same_bits(a, b):
    """Equal shapes, dtypes and bytes: 0 and -0 differ, and equal NaNs do not."""
    a, b = to_numpy(a), to_numpy(b)
    assert a.shape == b.shape and a.dtype == b.dtype, f"{a.dtype}{a.shape} instead of {b.dtype}{b.shape}"
    assert a.tobytes() == b.tobytes(), f"{np.count_nonzero(a != b)} of {a.size} values differ"


@dataclass(frozen=True)
class Backend:
    """Where a test runs: an array module, and the ops to be tested on its arrays."""

    name: str
    xp: ModuleType
    ops: object
    shapes: list = field(default_factory=lambda: SHAPES)  # the awkward ones; few where execution is slow
    device: object = None  # what launches.py asks for the number of multiprocessors; None: the host library
    padding: int = _PAD  # elements beside an output

    @property
    def smallest(self) -> float:
        """The smallest positive float32 that arithmetic keeps: CuPy compiles with -ftz=true."""
        info = np.finfo(np.float32)
        return float(info.smallest_subnormal if self.xp is np else info.tiny)

    def array(self, values, dtype=np.float32, offset=0):
        """A C-contiguous copy of `values`, starting `offset` elements past an aligned address."""
        values = np.asarray(values, dtype)
        flat = self.xp.empty(values.size + offset, dtype)[offset:]
        flat[...] = self.xp.asarray(values.ravel())
        return flat.reshape(values.shape)

    def outputs(self, *shape, dtype=np.float32, offset=0):
        """An output full of NaN (integers: -7, which wraps), and a check that nothing beside it was written."""
        size = int(np.prod(shape))
        begin = self.padding + offset
        buffer = self.xp.full(begin + size + self.padding, _SENTINEL, dtype)
        out = buffer[begin : begin + size]
        out[...] = np.nan if np.issubdtype(dtype, np.floating) else np.int64(-7).astype(dtype)
        before = to_numpy(buffer).copy()

        def assert_surroundings_intact():
            after = to_numpy(buffer)
            for part in (slice(0, begin), slice(begin + size, None)):
                assert_same_bits(after[part], before[part])

        return out.reshape(shape), assert_surroundings_intact
