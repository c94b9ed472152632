"""The ops in ordinary NumPy/CuPy array code: the baseline that is timed and the reference that is tested.

Same names, arguments and results as `kernels` (see ops.py), for any floating dtype, unchecked.
"""

import math
import sys

import numpy as np

from .plain_act import LEAKY_SLOPE, array_module, bias_act, bias_act_backward  # noqa: F401 (ops of other files)
from .plain_norm import batch_norm_stats, norm_act, norm_act_backward  # noqa: F401
from .plain_random import LEAST_BITS, feistel, normals, round_keys


def softmax_cross_entropy(logits, labels, scale=None, out=None, totals=None, confusion=None, classes=None):
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
    losses = xp.where(valid, xp.log(total[:, 0]) - shifted[rows, safe], math.nan)
    dlogits *= xp.where(valid, scale / total[:, 0], math.nan)[:, None]
    dlogits[rows, safe] -= scale
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


def _warp(xp, images, affine):
    """Bilinear samples of (B, D) square images at affine (B, 2, 3) of the output positions; 0 outside."""
    side = math.isqrt(images.shape[1])
    centre = 0.5 * (side - 1)
    row, column = xp.divmod(xp.arange(side * side), side)
    grid = xp.stack([column - centre, row - centre, xp.ones(side * side)]).astype(xp.float32)
    source = affine.reshape(-1, 2, 3).astype(xp.float32) @ grid + xp.float32(centre)
    source = xp.clip(source, -2.0, side + 1.0)
    corner = xp.floor(source)
    fraction = source - corner
    corner = corner.astype(xp.int64)
    rows = xp.arange(len(images))[:, None]
    result = xp.zeros(source[:, 0].shape, xp.float32)
    for down in (0, 1):
        for right in (0, 1):
            c, r = corner[:, 0] + right, corner[:, 1] + down
            inside = (c >= 0) & (c < side) & (r >= 0) & (r < side)
            pixel = xp.where(inside, images[rows, xp.where(inside, r * side + c, 0)], 0)
            weight_c = fraction[:, 0] if right else 1.0 - fraction[:, 0]
            weight_r = fraction[:, 1] if down else 1.0 - fraction[:, 1]
            result += pixel * weight_c * weight_r
    return result


def gather_batch(
    images, labels, index, *, offset=None, out_x=None, out_y=None, mean=0.0, scale=1.0, noise_sigma=0.0, seed=0,
    numbers=None, affine=None,
):  # fmt: skip
    xp = array_module(images)
    if offset is not None:
        index = _slice(xp, index, offset, len(out_x))
    out_x = xp.empty((len(index), images.shape[1]), xp.float32) if out_x is None else out_x
    out_y = xp.empty(len(index), xp.int32) if out_y is None else out_y
    valid = (index >= 0) & (index < len(images))
    safe = xp.where(valid, index, 0)
    pixels = images[safe] if affine is None else _warp(xp, images[safe], affine)
    unit, nan = xp.float32(1.0 / 255.0), xp.float32(math.nan)
    if xp is np:
        xp.multiply(pixels, unit, out=out_x)
        out_x[~valid] = nan
    else:  # where such a mask makes the host wait for the GPU
        xp.multiply(pixels, xp.where(valid, unit, nan)[:, None], out=out_x)
    if noise_sigma:
        counted = safe if numbers is None else numbers[safe]
        out_x += xp.float32(noise_sigma) * normals(xp, counted, images.shape[1], seed)
    if mean:
        out_x -= mean
    if scale != 1.0:
        out_x *= scale
    out_y[...] = xp.where(valid, labels[safe], -1)
    return out_x, out_y


def _slice(xp, index, offset, count):
    """index[offset : offset + count], -1 at positions outside; the offset is an array, and stays on its device."""
    if not len(index):
        return xp.full(count, -1, index.dtype)
    positions = offset.ravel() + xp.arange(count, dtype=xp.int64)  # what wraps is outside, too
    inside = (positions >= 0) & (positions < len(index))
    return xp.where(inside, index[xp.where(inside, positions, 0)], -1)


def advance(offset, by, step=None):
    offset += by
    if step is not None:
        step += 1


def _arange(like, count):
    """0, 1, ..., count - 1 in int64, of the kind and on the device of `like`: NumPy, CuPy or torch."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.arange(count, device=like.device)
    return array_module(like).arange(count, dtype=np.int64)


def shuffle(index, *, seed=0, epoch=0, out=None):
    """Also of torch tensors, on any device."""
    N, keys = len(index), round_keys(seed, epoch)
    bits = max(LEAST_BITS, (N - 1).bit_length())
    x = feistel(_arange(index, N), bits, keys)
    outside = x >= N
    while outside.any():
        x[outside] = feistel(x[outside], bits, keys)
        outside = x >= N
    if out is None:
        return index[x]
    out[...] = index[x]
    return out


def to_bfloat16(x, out=None):
    xp = array_module(x)
    out = xp.empty(x.shape, xp.uint16) if out is None else out
    bits = x.reshape(-1).view(xp.uint32)  # a 0-d array would become a scalar, whose sums must not wrap
    rounded = bits + xp.uint32(0x7FFF) + (bits >> xp.uint32(16) & xp.uint32(1))
    quiet = bits | xp.uint32(0x00400000)
    out.reshape(-1)[...] = xp.where(xp.isnan(x.reshape(-1)), quiet, rounded) >> xp.uint32(16)
    return out
