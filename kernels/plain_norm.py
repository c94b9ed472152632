"""Batch normalisation and dropout around the activation in ordinary array code: see norm_ops.py.

Same names, arguments and results, for any floating dtype, unchecked, as plain.py.
"""

import math

import numpy as np

from .plain_act import bias_act, bias_act_backward
from .plain_random import FOR_DROPOUT, array_module, philox4x32

_LARGEST_STEP = 2.0**32 - 256  # the largest float32 below 2^32


def dropout_threshold(p) -> int:
    """The 32-bit word from which on an element is kept: p * 2^32."""
    return min(round(p * 2**32), 2**32 - 1)


def dropout_keep(xp, B, N, p, *, seed=0, layer=0, step=None, row=0):
    """Which elements dropout keeps: bool (B, N)."""
    quads = -(-N // 4)
    zero = xp.zeros((B, quads), xp.uint64)
    rows = xp.arange(B, dtype=xp.uint64)[:, None] + xp.uint64(row)
    step = xp.asarray(0 if step is None else step).astype(xp.float32).reshape(-1)
    word = xp.where(step > 0, xp.minimum(step, _LARGEST_STEP), 0)
    counters = (
        zero + xp.arange(quads, dtype=xp.uint64), zero + rows, zero + word.astype(xp.uint64),
        zero + xp.uint64(FOR_DROPOUT + 256 * layer),
    )  # fmt: skip
    words = xp.stack(philox4x32(xp, counters, seed & 0xFFFFFFFF, seed >> 32), axis=-1)
    return words.reshape(B, 4 * quads)[:, :N] >= xp.uint64(dropout_threshold(p))


def _factors(like, p, random):
    """What dropout multiplies by, in the dtype of `like`."""
    keep = dropout_keep(array_module(like), *like.shape, p, **random)
    return keep.astype(like.dtype) * like.dtype.type(1.0 / (1.0 - p))


def batch_norm_stats(z, *, mean=None, var=None, running_mean=None, running_var=None, momentum=0.1):
    xp, B = array_module(z), len(z)
    mean, var = (xp.empty(z.shape[1], z.dtype) if x is None else x for x in (mean, var))
    if not B:
        mean[...] = var[...] = math.nan
        return mean, var
    with np.errstate(invalid="ignore", over="ignore"):
        z.mean(axis=0, out=mean)
        xp.square(z - mean).mean(axis=0, out=var)
        if running_mean is not None:
            running_mean += momentum * (mean - running_mean)
            running_var += momentum * (var * (B / max(1, B - 1)) - running_var)
    return mean, var


def norm_act(
    z, bias, activation="relu", *, mean=None, var=None, weight=None, eps=1e-5, dropout=0.0, out=None, **random
):
    """random: seed, layer, step and row."""
    if mean is not None:
        z = (z - mean) * (weight / array_module(z).sqrt(var + eps))
    out = bias_act(z, bias, activation, out=out)
    if dropout:
        out *= _factors(out, dropout, random)
    return out


def norm_act_backward(
    dy, z, bias, activation="relu", *, mean=None, var=None, weight=None, eps=1e-5, dropout=0.0, out=None,
    bias_grad=None, weight_grad=None, **random,
):  # fmt: skip
    xp = array_module(dy)
    if dropout:
        dy = xp.multiply(dy, _factors(dy, dropout, random), out=out)
    if mean is None:
        return *bias_act_backward(dy, z, activation, bias, out=out, bias_grad=bias_grad), None
    rstd = 1.0 / xp.sqrt(var + eps)
    xhat = (z - mean) * rstd
    du, bias_grad = bias_act_backward(dy, xhat * weight, activation, bias, out=out, bias_grad=bias_grad)
    weight_grad = (du * xhat).sum(axis=0, out=weight_grad)
    if len(du):
        du -= bias_grad / len(du)
        du -= xhat * (weight_grad / len(du))
        du *= weight * rstd
    return du, bias_grad, weight_grad
