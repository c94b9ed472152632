"""Learning-rate schedules and the optimizers, each one op on the flat arena of the whole model.

`steps` is the number of the step, counted from 1, in a float32 array of one element, or None where it does not matter:
the caller advances it before step(). `lr` is such an array, too, or a number. `moments` are the arrays, by name, that
one step leaves for the next beside that.
"""

import math

import numpy as np

from .configs import Config

STEPS_PER_RATE = 16  # for so many steps a learning rate holds: those of a launch on a GPU (see scratch.py)


def learning_rate(config: Config, epoch: int, done: float = 0.5) -> float:
    """The learning rate of `epoch`, counted from 0, where the share `done` of its images has been trained on.

    linear and exponential fall from epoch to epoch. cosine falls with every step, from lr after the warm-up to 0 at the
    end of the last epoch (Loshchilov & Hutter, "SGDR", 2017, without restarts). In the warm-up every schedule's value
    is multiplied by the share of it that is done (Goyal et al., "Accurate, large minibatch SGD", 2017).
    """
    place, lr = epoch + done, config.lr
    if config.schedule == "linear":
        lr = max(0.0, lr - config.decay * epoch)
    elif config.schedule == "exponential":
        lr *= config.gamma**epoch
    elif config.schedule == "cosine":
        share = max(0.0, place - config.warmup) / max(1, config.epochs - config.warmup)
        lr *= 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))
    return lr * place / config.warmup if place < config.warmup else lr


def rate_at(config: Config, epoch: int, start: int, images: int, batch: int) -> float:
    """The learning rate of the step on the images from `start` on, of `images` in an epoch, counted from 1: what the
    schedule says for the middle of the STEPS_PER_RATE steps that it is one of."""
    stretch = batch * STEPS_PER_RATE
    begin = start - start % stretch
    return learning_rate(config, epoch - 1, (begin + min(begin + stretch, images)) / 2 / images)


class SGD:
    """Stochastic gradient descent with momentum and L2, as torch.optim.SGD."""

    steps = None

    def __init__(self, config: Config, parameters, xp, ops):
        self.config, self.ops = config, ops
        self.velocity = xp.zeros_like(parameters) if config.momentum else None
        self.moments = {"velocity": self.velocity} if config.momentum else {}

    def step(self, parameters, gradients, lr) -> None:
        self.ops.sgd_step(
            parameters, gradients, self.velocity, lr=lr, momentum=self.config.momentum, weight_decay=self.config.l2
        )


class Adam:
    """Adam with L2 added to the gradient or decoupled, as torch.optim.Adam and AdamW."""

    def __init__(self, config: Config, parameters, xp, ops):
        self.config, self.ops = config, ops
        self.m, self.v = xp.zeros_like(parameters), xp.zeros_like(parameters)
        self.steps = xp.zeros(1, np.float32)
        self.moments = {"m": self.m, "v": self.v}

    def step(self, parameters, gradients, lr) -> None:
        c = self.config
        self.ops.adam_step(
            parameters, gradients, self.m, self.v, step=self.steps, lr=lr, beta1=c.beta1, beta2=c.beta2, eps=c.eps,
            weight_decay=c.l2, decoupled=c.decoupled,
        )  # fmt: skip


def optimizer(config: Config, parameters, xp, ops):
    """The optimizer of `config` for this arena, with its state beside it."""
    return {"sgd": SGD, "adam": Adam}[config.optimizer](config, parameters, xp, ops)
