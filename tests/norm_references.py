"""What batch_norm_stats, norm_act and norm_act_backward must give, in float64: more of references.py."""

import numpy as np

from kernels.plain_random import philox4x32

from .checks import ELEMENTWISE, EPS, REDUCTION, Check
from .references import RTOL, SLOPE, VALUE

EPSILON = 1e-5  # the eps of the ops, where a test gives none


def keep(B, N, p, *, seed=0, layer=0, step=0, row=0):
    """What dropout keeps: word j % 4 of Philox at counter (j // 4, row + b, step, 3 + 256 layer) is at least p 2^32."""
    result = np.zeros((B, N + 3), bool)
    for b, kept in enumerate(result):
        quads = np.arange(-(-N // 4), dtype=np.uint64)
        counters = quads, *(np.full_like(quads, x) for x in (row + b, step, 3 + 256 * layer))
        for k, words in enumerate(philox4x32(np, counters, seed % 2**32, seed // 2**32)):
            kept[k::4][: len(quads)] = words >= round(p * 2**32)
    return result[:, :N]


def factors(B, N, p, **counted):
    return keep(B, N, p, **counted) / (1.0 - p) if p else np.ones((B, N))


def norm_inputs(rng, B, N, norm):
    """z, dy (B, N), bias (N,) and the arrays of a normalisation by name, all float32. dy is 0 where the sign of u is
    in the last digits: there, relu's derivative may as well be 0 or 1."""
    z = (rng.normal(0, 2, (B, N)) + rng.normal(0, 3, N)).astype(np.float32)
    bias, dy = (rng.normal(0, 1, shape).astype(np.float32) for shape in (N, (B, N)))
    arrays = {}
    if norm:
        mean, var = moments(z)
        arrays = {"mean": mean, "var": var, "weight": rng.normal(1, 0.3, N)}
        arrays = {name: x.astype(np.float32) for name, x in arrays.items()}
    u, size, _ = pre_activation(z, bias, **arrays)
    dy[np.abs(u) <= 8 * EPS * size] = 0.0
    return z, dy, bias, arrays


def moments(z):
    """The mean and the variance of each column; of no rows, 0 and 1, for a normalisation of nothing."""
    z = z.astype(np.float64)
    return (z.mean(0), z.var(0)) if len(z) else (np.zeros(z.shape[1]), np.ones(z.shape[1]))


def pre_activation(z, bias, mean=None, var=None, weight=None, eps=EPSILON):
    """u, the sum of the sizes of its terms, and xhat (z itself without normalisation)."""
    z, bias = z.astype(np.float64), bias.astype(np.float64)
    xhat, scale = z, 1.0
    if mean is not None:
        xhat, scale = (z - mean.astype(np.float64)) / np.sqrt(var.astype(np.float64) + eps), weight.astype(np.float64)
    return xhat * scale + bias, np.abs(xhat * scale) + np.abs(bias), xhat


def statistics_checks(z, mean, var, running=None, before=None, momentum=0.1):
    """running, before: the running mean and variance, and what they were."""
    if not len(z):
        nan = np.full(z.shape[1], np.nan)
        results = {"mean": (mean, nan), "var": (var, nan)}
        if running is not None:
            results |= {"running_mean": (running[0], before[0]), "running_var": (running[1], before[1])}
        yield from (Check(what, actual, expected, 0.0) for what, (actual, expected) in results.items())
        return
    expected_mean, expected_var = moments(z)
    largest = np.abs(z.astype(np.float64)).max(0)  # a rounding of which is in each deviation
    mean_bound = 0.1 * REDUCTION * largest
    var_bound = REDUCTION * expected_var + 8 * EPS * largest * np.sqrt(expected_var) + (8 * EPS * largest) ** 2
    yield Check("mean", mean, expected_mean, REDUCTION, mean_bound / REDUCTION)
    yield Check("var", var, expected_var, REDUCTION, var_bound / REDUCTION)
    if running is None:
        return
    unbiased = len(z) / max(1, len(z) - 1)
    for what, actual, old, new, bound in (
        ("running_mean", running[0], before[0], expected_mean, mean_bound),
        ("running_var", running[1], before[1], expected_var * unbiased, var_bound * unbiased),
    ):
        old = old.astype(np.float64)
        bound = momentum * bound + 4 * EPS * (np.abs(old) + momentum * np.abs(new))
        yield Check(what, actual, old + momentum * (new - old), REDUCTION, bound / REDUCTION)


def value_check(y, z, bias, activation, arrays, p=0.0, eps=EPSILON, **counted):
    """A sum z + bias is rounded once, and a normalisation some times more."""
    u, size, _ = pre_activation(z, bias, **arrays, eps=eps)
    kept = factors(*z.shape, p, **counted)
    tolerance = ELEMENTWISE if arrays else RTOL[activation] + 2 * EPS
    return Check("y", y, VALUE[activation](u) * kept, tolerance, size * kept)


def norm_gradient_checks(results, dy, z, bias, activation, arrays, p=0.0, eps=EPSILON, **counted):
    """results: dz, dbias and dweight. Every sum is relative to that of the sizes of its terms."""
    dz, dbias, dweight = results
    B = max(1, len(z))
    u, _, xhat = pre_activation(z, bias, **arrays, eps=eps)
    dy = dy.astype(np.float64) * factors(*z.shape, p, **counted)
    du, size = dy * SLOPE[activation](u), np.abs(dy)
    yield Check("dbias", dbias, du.sum(0), REDUCTION, size.sum(0))
    if not arrays:
        assert dweight is None
        yield Check("dz", dz, du, RTOL[activation] + 2 * EPS, size)
        return
    product, product_size = (du * xhat).sum(0), (size * np.abs(xhat)).sum(0)
    yield Check("dweight", dweight, product, REDUCTION, product_size)
    scale = arrays["weight"].astype(np.float64) / np.sqrt(arrays["var"].astype(np.float64) + eps)
    bound = np.abs(scale) * (size + size.sum(0) / B + np.abs(xhat) * product_size / B)
    yield Check("dz", dz, scale * (du - du.sum(0) / B - xhat * product / B), REDUCTION, bound)
