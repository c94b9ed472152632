"""The ops in ordinary NumPy/CuPy array code: the baseline that is timed and the reference that is tested.

Same names, arguments and results as `kernels` (see ops.py), for any floating dtype, unchecked.
"""

import math

import numpy as np

from .plain_act import LEAKY_SLOPE, bias_act, bias_act_backward  # noqa: F401  (ops in other files)
from .plain_batch import advance, gather_batch, shuffle  # noqa: F401
from .plain_norm import batch_norm_stats, norm_act, norm_act_backward  # noqa: F401
from .plain_random import array_module


def softmax_cross_entropy(
    logits, labels, scale=None, out=None, totals=None, confusion=None, classes=None, label_smoothing=0.0,
    class_weights=None,
):  # fmt: skip
    xp = array_module(logits)
    B, C = len(logits), logits.shape[1] if classes is None else classes
    if scale is None:
        scale = 1.0 / B if B else math.nan
    out = xp.empty_like(logits) if out is None else out
    logits, dlogits, padding = logits[:, :C], out[:, :C], out[:, C:]
    rows = xp.arange(B)
    valid = (labels >= 0) & (labels < C)
    safe = xp.where(valid, labels, 0)
    if confusion is not None:
        counts = confusion.view(xp.uint64)  # CuPy adds at indices of unsigned types, not of int64
        xp.add.at(counts, (safe, _prediction(xp, logits)), valid.astype(xp.uint64))
    with np.errstate(invalid="ignore"):
        shifted = logits - logits.max(axis=1, keepdims=True)
    xp.exp(shifted, out=dlogits)
    total = dlogits.sum(axis=1, keepdims=True)
    aim, rate = shifted[rows, safe], scale
    if label_smoothing:
        aim = (1.0 - label_smoothing) * aim + label_smoothing * shifted.mean(axis=1)
    losses = xp.where(valid, xp.log(total[:, 0]) - aim, math.nan)
    if class_weights is not None:
        losses *= class_weights[safe]
        rate = scale * class_weights[safe]
    dlogits *= xp.where(valid, rate / total[:, 0], math.nan)[:, None]
    dlogits[rows, safe] -= rate * (1.0 - label_smoothing)
    if label_smoothing:
        dlogits -= label_smoothing / C * (rate if class_weights is None else rate[:, None])
    padding[...] = 0
    if totals is not None:
        totals[0] += losses.sum(dtype=np.float64)
        totals[1] += xp.count_nonzero((shifted.argmax(axis=1) == labels) & ~xp.isnan(losses))
    return (losses.sum(dtype=np.float64) * scale).astype(logits.dtype), out


def _prediction(xp, logits):
    """The class of each row's first largest logit, NaN passed over; 0 where all are NaN."""
    largest = xp.where(xp.isnan(logits), -math.inf, logits).max(axis=1, keepdims=True)
    return (logits == largest).argmax(axis=1)


def adam_step(p, g, m, v, *, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled=False):
    xp = array_module(p)
    if hasattr(step, "astype"):  # on the device; 1 - beta^step would cancel in float32
        step = step.astype(np.float64)
    rate, root = lr / (1.0 - beta1**step), (1.0 - beta2**step) ** 0.5
    if hasattr(step, "astype"):
        rate, root = rate.astype(p.dtype), root.astype(p.dtype)
    if decoupled:
        p *= 1.0 - lr * weight_decay
    elif weight_decay:
        g = g + weight_decay * p
    m *= beta1
    m += (1.0 - beta1) * g
    v *= beta2
    v += (1.0 - beta2) * (g * g)
    denominator = xp.sqrt(v)
    denominator /= root
    denominator += eps
    p -= rate * (m / denominator)


def sgd_step(p, g, velocity=None, *, lr, momentum=0.0, weight_decay=0.0):
    if weight_decay:
        g = g + weight_decay * p
    if velocity is not None:
        velocity *= momentum
        velocity += g
        g = velocity
    p -= lr * g


def average_step(average, p, *, decay, step):
    if hasattr(step, "astype"):  # on the device, of any shape
        share = array_module(p).maximum(1.0 - decay, 9.0 / (10.0 + step.ravel())).astype(p.dtype)
    else:
        share = max(1.0 - decay, 9.0 / (10.0 + step))
    average += share * (p - average)


def to_bfloat16(x, out=None):
    xp = array_module(x)
    out = xp.empty(x.shape, xp.uint16) if out is None else out
    bits = x.reshape(-1).view(xp.uint32)  # a 0-d array would become a scalar, whose sums must not wrap
    rounded = bits + xp.uint32(0x7FFF) + (bits >> xp.uint32(16) & xp.uint32(1))
    quiet = bits | xp.uint32(0x00400000)
    out.reshape(-1)[...] = xp.where(xp.isnan(x.reshape(-1)), quiet, rounded) >> xp.uint32(16)
    return out
