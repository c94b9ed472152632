"""The network: parameters and gradients in one arena each, forward and backward."""

from itertools import pairwise

import numpy as np

ALIGNMENT = 16  # bytes: every parameter starts on a boundary that a 16-byte access needs


def arena(shapes, xp, dtype):
    """One flat array of zeros and a view into it per shape, each starting on ALIGNMENT bytes."""
    itemsize = np.dtype(dtype).itemsize
    step = ALIGNMENT // itemsize
    sizes = [-(-int(np.prod(shape)) // step) * step for shape in shapes]
    flat = _aligned_zeros(sum(sizes), xp, dtype)
    starts = np.cumsum([0, *sizes])
    views = [flat[start : start + int(np.prod(shape))].reshape(shape) for start, shape in zip(starts, shapes)]
    return flat, views


def _aligned_zeros(count, xp, dtype):
    if xp is not np:
        return xp.zeros(count, dtype)  # CuPy allocates on 512 bytes
    line = 64  # a cache line, which is also the widest SIMD register
    raw = np.zeros(count * np.dtype(dtype).itemsize + line, np.uint8)
    offset = -raw.ctypes.data % line
    return raw[offset : offset + count * np.dtype(dtype).itemsize].view(dtype)


class MLP:
    """Linear layers with an activation between them, on `xp` arrays, computed by `ops`.

    sizes: widths from the input to the classes. rows: the largest batch. Weights are (in, out), He-initialised
    (He et al. 2015: normal, std sqrt(2 / in)) from `seed` by NumPy, so they are the same on every device.
    parameters, gradients: flat arenas; weights, biases and weight_grads, bias_grads are views into them.
    """

    def __init__(self, sizes, activation, *, rows, xp=np, ops, seed=0, dtype=np.float32):
        self.sizes, self.activation, self.xp, self.ops = tuple(sizes), activation, xp, ops
        layers = list(pairwise(sizes))
        shapes = [shape for n_in, n_out in layers for shape in ((n_in, n_out), (n_out,))]
        self.parameters, views = arena(shapes, xp, dtype)
        self.weights, self.biases = views[::2], views[1::2]
        self.gradients, views = arena(shapes, xp, dtype)
        self.weight_grads, self.bias_grads = views[::2], views[1::2]
        rng = np.random.default_rng(seed)
        for weight, (n_in, n_out) in zip(self.weights, layers):
            weight[...] = xp.asarray((rng.standard_normal((n_in, n_out)) * np.sqrt(2.0 / n_in)).astype(dtype))
        # For these the output tells the sign of the pre-activation, so it may overwrite it.
        self._in_place = activation in ("relu", "leaky_relu")
        self._z = [xp.empty((rows, n), dtype) for n in sizes[1:]]
        self._y = self._z[:-1] if self._in_place else [xp.empty((rows, n), dtype) for n in sizes[1:-1]]
        self._dy = [xp.empty((rows, n), dtype) for n in sizes[1:-1]]

    @property
    def parameter_count(self) -> int:
        return sum(w.size + b.size for w, b in zip(self.weights, self.biases))

    def forward(self, x):
        """x (B, sizes[0]) -> logits (B, sizes[-1]), valid until the next call."""
        for weight, bias, z, y in zip(self.weights, self.biases, self._z, self._y):
            z, y = z[: len(x)], y[: len(x)]
            self.xp.matmul(x, weight, out=z)
            x = self.ops.bias_act(z, bias, self.activation, out=y)
        logits = self._z[-1][: len(x)]
        self.xp.matmul(x, self.weights[-1], out=logits)
        return self.ops.bias_act(logits, self.biases[-1], "identity", out=logits)

    def backward(self, x, dlogits):
        """Write the gradients for the batch x of the last forward(); dlogits (B, classes) is left unchanged."""
        rows, matmul, dz = len(x), self.xp.matmul, dlogits
        self.ops.bias_act_backward(dz, dz, "identity", out=dz, bias_grad=self.bias_grads[-1])
        for layer in reversed(range(1, len(self.weights))):
            matmul(self._y[layer - 1][:rows].T, dz, out=self.weight_grads[layer])
            dy = self._dy[layer - 1][:rows]
            matmul(dz, self.weights[layer].T, out=dy)
            dz, _ = self.ops.bias_act_backward(
                dy, self._z[layer - 1][:rows], self.activation, out=dy, bias_grad=self.bias_grads[layer - 1],
                bias=None if self._in_place else self.biases[layer - 1],
            )  # fmt: skip
        matmul(x.T, dz, out=self.weight_grads[0])
