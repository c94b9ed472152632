"""The products of a layer on tensor cores, each in one launch with its bias, activation or bias gradient: see
src/gemm.cuh.

The launch shapes are pure functions of the product's size and the number of multiprocessors, so the same GPU always
adds in the same order.
"""

import functools
from typing import NamedTuple

import numpy as np

from . import BackendError
from .arguments import ACTIVATIONS, FLOAT32, check, check_activation, check_output, is_cupy, kind
from .launches import THREADS, _divide_up, _pointer

PRECISIONS = ("tf32", "bf16")
COLUMNS, SMALL, LARGE = 64, 64, 128  # of a tile; its rows: the same numbers as in src/gemm.cuh and src/module.cu
DEPTH = 32  # what blocks that share a tile divide K by
SHARED_BYTES = 96 * 1024  # of a block; the same number as in src/gemm_product.cuh
MEETING, PART = 3, 1  # what it costs that blocks meet, and each of them, in DEPTHs of K (H100: 1.6, 0.5 and 0.5 us)
CAPABILITY = 80  # the first with these instructions


class Shape(NamedTuple):
    """A launch: tiles of `rows` x COLUMNS, and `splits` blocks for each, with `depth` of K each."""

    rows: int
    row_tiles: int
    column_tiles: int
    splits: int
    depth: int

    @property
    def tiles(self) -> int:
        return self.row_tiles * self.column_tiles


@functools.lru_cache(1024)
def gemm_shape(M: int, N: int, K: int, multiprocessors: int) -> Shape:
    """How C (M, N) = A (M, K) B (K, N) is divided.

    Large tiles, which need fewer bytes for an operation, where there are two for each multiprocessor. Else small ones;
    and where there are fewer than multiprocessors, s blocks for each, as long as none has to wait for a place. Each
    block has K / s of K, and where s > 1 the last one waits for the others and adds their parts: in units of DEPTH
    together K / DEPTH / s, or K / DEPTH / s + MEETING + PART * s, which is to be least.
    """
    column_tiles = max(1, _divide_up(N, COLUMNS))
    large, small = (max(1, _divide_up(M, rows)) for rows in (LARGE, SMALL))
    steps = max(1, _divide_up(K, DEPTH))
    if large * column_tiles >= 2 * multiprocessors:
        return Shape(LARGE, large, column_tiles, 1, steps * DEPTH)
    most = max(1, min(multiprocessors // (small * column_tiles), steps))
    splits = min(range(1, most + 1), key=lambda s: _divide_up(steps, s) + (MEETING + PART * s if s > 1 else 0))
    depth = _divide_up(steps, splits)
    return Shape(SMALL, small, column_tiles, _divide_up(steps, depth), depth * DEPTH)


def _span(array) -> tuple[int, int]:
    """The addresses that an array covers."""
    start = array.data.ptr if is_cupy(array) else array.__array_interface__["data"][0]
    return start, start + array.nbytes


def _check_apart(outputs: dict, inputs: dict) -> None:
    """Raise where an output shares memory with an input or another output: other blocks still read or write it."""
    seen = {name: _span(a) for name, a in inputs.items() if a is not None}
    for name, array in outputs.items():
        if array is None:
            continue
        first, end = _span(array)
        for other, (start, stop) in seen.items():
            if first < stop and start < end:
                raise ValueError(f"{name} must not share memory with {other}; pass an array of its own")
        seen[name] = first, end


class Gemm:
    """Products of float32 matrices, C-contiguous and of any size, on a device: kernels.cuda, for CuPy arrays, or a
    simt.Device. What launches.py asks of a device and `compute_capability()`, 80 or more, is all that is needed.

    precision: "tf32" or "bf16", to which the factors are rounded (to nearest, ties away from zero, or to even); sums
    are in float32. Results do not depend on the order in which blocks run. A wrong kind or dtype raises TypeError, a
    wrong shape, layout or overlap ValueError; a GPU without the instructions raises BackendError.
    """

    def __init__(self, device, precision: str):
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        capability = device.compute_capability()
        if capability < CAPABILITY:
            raise BackendError(
                f"products on tensor cores need compute capability {CAPABILITY / 10} or newer, and this GPU has "
                f"{capability / 10}; use float32"
            )
        self._device, self.precision = device, precision

    def forward(self, x, w, out, *, bias=None, activation="identity", z=None):
        """out = act(x w + bias): x (B, K), w (K, N), bias (N,) -> out (B, N); into z (B, N) also x w, without the
        bias. Returns out."""
        B, K = self._check_first("x", x)
        check("w", w, x, FLOAT32, K, None)
        N = w.shape[1]
        check_activation(activation)
        if bias is not None:
            check("bias", bias, x, FLOAT32, N)
        check_output("out", out, x, FLOAT32, B, N)
        if z is not None:
            check_output("z", z, x, FLOAT32, B, N)
        _check_apart({"out": out, "z": z}, {"x": x, "w": w, "bias": bias})
        self._launch("forward", B, N, K, (x, w, _pointer(bias), out, _pointer(z)), activation)
        return out

    def input_gradient(self, dz, w, out, *, saved=None, activation="identity", bias=None, bias_grad=None):
        """out = (dz w^T) act'(u), bias_grad = out.sum(0): dz (B, N), w (K, N) -> out (B, K), bias_grad (K,).

        These are the gradients of the layer below, whose output was act(u). saved (B, K) is u, or u - bias where
        bias (K,) is given too; for relu, leaky_relu and identity the output act(u) serves as well. Without saved,
        activation must be identity. Returns out.
        """
        B, N = self._check_first("dz", dz)
        check("w", w, dz, FLOAT32, None, N)
        K = w.shape[0]
        check_activation(activation)
        if saved is not None:
            check("saved", saved, dz, FLOAT32, B, K)
        elif activation != "identity":
            raise ValueError(f"saved must be an array of shape {(B, K)} where activation is {activation}, got None")
        if bias is not None:
            check("bias", bias, dz, FLOAT32, K)
        check_output("out", out, dz, FLOAT32, B, K)
        if bias_grad is not None:
            check_output("bias_grad", bias_grad, dz, FLOAT32, K)
        _check_apart({"out": out, "bias_grad": bias_grad}, {"dz": dz, "w": w, "saved": saved, "bias": bias})
        if activation == "identity":
            saved = None  # the slope is 1
        arrays = dz, w, _pointer(saved), _pointer(bias), out, _pointer(bias_grad)
        self._launch("input_gradient", B, K, N, arrays, activation, sums=bias_grad is not None)
        return out

    def weight_gradient(self, x, dz, out):
        """out = x^T dz: x (B, K), dz (B, N) -> out (K, N). Returns out."""
        B, K = self._check_first("x", x)
        check("dz", dz, x, FLOAT32, B, None)
        N = dz.shape[1]
        check_output("out", out, x, FLOAT32, K, N)
        _check_apart({"out": out}, {"x": x, "dz": dz})
        self._launch("weight_gradient", K, N, B, (x, dz, out))
        return out

    def _check_first(self, name, array) -> tuple[int, int]:
        """The shape of the argument that the others are compared with."""
        if not self._device.is_array(array):
            raise TypeError(f"{name} must be an array of the device, got {kind(array)}")
        if is_cupy(array):
            self._device.check_device(name, array)
        check(name, array, array, FLOAT32, None, None)
        return array.shape

    def _launch(self, form, M, N, K, arrays, activation=None, sums=False):
        """C (M, N) = A (M, K) B (K, N); sums: whether those of the columns are wanted. Every form's parameters are its
        arrays, scratch memory, sizes, and where it has one the activation."""
        if N == 0:
            return  # nothing to write
        device = self._device
        shape = gemm_shape(M, N, K, device.multiprocessors())
        scratch = [np.uintp(0), device.counters(shape.column_tiles + shape.tiles * (shape.splits > 1))]
        if shape.splits > 1:
            scratch[0] = device.empty((shape.tiles * shape.splits, shape.rows * COLUMNS))
        if form == "input_gradient":
            scratch.insert(0, device.empty((shape.row_tiles, N)) if sums and shape.row_tiles > 1 else np.uintp(0))
        sizes = np.int64(M), np.int64(N), np.int64(K), np.int64(shape.depth)
        chosen = () if activation is None else (np.int32(ACTIVATIONS.index(activation)),)
        function = device.function(f"gemm_{form}_{self.precision}_{shape.rows}", SHARED_BYTES)
        function((shape.tiles, shape.splits), (THREADS,), (*arrays, *scratch, *sizes, *chosen))
