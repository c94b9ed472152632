"""The network: parameters and gradients in one arena each, forward and backward, each layer in its form (forms.py)."""

from itertools import pairwise

import numpy as np

from .forms import EPILOGUE, MASKED, OWN, SEPARATE, default
from .products import Products
from .step_graph import Recorded, Recorder

ALIGNMENT = 16  # bytes: every parameter starts on a boundary that a 16-byte access needs


def arena(shapes, xp, dtype, step=None):
    """One flat array of zeros and a view into it per shape, each starting on ALIGNMENT bytes, or on a multiple of
    `step` elements."""
    step = step or ALIGNMENT // np.dtype(dtype).itemsize
    flat = _aligned_zeros(sum(-(-int(np.prod(shape)) // step) * step for shape in shapes), xp, dtype)
    return flat, split(flat, shapes, step)


def split(flat, shapes, step=None) -> list:
    """The views of an array that is laid out as arena() does it."""
    step, views, start = step or ALIGNMENT // flat.dtype.itemsize, [], 0
    for shape in shapes:
        size = int(np.prod(shape))
        views.append(flat[start : start + size].reshape(shape))
        start += -(-size // step) * step
    return views


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


def _by_kind(views, layers):
    """The weights, the biases and the norm weights among the views of an arena."""
    return views[: 2 * layers : 2], views[1 : 2 * layers : 2], views[2 * layers :]


class MLP:
    """Linear layers with an activation between them, on `xp` arrays, computed by `ops` and `products`.

    sizes: widths from the input to the classes. rows: the largest batch. seed: of the initial weights (in, out), and of
    the dropout. plan: how the layers are computed. Whatever is computed goes through `recorder` and into buffers, so
    that it can be recorded; what a method returns is such a buffer, valid until the next batch.
    parameters, gradients: flat arenas; weights, biases and weight_grads, bias_grads are views into them. The plan may
    pad the last layer's columns: there they are 0 and stay 0.
    norm, dropout: hidden layers normalise the product over the batch (Ioffe & Szegedy, "Batch normalization", 2015) and
    drop outputs with this probability (Srivastava et al., "Dropout", 2014). With norm, a layer's bias is that of the
    normalised product, norm_weights are its factors, and running the flat arena of the means and variances that take
    the batch's place outside of training. shared_norm: where each process of a job has a part of the batch, what makes
    the statistics and gradients those of the whole (distributed.SharedNorm).
    """

    def __init__(self, sizes, activation, *, rows, xp=np, ops, products=None, plan=None, recorder=None, seed=0,
                 norm=False, dropout=0.0, shared_norm=None, dtype=np.float32):  # fmt: skip
        self.sizes, self.activation, self.xp = tuple(sizes), activation, xp
        self.norm, self.dropout, self.seed, self._shared_norm = norm, dropout, seed, shared_norm
        layers = len(sizes) - 1
        self.plan = plan or default(layers)
        self.products = products or Products.arrays(xp)
        self.recorder = recorder or Recorder()
        self.ops = Recorded(ops, self.recorder)
        self._library, self._own = (Recorded(p, self.recorder) for p in (self.products.library, self.products.own))
        widths = (*sizes[:-1], self.plan.columns(sizes[-1]))
        hidden = [(n,) for n in widths[1:-1]] if norm else []
        shapes = [shape for n_in, n_out in pairwise(widths) for shape in ((n_in, n_out), (n_out,))] + hidden
        self._shapes, self._running_shapes = shapes, 2 * hidden
        self.parameters, views = arena(shapes, xp, dtype)
        self.weights, self.biases, self.norm_weights = _by_kind(views, layers)
        self.gradients, views = arena(shapes, xp, dtype)
        self.weight_grads, self.bias_grads, self.norm_weight_grads = _by_kind(views, layers)
        self.running, views = arena(self._running_shapes, xp, dtype)  # means, then variances
        self._running = list(zip(views[: len(hidden)], views[len(hidden) :]))
        self._batch = [(xp.empty_like(mean), xp.empty_like(var)) for mean, var in self._running]
        for ones in (*self.norm_weights, *views[len(hidden) :]):
            ones[...] = 1.0
        for weight, initial in zip(self.weights, initial_weights(sizes, seed, dtype)):
            weight[:, : initial.shape[1]] = xp.asarray(initial)
        self._activations = [activation] * (layers - 1) + ["identity"]
        self._z = [xp.empty((rows, n), dtype) for n in widths[1:]]
        # For these the output tells the sign of the pre-activation, so it may overwrite it.
        in_place = ("identity",) if norm or dropout else ("relu", "leaky_relu", "identity")
        self._y = [z if act in in_place else xp.empty_like(z) for act, z in zip(self._activations, self._z)]
        self._dy = [xp.empty((rows, n), dtype) for n in widths[1:-1]]
        # What library products read: in bfloat16 copies of the arrays, made when they are first needed.
        self._factors = self.weights
        if self.products.rounds:
            self._rounded, views = arena(shapes, xp, np.uint16, ALIGNMENT // np.dtype(dtype).itemsize)
            self._factors = _by_kind(views, layers)[0]
        self._draw = {}  # what the last forward() told of its dropout
        self._inputs, self._masks = {}, {}  # of the batch by layer: the input that the library reads; relu's bit mask

    @property
    def parameter_count(self) -> int:
        return sum(view.size for _, view in self.named_parameters())

    def named_parameters(self, flat=None):
        """("weight0", view (in, out)), ("bias0", view (out,)), ("weight1", ...), without the padding; of the parameters
        or of another array with their layout, as an optimizer's moments."""
        views = split(self.parameters if flat is None else flat, self._shapes)
        weights, biases, norm_weights = _by_kind(views, len(self.weights))
        for layer, (n_out, weight, bias) in enumerate(zip(self.sizes[1:], weights, biases)):
            yield f"weight{layer}", weight[:, :n_out]
            yield f"bias{layer}", bias[:n_out]
        for layer, weight in enumerate(norm_weights):
            yield f"norm_weight{layer}", weight

    def named_buffers(self, flat=None):
        """("norm_mean0", view (width,)), ("norm_var0", view (width,)), ... where the model normalises; of the running
        statistics or of another array with their layout."""
        views = split(self.running if flat is None else flat, self._running_shapes)
        means, variances = views[: len(views) // 2], views[len(views) // 2 :]
        for layer, (mean, var) in enumerate(zip(means, variances)):
            yield f"norm_mean{layer}", mean
            yield f"norm_var{layer}", var

    def written(self, kind, layer) -> list:
        """The arrays that a layer's "forward" or "backward" pass writes."""
        if kind == "forward":
            return [self._z[layer], self._y[layer]]
        norm = [self.norm_weight_grads[layer]] if layer < len(self.norm_weight_grads) else []
        return [self.weight_grads[layer], self.bias_grads[layer], *norm]

    def forward(self, x, *, training=False, step=None, row=0):
        """x (B, sizes[0]) -> logits (B, sizes[-1] or padded).

        training: with the statistics of x, which move the running ones, and with dropout, for which `step` is a float32
        array of one element, the number of the step, and `row` that of x's first row in the whole batch.
        """
        self._draw = {"dropout": self.dropout, "seed": self.seed, "step": step, "row": row} if training else {}
        if self.products.rounds:
            with self.recorder.phase("forward/round"):
                self.ops.to_bfloat16(self.parameters, out=self._rounded)
        for layer in range(len(self.weights)):
            x = self.forward_layer(layer, x)
        return x

    def forward_layer(self, layer, x):
        """x (B, sizes[layer]) -> the layer's output (B, sizes[layer + 1])."""
        z, y = self._z[layer][: len(x)], self._y[layer][: len(x)]
        bias, activation, form = self.biases[layer], self._activations[layer], self.plan.forms[layer].forward
        algorithm = self._algorithm(layer, "forward", x)
        self._inputs.pop(layer, None)
        with self.recorder.phase(f"forward/layer{layer}"):
            if form == OWN:
                kept = None if self._in_place(layer) else z
                self._own.forward(x, self.weights[layer], y, bias=bias, activation=activation, z=kept)
            elif form == SEPARATE:
                self._library.forward(self._input(layer, x), self._factors[layer], z, **algorithm)
                if self.is_plain(layer):
                    self.ops.bias_act(z, bias, activation, out=y)
                else:
                    self._norm_act(layer, z, y)
            else:
                factor, mask = self._input(layer, x), self.mask(layer, len(x)) if form == MASKED else None
                self._library.forward_act(factor, self._factors[layer], bias, activation, y, mask, **algorithm)
        return y

    def is_plain(self, layer) -> bool:
        """Whether there is nothing between the layer's product and its output but bias and activation, now."""
        last = layer == len(self.weights) - 1
        return last or not self.norm and not (self.dropout and self._draw)

    def _norm_act(self, layer, z, y):
        if self.norm and self._draw:
            mean, var = self._batch[layer]
            running_mean, running_var = self._running[layer]
            if self._shared_norm:
                self.ops.batch_norm_stats(z, mean=mean, var=var)
                self.recorder(self._shared_norm.statistics, len(z), mean, var, running_mean, running_var)
            else:
                self.ops.batch_norm_stats(z, mean=mean, var=var, running_mean=running_mean, running_var=running_var)
        self.ops.norm_act(z, self.biases[layer], self.activation, out=y, **self._treatment(layer))

    def _treatment(self, layer) -> dict:
        """What norm_act is told beside the product and the bias."""
        treatment = {**self._draw, "layer": layer} if self.dropout and self._draw else {}
        if self.norm:
            mean, var = (self._batch if self._draw else self._running)[layer]
            treatment |= {"mean": mean, "var": var, "weight": self.norm_weights[layer]}
        return treatment

    def backward(self, x, dlogits):
        """Write the gradients for the batch x of the last forward(); dlogits (B, classes) is left unchanged."""
        dy = dlogits
        for layer in reversed(range(len(self.weights))):
            dy = self.backward_layer(layer, self._y[layer - 1][: len(x)] if layer else x, dy)

    def backward_layer(self, layer, x, dy):
        """Write the layer's gradients for its input x (B, sizes[layer]) and the gradient dy of its output, which is
        overwritten; return the gradient of x, or None for the first layer, where nobody needs it. Where the form of the
        next layer says so, dy is the gradient of the pre-activation already, and the bias gradient is written."""
        forms, last = self.plan.forms, layer == len(self.weights) - 1
        with self.recorder.phase(f"backward/layer{layer}"):
            if not last and forms[layer + 1].input == SEPARATE:
                self.activation_gradient(layer, dy)
            own = forms[layer].weight == OWN and (not layer or forms[layer].input == OWN)
            factor = None if own else self._factor(dy)
            with self.recorder.beside():
                if last and forms[layer].weight != EPILOGUE:  # of the identity: only the bias gradient is written
                    self.activation_gradient(layer, dy)
                self.weight_gradient(layer, x, dy, factor)
            return self.input_gradient(layer, dy, factor) if layer else None

    def activation_gradient(self, layer, dy):
        """Turn dy into the gradient of the layer's pre-activation, and write the bias gradient."""
        saved, bias = self._saved(layer, len(dy))
        if self.is_plain(layer):
            self.ops.bias_act_backward(
                dy, saved, self._activations[layer], out=dy, bias_grad=self.bias_grads[layer], bias=bias
            )
        else:
            self.ops.norm_act_backward(
                dy, saved, self.biases[layer], self.activation, out=dy, bias_grad=self.bias_grads[layer],
                weight_grad=self.norm_weight_grads[layer] if self.norm else None, **self._treatment(layer),
            )  # fmt: skip
            if self.norm and self._shared_norm:
                self.recorder(
                    self._shared_norm.gradient, dy, saved, *self._batch[layer], self.norm_weights[layer],
                    self.bias_grads[layer], self.norm_weight_grads[layer],
                )  # fmt: skip

    def weight_gradient(self, layer, x, dz, factor):
        """Write the gradient of the layer's weight. factor: what the library reads in the place of dz."""
        form, out = self.plan.forms[layer].weight, self.weight_grads[layer]
        algorithm = self._algorithm(layer, "weight", x)
        if form == OWN:
            self._own.weight_gradient(x, dz, out)
        elif form == EPILOGUE:
            self._library.weight_gradient_bias(self._input(layer, x), factor, out, self.bias_grads[layer], **algorithm)
        else:
            self._library.weight_gradient(self._input(layer, x), factor, out, **algorithm)

    def input_gradient(self, layer, dz, factor):
        """The gradient of the layer's input; unless the form is separate, that of the pre-activation that the input
        was made of, and the bias gradient of the layer before is written."""
        form, before, out = self.plan.forms[layer].input, layer - 1, self._dy[layer - 1][: len(dz)]
        algorithm = self._algorithm(layer, "input", dz)
        if form == OWN:
            saved, bias = self._saved(before, len(dz))
            self._own.input_gradient(
                dz, self.weights[layer], out, saved=saved, activation=self._activations[before], bias=bias,
                bias_grad=self.bias_grads[before],
            )  # fmt: skip
        elif form == EPILOGUE:
            mask, bias_grad = self._masks[before], self.bias_grads[before]
            self._library.input_gradient_relu(factor, self._factors[layer], mask, out, bias_grad, **algorithm)
        else:
            self._library.input_gradient(factor, self._factors[layer], out, **algorithm)
        return out

    def _algorithm(self, layer, kind, batch) -> dict:
        """What a product of the library is told of its algorithm: nothing where it is the first."""
        number = self.plan.algorithm(layer, kind, len(batch))
        return {"algorithm": number} if number else {}

    def _in_place(self, layer) -> bool:
        return self._y[layer] is self._z[layer]

    def _saved(self, layer, rows):
        """What tells the derivative of the layer's activation, and the bias that is missing from it or None."""
        return self._z[layer][:rows], None if self._in_place(layer) else self.biases[layer]

    def _factor(self, array):
        """What the library reads of a float32 array: the array, or its copy in bfloat16."""
        if not self.products.rounds:
            return array
        copy = self.xp.empty(array.shape, np.uint16)
        self.ops.to_bfloat16(array, out=copy)
        return copy

    def _input(self, layer, x):
        """_factor() of the layer's input, once per batch."""
        if layer not in self._inputs:
            self._inputs[layer] = self._factor(x)
        return self._inputs[layer]

    def mask(self, layer, rows):
        """Where the forward epilogue of relu leaves its bit mask for the backward one."""
        shape = self.products.library.mask_shape(rows, len(self.biases[layer]))
        self._masks[layer] = self.xp.empty(shape, np.uint8)
        return self._masks[layer]
