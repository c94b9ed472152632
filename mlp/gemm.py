"""The three matrix products of a linear layer, behind one seam: what computes them can change, and no caller does.

All arrays are row-major and C-contiguous; B rows, K inputs, N outputs:

    forward          x (B, K), weight (K, N)   ->  out (B, N) = x @ weight
    input_gradient   dz (B, N), weight (K, N)  ->  out (B, K) = dz @ weight.T
    weight_gradient  x (B, K), dz (B, N)       ->  out (K, N) = x.T @ dz

Whatever has these methods serves, with `captures`: whether its calls may be captured into a CUDA graph. Here is what
the array modules offer; cublaslt.py has the one for captures.
"""

from contextlib import contextmanager

import numpy as np

from . import InputError, blas
from .configs import PRECISIONS


def check_precision(precision: str) -> None:
    """Raise ValueError for a name that is not in PRECISIONS."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


class ArrayGemm:
    """The products by `xp.matmul`, xp being NumPy (see blas.py) or CuPy, for any floating dtype.

    precision: "fp32", as xp multiplies by itself (CuPy in TF32 if its user has asked it to); or "tf32", for CuPy only,
    which rounds the factors of float32 products to TF32. together: see blas.multiply. InputError where xp or the GPU has no such products.
    """

    captures = False  # CuPy refuses cuBLAS on a stream that captures

    def __init__(self, xp, precision="fp32", together=None):
        check_precision(precision)
        if precision == "bf16":
            raise InputError("bf16 products need a GPU and cuBLASLt; run `pip install nvmath-python`, or take fp32")
        if precision == "tf32" and xp is np:
            raise InputError("tf32 products need a GPU, and NumPy multiplies on the CPU; take fp32")
        self._xp, self._linalg, self._together = xp, None, together
        if precision == "tf32":
            from cupy._core import _routines_linalg

            self._linalg = _routines_linalg
            with self._tf32() as possible:
                if not possible:
                    raise InputError("tf32 products need a GPU of compute capability 8.0 or more; take fp32")

    def forward(self, x, weight, out):
        """out (B, N) = x (B, K) @ weight (K, N)."""
        self._multiply(x, weight, out)

    def input_gradient(self, dz, weight, out):
        """out (B, K) = dz (B, N) @ weight.T, weight (K, N)."""
        self._multiply(dz, weight.T, out)

    def weight_gradient(self, x, dz, out):
        """out (K, N) = x.T @ dz, x (B, K), dz (B, N)."""
        self._multiply(x.T, dz, out)

    def _multiply(self, a, b, out):
        if self._xp is np:
            blas.multiply(a, b, out, self._together)
        elif self._linalg is None:
            self._xp.matmul(a, b, out=out)
        else:
            with self._tf32():
                self._xp.matmul(a, b, out=out)

    @contextmanager
    def _tf32(self):
        """CuPy's products in TF32, and whether they are. Around each call and not once and for all, because it is a
        setting of the whole process, where others may want theirs in fp32."""
        linalg, float32 = self._linalg, np.dtype(np.float32)
        before = linalg.get_compute_type(float32)
        linalg.set_compute_type(float32, linalg.COMPUTE_TYPE_TF32)
        try:
            yield linalg.get_compute_type(float32) == linalg.COMPUTE_TYPE_TF32
        finally:
            linalg.set_compute_type(float32, before)
