"""The PyTorch twin of the from-scratch model, as the training loop sees it: what ours is compared and timed with."""

import numpy as np
import torch
from torch import nn

from kernels import plain

from . import InputError
from .configs import FULL, Config
from .data import Dataset
from .evaluate import Evaluation
from .model import initial_weights

ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(plain.LEAKY_SLOPE),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}


def sequential(sizes, activation: str, seed: int) -> nn.Sequential:
    """A module per layer, with the activation in all but the last, and the initial weights of model.MLP."""
    layers = []
    for weight in initial_weights(sizes, seed):
        linear = nn.utils.skip_init(nn.Linear, *weight.shape)  # leaves torch's generator alone
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(weight.T))  # torch's are (out, in)
            linear.bias.zero_()
        layers.append(nn.Sequential(linear, ACTIVATIONS[activation]()))
    layers[-1] = layers[-1][:1]
    return nn.Sequential(*layers)


def optimizer(config: Config, parameters) -> torch.optim.Optimizer:
    """The optimizer of `config`, in torch's fused form: one pass for all parameters on a GPU."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.l2, fused=True)
    adam = torch.optim.AdamW if config.decoupled else torch.optim.Adam
    betas = (config.beta1, config.beta2)
    return adam(parameters, lr=config.lr, betas=betas, eps=config.eps, weight_decay=config.l2, fused=True)


class TorchLearner:
    """A model, its optimizer and its data set in torch on `kind`, "cpu" or "cuda"; see scratch.ScratchLearner.

    compile: let torch.compile make one graph of the forward pass and the loss (and, with it, the backward pass).
    Nothing here waits for the GPU but totals() and evaluate(). InputError where there is no GPU for "cuda".
    """

    steps_per_launch = 1
    chunk_rows = 16384  # a larger batch is computed in chunks of so many rows

    def __init__(self, config: Config, data: Dataset, kind: str, train_rows: int, *, compile: bool = False):
        if kind == "cuda" and not torch.cuda.is_available():
            raise InputError("torch finds no GPU; install a torch built for CUDA on a machine with one, or use the CPU")
        self.config, self.classes, self.compiled = config, len(data.class_names), compile
        self.device = torch.device(kind)
        self.batch_size = train_rows if config.batch_size == FULL else min(config.batch_size, train_rows)
        self.images = torch.from_numpy(data.images).to(self.device)
        self.labels = torch.from_numpy(data.labels).to(self.device, torch.int64)
        sizes = (data.images.shape[1], *config.hidden, self.classes)
        self.model = sequential(sizes, config.activation, config.seed).to(self.device)
        self.optimizer = optimizer(config, self.model.parameters())
        # Not dynamic: a last batch of another size gets a graph of its own instead of a slower one for all.
        self.forward_loss = torch.compile(self._forward_loss, dynamic=False) if compile else self._forward_loss
        self._totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._order = None

    def begin_epoch(self, index: np.ndarray, epoch: int | None = None) -> None:
        """Take the images `index` for the batches to come, in their order or in the random one that the from-scratch
        model takes them in, and forget the last epoch's totals."""
        order = torch.from_numpy(index).to(self.device)
        if epoch is not None:
            order = plain.shuffle(order, seed=self.config.seed, epoch=epoch)
        self._order = order.to(torch.int64)
        self._totals.zero_()

    def train(self, start: int, stop: int, lr: float) -> None:
        """An optimizer step on each batch of the epoch's images [start, stop)."""
        for begin in range(start, stop, self.batch_size):
            self.train_step(begin, min(begin + self.batch_size, stop), lr)

    def train_step(self, start: int, stop: int, lr: float) -> None:
        """One optimizer step on the images order[start:stop]."""
        self.optimizer.zero_grad(set_to_none=True)
        for begin in range(start, stop, self.chunk_rows):
            x, labels = self.gather(self._order[begin : min(begin + self.chunk_rows, stop)])
            loss = self.forward_loss(x, labels)
            loss.backward(loss.new_full((), len(x) / (stop - start)))  # the chunk's share of the batch's mean
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def gather(self, index, noise_sigma: float = 0.0):
        """The images and labels at `index` (B,): float32 (B, 784) and int64 (B,)."""
        # On a CPU images[index] takes 15 times as long as index_select, and uint8 * float 7 times as long as this.
        x = self.images.index_select(0, index).to(torch.float32).mul_(1.0 / 255.0)
        if noise_sigma:  # the same numbers as in our own learners, computed on the CPU
            noise = plain.normals(np, index.cpu().numpy(), x.shape[1], self.config.seed)
            x.add_(torch.from_numpy(noise).to(self.device), alpha=noise_sigma)
        return x, self.labels[index]

    def _forward_loss(self, x, labels):
        return self.loss(self.model(x), labels, self._totals)

    def loss(self, logits, labels, totals):
        """The mean loss; the sum of the losses and the number of hits are added to `totals`."""
        loss = nn.functional.cross_entropy(logits, labels)
        totals[0] += loss.detach() * len(labels)
        totals[1] += (logits.argmax(dim=1) == labels).sum()
        return loss

    def synchronize(self) -> None:
        """Wait until all that was asked for is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def totals(self) -> tuple[float, int]:
        """Sum of the row losses and number of correct rows since begin_epoch(). Waits for the GPU."""
        loss, correct = self._totals.tolist()
        return loss, int(correct)

    @torch.no_grad()
    def evaluate(self, index: np.ndarray, noise_sigma: float = 0.0) -> Evaluation:
        """Loss and confusion matrix on the images `index`, with Gaussian noise added to the [0, 1] pixels."""
        index = torch.from_numpy(index).to(self.device, torch.int64)
        totals = torch.zeros_like(self._totals)
        confusion = torch.zeros(self.classes**2, dtype=torch.int64, device=self.device)
        for part in index.split(self.chunk_rows):
            x, labels = self.gather(part, noise_sigma)
            logits = self.model(x)
            confusion += torch.bincount(labels * self.classes + logits.argmax(dim=1), minlength=self.classes**2)
            self.loss(logits, labels, totals)
        matrix = confusion.cpu().numpy().reshape(self.classes, self.classes)
        return Evaluation(float(totals[0]) / len(index), matrix)

    def snapshot(self) -> list[torch.Tensor]:
        """A copy of the parameters on the device."""
        return [parameter.detach().clone() for parameter in self.model.parameters()]

    @torch.no_grad()
    def restore(self, snapshot) -> None:
        """Take back the parameters of snapshot()."""
        for parameter, kept in zip(self.model.parameters(), snapshot):
            parameter.copy_(kept)

    def arrays(self) -> dict[str, np.ndarray]:
        """The parameters on the host: weight0 (in, out), bias0 (out,), weight1, ..."""
        named = {}
        for layer, (linear, *_) in enumerate(self.model):
            named[f"weight{layer}"] = np.ascontiguousarray(linear.weight.detach().cpu().numpy().T)
            named[f"bias{layer}"] = linear.bias.detach().cpu().numpy()
        return named
