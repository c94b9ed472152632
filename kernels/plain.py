"""The ops in ordinary NumPy/CuPy array code: the baseline that is timed and the reference that is tested.

Same names, arguments and results as `kernels` (see ops.py), for any floating dtype, unchecked.
"""

import math
import sys

import numpy as np

LEAKY_SLOPE = 0.01
_ROOT_2_OVER_PI = math.sqrt(2.0 / math.pi)


def array_module(array):
    """numpy or cupy, whichever `array` belongs to. CuPy is not imported for a NumPy array."""
    cupy = sys.modules.get("cupy")
    return cupy if cupy is not None and isinstance(array, cupy.ndarray) else np


def _erf(x):
    if array_module(x) is np:
        from scipy.special import erf
    else:
        from cupyx.scipy.special import erf
    return erf(x)


def _sigmoid(xp, u):
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + xp.exp(-u))


def _gelu_cdf(u):
    return 0.5 * (1.0 + _erf(u * math.sqrt(0.5)))


def _gelu_tanh_argument(u):
    return _ROOT_2_OVER_PI * (u + 0.044715 * u * u * u)


def _gelu_tanh_cdf(xp, u):
    return 0.5 * (1.0 + xp.tanh(_gelu_tanh_argument(u)))


_FORWARD = {
    "leaky_relu": lambda xp, u: xp.maximum(u, LEAKY_SLOPE * u),
    "silu": lambda xp, u: u * _sigmoid(xp, u),
    "gelu": lambda xp, u: u * _gelu_cdf(u),
    "gelu_tanh": lambda xp, u: u * _gelu_tanh_cdf(xp, u),
}


def _logistic(xp, u):
    """sigmoid(u) and its derivative, which 1 - sigmoid(u) would give with a large error for u >> 0."""
    e = xp.exp(-xp.abs(u))
    r = 1.0 / (1.0 + e)
    return xp.where(u < 0, e * r, r), e * r * r


def _silu_slope(xp, u):
    value, slope = _logistic(xp, u)
    return value + u * slope


def _gelu_tanh_slope(xp, u):
    value, slope = _logistic(xp, 2.0 * _gelu_tanh_argument(u))
    return value + u * slope * (2.0 * _ROOT_2_OVER_PI) * (1.0 + 3 * 0.044715 * u * u)


_SLOPE = {
    "relu": lambda xp, u: ~(u <= 0),  # 1 where u is NaN, as in torch
    "leaky_relu": lambda xp, u: xp.where(u > 0, 1.0, LEAKY_SLOPE).astype(u.dtype),
    "silu": _silu_slope,
    "gelu": lambda xp, u: _gelu_cdf(u) + u * xp.exp(-0.5 * u * u) / math.sqrt(2.0 * math.pi),
    "gelu_tanh": _gelu_tanh_slope,
}


def bias_act(z, bias, activation="relu", out=None):
    xp = array_module(z)
    out = xp.add(z, bias, out=out)
    if activation == "relu":
        xp.maximum(out, 0, out=out)
    elif activation != "identity":
        out[...] = _FORWARD[activation](xp, out)
    return out


def bias_act_backward(dy, saved, activation="relu", bias=None, out=None, bias_grad=None):
    xp = array_module(dy)
    out = xp.empty_like(dy) if out is None else out
    u = saved if bias is None else saved + bias
    if activation == "identity":
        if out is not dy:
            out[...] = dy
    else:
        xp.multiply(dy, _SLOPE[activation](xp, u), out=out)
    return out, out.sum(axis=0, out=bias_grad)


def softmax_cross_entropy(logits, labels, scale=None, out=None, totals=None):
    xp = array_module(logits)
    B, C = logits.shape
    if scale is None:
        scale = 1.0 / B if B else math.nan
    rows = xp.arange(B)
    valid = (labels >= 0) & (labels < C)
    safe = xp.where(valid, labels, 0)
    with np.errstate(invalid="ignore"):
        shifted = logits - logits.max(axis=1, keepdims=True)
    out = xp.exp(shifted, out=out)
    total = out.sum(axis=1, keepdims=True)
    losses = xp.where(valid, xp.log(total[:, 0]) - shifted[rows, safe], math.nan)
    out *= scale / total
    out[rows, safe] -= scale
    out[~valid] = math.nan
    if totals is not None:
        totals[0] += losses.sum(dtype=np.float64)
        totals[1] += xp.count_nonzero((shifted.argmax(axis=1) == labels) & ~xp.isnan(losses))
    return (losses.sum(dtype=np.float64) * scale).astype(logits.dtype), out


def adam_step(p, g, m, v, *, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled=False):
    xp = array_module(p)
    if decoupled:
        p *= 1.0 - lr * weight_decay
    elif weight_decay:
        g = g + weight_decay * p
    m *= beta1
    m += (1.0 - beta1) * g
    v *= beta2
    v += (1.0 - beta2) * (g * g)
    denominator = xp.sqrt(v)
    denominator /= (1.0 - beta2**step) ** 0.5
    denominator += eps
    p -= (lr / (1.0 - beta1**step)) * (m / denominator)


def sgd_step(p, g, velocity=None, *, lr, momentum=0.0, weight_decay=0.0):
    if weight_decay:
        g = g + weight_decay * p
    if velocity is not None:
        velocity *= momentum
        velocity += g
        g = velocity
    p -= lr * g


def _philox4x32(xp, counters, key0, key1):
    """Four uint32 arrays of random bits: Salmon et al. 2011, 10 rounds. `counters`: four uint64 arrays < 2^32."""
    low = xp.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = counters
    for _ in range(10):
        a, b = c0 * xp.uint64(0xD2511F53), c2 * xp.uint64(0xCD9E8D57)
        shift = xp.uint64(32)
        c0, c1, c2, c3 = (
            (b >> shift) ^ c1 ^ xp.uint64(key0), b & low, (a >> shift) ^ c3 ^ xp.uint64(key1), a & low,
        )  # fmt: skip
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def normals(xp, index, count, seed):
    """Standard normal (B, count) float32 noise that depends on the seed, the image's index and the pixel alone."""
    quads = -(-count // 4)
    zero = xp.zeros((len(index), quads), xp.uint64)
    counters = zero + xp.arange(quads, dtype=xp.uint64), zero + index.astype(xp.uint64)[:, None], zero, zero
    bits = _philox4x32(xp, counters, seed & 0xFFFFFFFF, seed >> 32)
    units = [((b >> xp.uint64(9)).astype(xp.float32) + xp.float32(0.5)) * xp.float32(2.0**-23) for b in bits]
    noise = xp.empty((len(index), quads, 4), xp.float32)
    for k in (0, 2):
        radius = xp.sqrt(-2.0 * xp.log(units[k]))
        angle = xp.float32(2.0 * math.pi) * units[k + 1]
        noise[:, :, k] = radius * xp.cos(angle)
        noise[:, :, k + 1] = radius * xp.sin(angle)
    return noise.reshape(len(index), 4 * quads)[:, :count]


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
    images, labels, index, *, out_x=None, out_y=None, mean=0.0, scale=1.0, noise_sigma=0.0, seed=0, affine=None
):
    xp = array_module(images)
    out_x = xp.empty((len(index), images.shape[1]), xp.float32) if out_x is None else out_x
    out_y = xp.empty(len(index), xp.int32) if out_y is None else out_y
    valid = (index >= 0) & (index < len(images))
    safe = xp.where(valid, index, 0)
    pixels = images[safe] if affine is None else _warp(xp, images[safe], affine)
    xp.multiply(pixels, xp.float32(1.0 / 255.0), out=out_x)
    if noise_sigma:
        out_x += xp.float32(noise_sigma) * normals(xp, safe, images.shape[1], seed)
    if mean:
        out_x -= mean
    if scale != 1.0:
        out_x *= scale
    out_x[~valid] = math.nan
    out_y[...] = xp.where(valid, labels[safe], -1)
    return out_x, out_y
