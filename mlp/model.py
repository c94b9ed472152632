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


def initial_weights(sizes, seed, dtype=np.float32):
    """A weight (in, out) per layer, He-initialised (He et al. 2015: normal, std sqrt(2 / in)) by NumPy from `seed`,
    so that a model starts from the same values on every device and in torch. Biases start at 0."""
    rng = np.random.default_rng(seed)
    for n_in, n_out in pairwise(sizes):
        yield (rng.standard_normal((n_in, n_out)) * np.sqrt(2.0 / n_in)).astype(dtype)


class MLP:
    """Linear layers with an activation between them, on `xp` arrays, computed by `ops`.

    sizes: widths from the input to the classes. rows: the largest batch. seed: of the initial weights (in, out).
    parameters, gradients: flat arenas; weights, biases and weight_grads, bias_grads are views into them.
    """

    def __init__(self, sizes, activation, *, rows, xp=np, ops, seed=0, dtype=np.float32):
        self.sizes, self.activation, self.xp, self.ops = tuple(sizes), activation, xp, ops
        shapes = [shape for n_in, n_out in pairwise(sizes) for shape in ((n_in, n_out), (n_out,))]
        self.parameters, views = arena(shapes, xp, dtype)
        self.weights, self.biases = views[::2], views[1::2]
        self.gradients, views = arena(shapes, xp, dtype)
        self.weight_grads, self.bias_grads = views[::2], views[1::2]
        for weight, initial in zip(self.weights, initial_weights(sizes, seed, dtype)):
            weight[...] = xp.asarray(initial)
        self._activations = [activation] * (len(self.weights) - 1) + ["identity"]
        self._z = [xp.empty((rows, n), dtype) for n in sizes[1:]]
        # For these the output tells the sign of the pre-activation, so it may overwrite it.
        in_place = ("relu", "leaky_relu", "identity")
        self._y = [z if act in in_place else xp.empty_like(z) for act, z in zip(self._activations, self._z)]
        self._dy = [xp.empty((rows, n), dtype) for n in sizes[1:-1]]

    @property
    def parameter_count(self) -> int:
        return sum(w.size + b.size for w, b in zip(self.weights, self.biases))

    def forward(self, x):
        """x (B, sizes[0]) -> logits (B, sizes[-1]), valid until the next call."""
        for layer in range(len(self.weights)):
            x = self.forward_layer(layer, x)
        return x

    def forward_layer(self, layer, x):
        """x (B, sizes[layer]) -> the layer's output (B, sizes[layer + 1])."""
        z, y = self._z[layer][: len(x)], self._y[layer][: len(x)]
        self.xp.matmul(x, self.weights[layer], out=z)
        return self.ops.bias_act(z, self.biases[layer], self._activations[layer], out=y)

    def backward(self, x, dlogits):
        """Write the gradients for the batch x of the last forward(); dlogits (B, classes) is left unchanged."""
        dy = dlogits
        for layer in reversed(range(len(self.weights))):
            dy = self.backward_layer(layer, self._y[layer - 1][: len(x)] if layer else x, dy)

    def backward_layer(self, layer, x, dy):
        """Write the layer's gradients for its input x (B, sizes[layer]) and the gradient dy of its output, which is
        overwritten; return the gradient of x, or None for the first layer, where nobody needs it."""
        z = self._z[layer]
        dz, _ = self.ops.bias_act_backward(
            dy, z[: len(x)], self._activations[layer], out=dy, bias_grad=self.bias_grads[layer],
            bias=None if self._y[layer] is z else self.biases[layer],
        )  # fmt: skip
        self.xp.matmul(x.T, dz, out=self.weight_grads[layer])
        return self.xp.matmul(dz, self.weights[layer].T, out=self._dy[layer - 1][: len(x)]) if layer else None
