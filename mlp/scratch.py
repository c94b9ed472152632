"""The from-scratch model as the training loop sees it: data on the device, training steps, evaluation."""

import numpy as np

from . import InputError
from .configs import FULL, Config
from .data import Dataset
from .device import Device
from .evaluate import Evaluation
from .model import MLP
from .optim import optimizer


class ScratchLearner:
    """An MLP, its optimizer and its data set on one device.

    Images stay uint8 and become float32 batch by batch. A batch larger than device.chunk_rows is computed in
    chunks whose gradients add up to those of the whole: memory stays bounded however large the batch is.
    Nothing here waits for the GPU but totals() and evaluate().
    """

    def __init__(self, config: Config, data: Dataset, device: Device, train_rows: int):
        self.config, self.device, self.classes = config, device, len(data.class_names)
        xp, ops = device.xp, device.ops
        self.batch_size = train_rows if config.batch_size == FULL else min(config.batch_size, train_rows)
        rows = device.chunk_rows
        try:
            self.images, self.labels = xp.asarray(data.images), xp.asarray(data.labels)
            sizes = (data.images.shape[1], *config.hidden, self.classes)
            self.model = MLP(sizes, config.activation, rows=rows, xp=xp, ops=ops, seed=config.seed)
            self.optimizer = optimizer(config, self.model.parameters, xp, ops)
            self._x, self._y = xp.empty((rows, sizes[0]), np.float32), xp.empty(rows, np.int32)
            self._dlogits = xp.empty((rows, self.classes), np.float32)
            self._totals = xp.zeros(2, np.float64)
            self._sum = xp.empty_like(self.model.gradients) if self.batch_size > rows else None
        except MemoryError as error:  # CuPy's OutOfMemoryError is one too
            raise InputError(f"the data and the model do not fit into the memory of {device.name}: {error}") from None
        self._order = None

    def begin_epoch(self, order: np.ndarray) -> None:
        """Take the epoch's image indices (int32) in the order of the batches, and forget the last epoch's totals."""
        self._order = self.device.xp.asarray(order)
        self._totals[...] = 0

    def train_step(self, start: int, stop: int, lr: float) -> None:
        """One optimizer step on the images order[start:stop]."""
        model, rows = self.model, self.device.chunk_rows
        gradients = model.gradients
        for begin in range(start, stop, rows):
            x, labels = self.gather(self._order[begin : min(begin + rows, stop)])
            model.backward(x, self.loss(model.forward(x), labels, self._totals, 1.0 / (stop - start)))
            if stop - start > rows:
                gradients = self._sum
                if begin == start:
                    gradients[...] = model.gradients
                else:
                    gradients += model.gradients
        self.optimizer.step(model.parameters, gradients, lr)

    def gather(self, index, noise_sigma: float = 0.0):
        """The images and labels at `index` (B,): float32 (B, 784) and int32 (B,), valid until the next call."""
        x, labels = self._x[: len(index)], self._y[: len(index)]
        self.device.ops.gather_batch(
            self.images, self.labels, index, out_x=x, out_y=labels, noise_sigma=noise_sigma, seed=self.config.seed
        )
        return x, labels

    def loss(self, logits, labels, totals, scale: float | None = None):
        """Add the batch's losses and hits to `totals`; return dlogits (B, classes), valid until the next call."""
        dlogits = self._dlogits[: len(logits)]
        self.device.ops.softmax_cross_entropy(logits, labels, scale=scale, out=dlogits, totals=totals)
        return dlogits

    def totals(self) -> tuple[float, int]:
        """Sum of the row losses and number of correct rows since begin_epoch(). Waits for the GPU."""
        loss, correct = self.device.numpy(self._totals)
        return float(loss), int(correct)

    def evaluate(self, index: np.ndarray, noise_sigma: float = 0.0) -> Evaluation:
        """Loss and confusion matrix on the images `index`, with Gaussian noise added to the [0, 1] pixels."""
        xp, rows, classes = self.device.xp, self.device.chunk_rows, self.classes
        index = xp.asarray(index)
        totals = xp.zeros(2, np.float64)
        confusion = xp.zeros(classes * classes, np.int64)
        for begin in range(0, len(index), rows):
            x, labels = self.gather(index[begin : begin + rows], noise_sigma)
            logits = self.model.forward(x)
            confusion += xp.bincount(labels * classes + logits.argmax(axis=1), minlength=classes * classes)
            self.loss(logits, labels, totals)
        loss = float(self.device.numpy(totals)[0])
        return Evaluation(loss / len(index), self.device.numpy(confusion).reshape(classes, classes))

    def snapshot(self):
        """A copy of the parameters on the device."""
        return self.model.parameters.copy()

    def restore(self, snapshot) -> None:
        """Take back the parameters of snapshot()."""
        self.model.parameters[...] = snapshot

    def arrays(self) -> dict[str, np.ndarray]:
        """The parameters on the host: weight0 (in, out), bias0 (out,), weight1, ..."""
        to_host = self.device.numpy
        return {
            name: to_host(array)
            for layer, (weight, bias) in enumerate(zip(self.model.weights, self.model.biases))
            for name, array in ((f"weight{layer}", weight), (f"bias{layer}", bias))
        }
