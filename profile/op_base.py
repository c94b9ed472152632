"""What the timed ops share: arrays, the same memory as torch tensors, and activation formulas for CuPy and torch."""

import functools
import math

import measure  # noqa: F401 (first: it puts the repository on the path)
import numpy as np


BLOCK, STRIDE = 2**20 + 7, 611_953  # numbers; without a common factor


class Op:
    """name; bytes_per_row that must be moved; dtype as it is reported; mutable: arrays that an op changes in place;
    outputs: arrays that it writes; integers: those that torch wants as int64; tolerance: of max |error| /
    max |reference|, larger where a naive sum over many rows is a fair way to compute the op."""

    dtype, mutable, outputs, integers, tolerance = "float32", (), (), (), 1e-5

    def __init__(self, xp, rng, torch=None):
        self.xp, self.rng, self.torch = xp, rng, torch
        self.drawn = 0

    @functools.cached_property
    def block(self):
        return self.rng.standard_normal(BLOCK, dtype=np.float32)

    def normal(self, *shape):
        """Normal numbers out of one block of them, over and over from another place for every array: drawing new ones
        takes longer than measuring."""
        array = self.xp.empty(shape, np.float32)
        flat, self.drawn = array.reshape(-1), self.drawn + 1
        for start in range(-(self.drawn * STRIDE % BLOCK), flat.size, BLOCK):
            part = flat[max(start, 0) : max(start + BLOCK, 0)]
            first = max(-start, 0)
            part[...] = self.block[first : first + part.size]
        return array

    def below(self, n, dtype, *shape):
        """Uniform whole numbers in [0, n)."""
        return (self.rng.random(shape, dtype=np.float32) * n).astype(dtype)

    def rows(self, size: int) -> int:
        """How many rows move about `size` bytes."""
        return max(1, size // self.bytes_per_row)

    def shape(self, rows: int) -> str:
        return f"{rows}x{self.columns}"

    def tensors(self, arrays: dict) -> dict:
        """The same memory as torch tensors, but for the integers."""
        convert = self.torch.from_numpy if self.xp is np else self.torch.from_dlpack
        views = {name: convert(array) for name, array in arrays.items()}
        return views | {name: views[name].long() for name in self.integers}

    @functools.cached_property
    def compiled(self):
        """torch.compile of the op's formula."""
        return self.torch.compile(self.torch_formula)

    @functools.cached_property
    def fused_by_cupy(self):
        return self.xp.fuse()(self.cupy_formula)


class Math:
    """What the formulas below need, in CuPy or torch."""

    def __init__(self, module, relu, erf):
        self.exp, self.relu, self.erf = module.exp, relu, erf

    @classmethod
    def cupy(cls, xp):
        from cupyx.scipy.special import erf

        return cls(xp, lambda u: xp.maximum(u, 0), erf)

    @classmethod
    def torch(cls, torch):
        return cls(torch, torch.relu, torch.erf)

    def activate(self, activation, u):
        if activation == "relu":
            return self.relu(u)
        return u / (1 + self.exp(-u)) if activation == "silu" else u * self._normal_cdf(u)

    def slope(self, activation, u):
        if activation == "relu":
            return u > 0
        if activation == "silu":
            s = 1 / (1 + self.exp(-u))
            return s * (1 + u * (1 - s))
        return self._normal_cdf(u) + u * self.exp(-0.5 * u * u) * (1 / math.sqrt(2 * math.pi))

    def _normal_cdf(self, u):
        return 0.5 * (1 + self.erf(u * math.sqrt(0.5)))
