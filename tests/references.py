"""What every op must give, in float64, and how far from it a float32 result may be: each formula once.

The tests of the ops and tests/cases.py compare with these. Inputs are float32 arrays; functions named
`*_checks` take results and yield a Check for each.
"""

import math

import numpy as np
from scipy import ndimage
from scipy.special import expit, ndtr

from kernels import ACTIVATIONS
from kernels.plain_random import philox4x32

from .checks import ELEMENTWISE, EPS, REDUCTION, Check

TINY = float(np.finfo(np.float32).smallest_subnormal)

# ---- bias_act

_TANH = np.sqrt(2.0 / np.pi)


def _gelu_tanh(u):
    return 0.5 * u * (1.0 + np.tanh(_TANH * (u + 0.044715 * u**3)))


def _gelu_tanh_slope(u):
    t = np.tanh(_TANH * (u + 0.044715 * u**3))
    return 0.5 * (1.0 + t) + 0.5 * u * (1.0 - t**2) * _TANH * (1.0 + 3.0 * 0.044715 * u**2)


VALUE = {
    "identity": lambda u: u,
    "relu": lambda u: np.maximum(u, 0.0),
    "leaky_relu": lambda u: np.where(u > 0, u, 0.01 * u),
    "silu": lambda u: u * expit(u),
    "gelu": lambda u: u * ndtr(u),
    "gelu_tanh": _gelu_tanh,
}
SLOPE = {  # as torch has them at 0 and at NaN
    "identity": np.ones_like,
    "relu": lambda u: np.where(u <= 0, 0.0, 1.0),
    "leaky_relu": lambda u: np.where(u > 0, 1.0, 0.01),
    "silu": lambda u: expit(u) * (1.0 + u * expit(-u)),
    "gelu": lambda u: ndtr(u) + u * np.exp(-0.5 * u**2) / np.sqrt(2.0 * np.pi),
    "gelu_tanh": _gelu_tanh_slope,
}
# Piecewise linear: the sum z + bias, the product and the constant 0.01 are rounded, once each. The others
# go through 0.5 (1 + erf(u)) and the like, whose error is relative to 1: hence relative to |u| and |dy|.
RTOL = {a: 3 * EPS if a in ("identity", "relu", "leaky_relu") else ELEMENTWISE for a in ACTIVATIONS}


def activation_inputs(rng, B, N):
    """z, bias, dy in float32; some pre-activations are exactly 0."""
    z, bias, dy = (rng.normal(0, 3, s).astype(np.float32) for s in ((B, N), N, (B, N)))
    z[::7] = -bias
    return z, bias, dy


def activation_checks(y, u, activation):
    """y against act(u)."""
    yield Check("y", y, VALUE[activation](u), RTOL[activation], np.abs(u))


def gradient_checks(dz, dbias, dy, u, activation):
    expected = dy * SLOPE[activation](u)
    yield Check("dz", dz, expected, RTOL[activation], np.abs(dy))
    # Each of the terms may be off by its own tolerance, too.
    yield Check("dbias", dbias, expected.sum(0), REDUCTION, np.abs(dy).sum(0))


# ---- softmax_cross_entropy


def logits_and_labels(rng, B, C):
    """Logits, each row to its own scale, and labels."""
    logits = rng.normal(0, 1, (B, C)) * 10.0 ** rng.uniform(-2, 2, (B, 1))
    return logits.astype(np.float32), rng.integers(0, C, B).astype(np.int32)


def confusion(logits, labels):
    """Counts at [label, prediction], the first largest logit that is not NaN; a label out of range counts nowhere."""
    C = logits.shape[1]
    rank = np.where(logits == -np.inf, -1e300, logits.astype(np.float64))  # below every float32, above what NaN gets
    prediction = np.where(np.isnan(rank), -np.inf, rank).argmax(axis=1)
    counts = np.zeros((C, C), np.int64)
    for label, predicted in zip(labels.tolist(), prediction.tolist(), strict=True):
        if 0 <= label < C:
            counts[label, predicted] += 1
    return counts


def weights_and_targets(labels, C, smoothing=0.0, weights=None):
    """The weight of each row, (B,), and its target distribution, (B, C); NaN for a label out of range."""
    valid = (labels >= 0) & (labels < C)
    safe = np.where(valid, labels, 0)
    of_rows = np.ones(len(labels)) if weights is None else weights.astype(np.float64)[safe]
    targets = (1 - smoothing) * (np.arange(C) == safe[:, None]) + smoothing / C
    return np.where(valid, of_rows, np.nan), targets


def softmax_cross_entropy(logits, labels, scale, smoothing=0.0, weights=None):
    """Row losses, dlogits, softmax and the number of rows that are right; a label out of range gives NaN."""
    x = logits.astype(np.float64)
    valid = (labels >= 0) & (labels < x.shape[1])
    safe = np.where(valid, labels, 0)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        shifted = x - x.max(axis=1, keepdims=True)
        e = np.exp(shifted)
        total = e.sum(axis=1, keepdims=True)
        own = np.take_along_axis(shifted, safe, 1)[:, 0]
        losses = np.log(total[:, 0]) - ((1 - smoothing) * own + smoothing * shifted.mean(1) if smoothing else own)
        softmax = e / total
    weight, targets = weights_and_targets(labels, x.shape[1], smoothing, weights)
    losses, dlogits = weight * losses, scale * weight[:, None] * (softmax - targets)
    right = np.count_nonzero((x.argmax(axis=1) == labels) & ~np.isnan(losses))
    return losses, dlogits, softmax, right


def dlogits_check(form, dlogits, expected, softmax, scale, targets=None):
    """The reduction's tolerance relative to softmax, and where a target is subtracted a rounding's relative to that.

    An exponential of the smallest float32 or less may be lost, and so may its product with the scale. scale: of the
    loss, or (B, 1), of each row. targets: (B, C); by default 1 at the label.
    """
    if targets is None:
        targets = np.abs(scale * softmax - expected) > 0.5 * scale
    lost = 2 * form.smallest * np.maximum(1.0, scale)
    bound = scale * (REDUCTION * softmax + ELEMENTWISE * targets) + lost
    return Check("dlogits", dlogits, expected, REDUCTION, bound / REDUCTION)


def loss_check(what, actual, losses, scale=1.0, weights=1.0):
    """log(sum of exponentials) is off by the sum's relative error: a row's loss is relative to 1 + loss.

    weights: the rows' weights, which are in the losses.
    """
    magnitude = scale * (weights + np.abs(losses)).sum()
    return Check(what, actual, np.float64(scale * losses.sum()), REDUCTION, magnitude)


# ---- adam_step, sgd_step and average_step

ADAM_CASES = {
    "defaults": dict(lr=1e-3),
    "l2": dict(lr=1e-2, weight_decay=0.1),
    "decoupled": dict(lr=1e-2, weight_decay=0.1, decoupled=True),
    "other betas": dict(lr=1e-3, beta1=0.5, beta2=0.95, eps=1e-3),
    "rms": dict(lr=1e-3, beta1=0.0),
    "no memory": dict(lr=1e-3, beta1=0.0, beta2=0.0),
    "lr 0": dict(lr=0.0, weight_decay=0.1, decoupled=True),
}
SGD_CASES = {
    "plain": dict(lr=0.1),
    "momentum": dict(lr=0.1, momentum=0.9),
    "l2": dict(lr=0.1, momentum=0.9, weight_decay=0.01),
    "l2 without momentum": dict(lr=0.1, weight_decay=0.01),
    "momentum above 1": dict(lr=0.1, momentum=1.5),
}


def optimizer_state(rng, P, fresh):
    """p, g, m, v; m and v are 0 where the optimizer is fresh. A third of p is 0: only its move shows."""
    p, g, m = (rng.normal(0, 1, P).astype(np.float32) for _ in range(3))
    p[::3] = 0.0
    g *= np.float32(10.0) ** rng.integers(-4, 3, P).astype(np.float32)
    v = (0.1 * g**2 + 0.1 * rng.random(P).astype(np.float32)) * 10
    return (p, g, 0 * m, 0 * v) if fresh else (p, g, m, v)


def adam(p, g, m, v, *, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled=False):
    """The new p, m, v in float64, and the tolerance of each.

    p is rounded once, when it is moved; decoupled decay rounds the factor that shrinks it and the product,
    too. The move is relative to what it would be if the terms of m had equal signs, because they may cancel. m, and its
    product with the step size, may be subnormal, rounded to a multiple of the least number, and then be divided by eps.
    """
    p, g, m, v = (x.astype(np.float64) for x in (p, g, m, v))
    l2 = 0.0 if decoupled else weight_decay
    gradient, size = g + l2 * p, np.abs(g) + l2 * np.abs(p)
    new_m = beta1 * m + (1 - beta1) * gradient
    new_v = beta2 * v + (1 - beta2) * gradient**2
    denominator = np.sqrt(new_v / (1 - beta2**step)) + eps
    step_size = lr / (1 - beta1**step)
    rate = step_size / denominator
    kept = p * (1 - lr * weight_decay) if decoupled else p
    m_size = beta1 * np.abs(m) + (1 - beta1) * size
    p_bound = (3 if decoupled else 1) * EPS * np.abs(p) + 2 * ELEMENTWISE * rate * m_size
    p_bound += (1 + step_size) * TINY / denominator
    v_bound = ELEMENTWISE * (beta2 * v + (1 - beta2) * size**2)
    return (kept - rate * new_m, new_m, new_v), (p_bound, ELEMENTWISE * m_size, v_bound)


def sgd(p, g, u, *, lr, momentum=0.0, weight_decay=0.0):
    """The new p and velocity in float64, and the tolerance of each."""
    p, g, u = (x.astype(np.float64) for x in (p, g, u))
    new_u = momentum * u + g + weight_decay * p
    u_size = momentum * np.abs(u) + np.abs(g) + weight_decay * np.abs(p)
    return (p - lr * new_u, new_u), (EPS * np.abs(p) + ELEMENTWISE * lr * u_size, ELEMENTWISE * u_size)


def average(a, p, *, decay, step):
    """The new average in float64, and its tolerance: it is rounded once, and what it moves by is."""
    a, p = a.astype(np.float64), p.astype(np.float64)
    share = 1.0 - min(decay, (1.0 + step) / (10.0 + step))
    return (a + share * (p - a),), (EPS * np.abs(a) + ELEMENTWISE * share * (np.abs(p) + np.abs(a)),)


def step_checks(form, names, actual, expected, bounds):
    """The arrays that an optimizer's step has changed, each within its bound."""
    for name, array, reference, bound in zip(names, actual, expected, bounds, strict=True):
        yield Check(name, array, reference, ELEMENTWISE, (bound + form.smallest) / ELEMENTWISE)


# ---- gather_batch

# Box-Muller in float32: the angle 2 pi u < 6.3 is off by a rounding of the product and one of 2 pi, together
# 4e-7, and the radius is at most sqrt(-2 log 2^-24) = 5.8.
NOISE = 3e-6
# A source coordinate adds four terms of up to 30 pixels in float32 and is off by up to 8e-6; neighbouring
# pixels differ by up to 1, in two directions.
WARP = 2e-5


def _uniform(word):
    """23 of 32 random bits as numbers in (0, 1)."""
    return (word // np.uint64(512) + 0.5) / 2**23


def noise(index, D, seed, draw=0):
    """Box-Muller in float64 over Philox bits: counter (pixel // 4, image, draw, 0), 23 bits per number."""
    result = np.zeros((len(index), D + 3))
    for row, image in zip(result, index, strict=True):
        quads = np.arange(-(-D // 4), dtype=np.uint64)
        counters = quads, *(np.full_like(quads, word) for word in (image, draw % 2**32, 0))
        bits = philox4x32(np, counters, seed % 2**32, seed // 2**32)
        a, b, c, d = map(_uniform, bits)
        for k, (first, second) in enumerate([(a, b), (c, d)]):
            radius, angle = np.sqrt(-2 * np.log(first)), 2 * np.pi * second
            row[2 * k :: 4][: len(quads)] = radius * np.cos(angle)
            row[2 * k + 1 :: 4][: len(quads)] = radius * np.sin(angle)
    return result[:, :D]


def of_images(index, seed, draw=0):
    """The eight uniform numbers (B, 8) that each image has: Philox's words of counters (0 and 1, image, draw, 2)."""
    rows = []
    for image in index:
        counters = np.arange(2, dtype=np.uint64), *(np.full(2, word, np.uint64) for word in (image, draw % 2**32, 2))
        rows.append(np.stack(philox4x32(np, counters, seed % 2**32, seed // 2**32)).T.ravel())
    return _uniform(np.array(rows, np.uint64).reshape(-1, 8))


def maps(index, augment, seed, draw=0):
    """The matrices (B, 2, 3) that are drawn for images, as products of rotation, shear and scaling."""
    result = []
    for turn, shear, *zoom, right, down, _, _ in of_images(index, seed, draw):
        angle = np.radians(augment.rotation * (2 * turn - 1))
        rotated = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        sheared = np.array([[1.0, augment.shear * (2 * shear - 1)], [0.0, 1.0]])
        scaled = np.diag(1 + augment.scale * (2 * np.array(zoom) - 1))
        shift = augment.shift * (2 * np.array([right, down]) - 1)
        result.append(np.column_stack([rotated @ sheared @ scaled, shift]))
    return np.array(result).reshape(-1, 2, 3)


def warped(images, affine):
    """Bilinear values of square images (B, D) at their maps affine (B, 2, 3), as a fraction of 255.

    SciPy's `grid-constant` interpolates towards zeros beyond the edge, as the op does.
    """
    side = math.isqrt(images.shape[1])
    centre = (side - 1) / 2
    row, column = np.mgrid[:side, :side] - centre
    result = np.empty(images.shape)
    for k, a in enumerate(affine.astype(np.float64)):
        source = [a[1, 0] * column + a[1, 1] * row + a[1, 2], a[0, 0] * column + a[0, 1] * row + a[0, 2]]
        image = images[k].reshape(side, side) / 255.0
        values = ndimage.map_coordinates(image, np.array(source) + centre, order=1, mode="grid-constant")
        result[k] = values.ravel()
    return result


def positions(index, begin, B):
    """index[begin : begin + B], and -1 where a position is outside of it."""
    return np.array([index[p] if 0 <= p < len(index) else -1 for p in range(begin, begin + B)], np.int32)


def gather_checks(x, y, images, labels, index, *, mean=0.0, scale=1.0, noise_sigma=0.0, seed=0, affine=None,
                  numbers=None, draw=0, noise_uniform=False, augment=None):  # fmt: skip
    valid = (index >= 0) & (index < len(images))
    safe = np.where(valid, index, 0)
    counted = safe if numbers is None else numbers[safe]
    if augment is not None:
        affine = maps(counted, augment, seed, draw)
    pixels = images[safe] / 255.0 if affine is None else warped(images[safe], affine)
    added = noise_sigma * noise(counted, images.shape[1], seed, draw) if noise_sigma else np.zeros_like(pixels)
    if noise_uniform:
        added *= of_images(counted, seed, draw)[:, 6:7]
    expected = np.where(valid[:, None], (pixels + added - mean) * scale, np.nan)
    absolute = noise_sigma * NOISE + (0.0 if affine is None else WARP)
    bound = abs(scale) * (ELEMENTWISE * (pixels + np.abs(added) + abs(mean)) + absolute)
    yield Check("x", x, expected, ELEMENTWISE + absolute, bound / (ELEMENTWISE + absolute))
    yield Check("y", y, np.where(valid, labels[safe], -1), 0.0)


# ---- shuffle


def _mixed(x):
    """fmix32 of MurmurHash3, in whole numbers without a limit."""
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def permutation(N, seed, epoch):
    """The positions from which shuffle takes its elements, one at a time, as src/shuffle.cuh describes them."""
    counter = [np.array([word], np.uint64) for word in (epoch, 0, 0, 1)]
    words = [int(word[0]) for word in philox4x32(np, counter, seed % 2**32, seed // 2**32)]
    bits = 8
    while 2**bits < N:
        bits += 1
    sizes = 2 ** (bits // 2), 2 ** (bits - bits // 2)
    result = np.empty(N, np.int64)
    for i in range(N):
        x = i
        while True:
            halves = [x % sizes[0], x // sizes[0]]
            for k in range(8):
                key = (words[k % 4] + k * 0x9E3779B9) % 2**32
                halves[k % 2] ^= _mixed(halves[1 - k % 2] ^ key) % sizes[k % 2]
            x = halves[1] * sizes[0] + halves[0]
            if x < N:
                break
        result[i] = x
    return result


# ---- to_bfloat16


def bfloat16(x):
    """The bits of the bfloat16 numbers nearest to float32 x, of two the even one, by comparing distances."""
    bits = x.view(np.uint32)
    below = bits >> 16  # towards zero; the next one, without the sign, is one more
    size, low, high = (_magnitude(b) for b in (bits, below << 16, (below + 1) << 16))
    up = (high - size < size - low) | ((high - size == size - low) & (below % 2 == 1))
    result = np.where(np.isinf(x), below, below + up)
    return np.where(np.isnan(x), below | 0x40, result).astype(np.uint16)


def _magnitude(bits):
    """|x| in float64 of the bits of float32 x; 2^128 of infinity's."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        value = np.abs(bits.view(np.float32).astype(np.float64))
    return np.where(np.isinf(value), 2.0**128, value)
