"""The training step as one writes it first: array code, call by call, Python numbers for the step and the rate.

It trains the same model from the same start on the same batches as mlp/scratch.py; what it does otherwise is what the
first rungs of ladder.py change. relu and Adam without L2 only.
"""

from itertools import pairwise

import measure  # noqa: F401 (first: it puts the repository on the path)
import numpy as np

from kernels import plain
from mlp.model import arena, initial_weights


class ArrayTrainer:
    """A learner in array code on `device`, as far as training goes; see scratch.ScratchLearner.

    one_adam: one Adam for the arena of all parameters, instead of one for every array of them.
    resident: images on the device, and gathered there, instead of in host memory, where NumPy gathers and casts every
    batch, which is then copied to the device.
    """

    steps_per_launch = 1

    def __init__(self, config, data, device, *, one_adam=False, resident=False):
        self.config, self.device, self.xp, self.resident = config, device, device.xp, resident
        self.sizes = (data.images.shape[1], *config.hidden, len(data.class_names))
        self.batch_size, B, xp = config.batch_size, config.batch_size, device.xp
        place = xp.asarray if resident else np.asarray
        self.images, self.labels = place(data.images), place(data.labels)
        shapes = [shape for n_in, n_out in pairwise(self.sizes) for shape in ((n_in, n_out), (n_out,))]
        self.parameters, views = arena(shapes, xp, np.float32)
        self.gradients, slopes = arena(shapes, xp, np.float32)
        self.weights, self.biases = views[::2], views[1::2]
        self.weight_grads, self.bias_grads = slopes[::2], slopes[1::2]
        for weight, initial in zip(self.weights, initial_weights(self.sizes, config.seed)):
            weight[...] = xp.asarray(initial)
        parts = [(self.parameters, self.gradients)] if one_adam else zip(views, slopes)
        self.adams = [(p, g, xp.zeros_like(p), xp.zeros_like(p)) for p, g in parts]
        self.activations = ["relu"] * (len(self.weights) - 1) + ["identity"]
        self._x, self._labels = xp.empty((B, self.sizes[0]), np.float32), xp.empty(B, np.int32)
        self._y = [xp.empty((B, n), np.float32) for n in self.sizes[1:]]
        self._dy = [xp.empty((B, n), np.float32) for n in self.sizes[1:]]
        self.totals, self.steps = xp.zeros(2), 0

    def begin_epoch(self, index, epoch=None) -> None:
        """As ScratchLearner.begin_epoch()."""
        order = index if epoch is None else plain.shuffle(index, seed=self.config.seed, epoch=epoch)
        self._order = self.xp.asarray(order) if self.resident else order
        self.totals[...] = 0

    def train(self, start, stop, lr) -> None:
        """A step on each whole batch of the epoch's images [start, stop)."""
        for begin in range(start, stop, self.batch_size):
            self.step(self._order[begin : begin + self.batch_size], lr)

    def step(self, index, lr) -> None:
        x, labels = self.gather(index)
        inputs = [x, *self._y]
        for layer, weight in enumerate(self.weights):
            z = self.xp.matmul(inputs[layer], weight, out=self._y[layer])
            plain.bias_act(z, self.biases[layer], self.activations[layer], out=z)
        plain.softmax_cross_entropy(self._y[-1], labels, out=self._dy[-1], totals=self.totals)
        for layer in reversed(range(len(self.weights))):
            dz, grad = self._dy[layer], self.bias_grads[layer]
            plain.bias_act_backward(dz, self._y[layer], self.activations[layer], out=dz, bias_grad=grad)
            self.xp.matmul(inputs[layer].T, dz, out=self.weight_grads[layer])
            if layer:
                self.xp.matmul(dz, self.weights[layer].T, out=self._dy[layer - 1])
        self.steps += 1
        c = self.config
        for p, g, m, v in self.adams:
            plain.adam_step(p, g, m, v, step=self.steps, lr=lr, beta1=c.beta1, beta2=c.beta2, eps=c.eps)

    def gather(self, index):
        """float32 (B, D) and int32 (B,) on the device."""
        if self.resident:
            return plain.gather_batch(self.images, self.labels, index, out_x=self._x, out_y=self._labels)
        pixels = np.multiply(self.images[index], np.float32(1.0 / 255.0))
        return self.xp.asarray(pixels), self.xp.asarray(self.labels[index])
