"""The forward pass of a checkpoint in NumPy, whichever model wrote it: from scratch or in torch."""

from itertools import count

import numpy as np

from kernels import plain

from . import InputError
from .checkpoint import Checkpoint
from .configs import Config
from .data import PIXELS


def logits(arrays: dict[str, np.ndarray], config: Config, x: np.ndarray) -> np.ndarray:
    """x float32 (B, 784) in [0, 1] -> logits float32 (B, classes), by the arrays of a checkpoint.

    Layer i is act(x weight{i} + bias{i}), the last without the activation. Where it has batch normalisation,
    z = x weight{i} becomes act((z - norm_mean{i}) / sqrt(norm_var{i} + eps) * norm_weight{i} + bias{i}), with the
    means and variances of training (Ioffe & Szegedy 2015). Dropout does nothing here.
    """
    layers = layer_count(arrays)
    for i in range(layers):
        norm = {name: arrays[f"norm_{name}{i}"] for name in ("mean", "var", "weight") if f"norm_weight{i}" in arrays}
        activation = config.activation if i < layers - 1 else "identity"
        x = plain.norm_act(x @ arrays[f"weight{i}"], arrays[f"bias{i}"], activation, **norm)
    return x


def layer_count(arrays) -> int:
    return next(i for i in count() if f"weight{i}" not in arrays)


def probabilities(arrays, config: Config, images: np.ndarray) -> np.ndarray:
    """uint8 (B, 784) -> the softmax of the logits, float64 (B, classes)."""
    z = logits(arrays, config, images * np.float32(1 / 255)).astype(np.float64)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def check(saved: Checkpoint, path) -> None:
    """InputError unless the arrays are those of the configuration: finite, and each of the shape that it needs."""
    sizes = (PIXELS, *saved.config.hidden, len(saved.class_names))
    norms = {f"norm_{name}" for name in ("weight", "mean", "var")}
    expected = {}
    for i, (n_in, n_out) in enumerate(zip(sizes, sizes[1:])):
        expected |= {f"weight{i}": (n_in, n_out), f"bias{i}": (n_out,)}
        if any(f"{name}{i}" in saved.arrays for name in norms):
            expected |= {f"{name}{i}": (n_out,) for name in norms}
    advice = "give the checkpoint of a whole run"
    for name, shape in expected.items():
        found = saved.arrays[name].shape if name in saved.arrays else "nothing"
        if found != shape:
            raise InputError(f"{path} has {found} for {name}, expected {shape}; {advice}")
    for name, array in saved.arrays.items():
        if name not in expected or array.dtype.kind != "f" or not np.isfinite(array).all():
            raise InputError(f"{path} holds {name}, which is not an array of finite parameters; {advice}")
