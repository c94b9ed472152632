"""What a layer's products must give (kernels/gemm.py), and how far from it they may be; and a list of launches, in
the form of cases.py: every kernel of src/gemm.cuh on shapes that trip kernels.

Tensor cores round the factors and multiply them exactly (11 + 11 or 8 + 8 bits), so against the float64 product of
the rounded factors only the float32 additions err: each of at most K and a few more by EPS of the sum of absolute
values, where they round to nearest; twice that on tensor cores, which cut off instead (Fasi et al. 2021, "Numerical
behavior of NVIDIA tensor cores"). Against the unrounded product each factor may be off by half a unit of its last
bit, too.
"""

import itertools

import numpy as np

from kernels import ACTIVATIONS
from kernels.gemm import PRECISIONS, Gemm, gemm_shape

from .case import ONE_BLOCK, Case, _name, _output
from .checks import EPS, Check
from .references import RTOL, SLOPE, VALUE

LAYERS = [(784, 400), (400, 240), (240, 120), (120, 47)]  # of the network: K, N
FORMS = ("forward", "input_gradient", "weight_gradient")
UNIT = {"tf32": 2.0**-11, "bf16": 2.0**-8}  # the largest relative error of a rounding
STEEPEST = 1.13  # the largest slope of an activation: gelu's


def round_tf32(x):
    """The nearest number with 10 bits of fraction, ties away from zero, of float32: cvt.rna.tf32.f32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def round_bf16(x):
    """The nearest number with 7 bits of fraction, ties to even, of float32: cvt.rn.bf16x2.f32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(x), rounded.view(np.float32), x)


ROUND = {"tf32": round_tf32, "bf16": round_bf16}


def product(a, b, precision, exact):
    """a b of the rounded factors in float64, and the bounds of a float32 result's distance from it and from that of
    the factors as they are. exact: additions round to nearest."""
    rounded = [ROUND[precision](x).astype(np.float64) for x in (a, b)]
    with np.errstate(invalid="ignore"):
        size = np.abs(rounded[0]) @ np.abs(rounded[1])
        bound = (a.shape[1] + 8) * (1 if exact else 2) * EPS * size
        of_roundings = 2.01 * UNIT[precision] * (np.abs(a) @ np.abs(b.astype(np.float64)))
        return rounded[0] @ rounded[1], bound, bound + of_roundings


def _check(what, actual, reference, bound):
    return Check(what, actual, reference, 1.0, bound)


def forward_checks(x, w, bias, activation, y, z, precision, exact):
    expected, bound, unrounded = product(x, w, precision, exact)
    u = expected + bias
    margin = STEEPEST * bound + (RTOL[activation] + EPS) * np.abs(u)
    yield _check("y", y, VALUE[activation](u), margin)
    u = x.astype(np.float64) @ w + bias
    yield _check("y of float32", y, VALUE[activation](u), STEEPEST * unrounded + (RTOL[activation] + EPS) * np.abs(u))
    if z is not None:
        yield _check("z", z, expected, bound)


def input_gradient_checks(dz, w, u, activation, dx, dbias, precision, exact):
    expected, bound, unrounded = product(dz, w.T, precision, exact)
    slope = SLOPE[activation](u.astype(np.float64))
    bound, unrounded = (STEEPEST * b + (RTOL[activation] + EPS) * np.abs(expected) for b in (bound, unrounded))
    yield _check("dx", dx, expected * slope, bound)
    yield _check("dx of float32", dx, (dz.astype(np.float64) @ w.T) * slope, unrounded)
    if dbias is not None:
        added = (len(dz) + 2) * EPS * np.abs(expected * slope).sum(0)
        yield _check("dbias", dbias, (expected * slope).sum(0), bound.sum(0) + added)


def weight_gradient_checks(x, dz, dw, precision, exact):
    expected, bound, unrounded = product(x.T, dz, precision, exact)
    yield _check("dw", dw, expected, bound)
    yield _check("dw of float32", dw, x.T.astype(np.float64) @ dz, unrounded)


def _normal(rng, *shape):
    return rng.normal(0, 1, shape).astype(np.float32)


def _forward(rng, backend, precision, B, K, N, offset=0, activation="identity", bias=True, z=False):
    x, w, b = _normal(rng, B, K), _normal(rng, K, N), _normal(rng, N) if bias else np.zeros(N, np.float32)
    (y, y_intact), (pre, z_intact) = (_output(backend, offset, shape=(B, N)) for _ in range(2))
    inputs = backend.array(x, offset=offset), backend.array(w, offset=offset)
    optional = {"bias": backend.array(b, offset=offset) if bias else None, "z": pre if z else None}
    result = Gemm(backend.device, precision).forward(*inputs, y, activation=activation, **optional)
    assert result is y
    y_intact()
    z_intact()
    return forward_checks(x, w, b, activation, y, pre if z else None, precision, backend.xp is np)


def _input_gradient(rng, backend, precision, B, K, N, offset=0, activation="identity", bias=False, sums=True):
    dz, w, saved, b = _normal(rng, B, N), _normal(rng, K, N), _normal(rng, B, K), _normal(rng, K)
    saved[::7] = -b if bias else 0.0  # pre-activations that are exactly 0
    (dx, dx_intact), (dbias, intact) = _output(backend, offset, shape=(B, K)), _output(backend, offset, shape=(K,))
    arrays = backend.array(dz, offset=offset), backend.array(w, offset=offset)
    optional = {"bias_grad": dbias if sums else None, "bias": backend.array(b, offset=offset) if bias else None}
    if activation != "identity":
        optional["saved"] = backend.array(saved, offset=offset)
    gemm = Gemm(backend.device, precision)
    assert gemm.input_gradient(*arrays, dx, activation=activation, **optional) is dx
    dx_intact()
    intact()
    u = saved + b if bias else saved
    return input_gradient_checks(dz, w, u, activation, dx, dbias if sums else None, precision, backend.xp is np)


def _weight_gradient(rng, backend, precision, B, K, N, offset=0):
    x, dz = _normal(rng, B, K), _normal(rng, B, N)
    dw, intact = _output(backend, offset, shape=(K, N))
    inputs = backend.array(x, offset=offset), backend.array(dz, offset=offset)
    assert Gemm(backend.device, precision).weight_gradient(*inputs, dw) is dw
    intact()
    return weight_gradient_checks(x, dz, dw, precision, backend.xp is np)


# The layer's (B, K, N) for C (M, N) = A (M, K) B (K, N).
_LAYER = {
    "forward": (_forward, lambda M, N, K: (M, K, N)),
    "input_gradient": (_input_gradient, lambda M, N, K: (M, N, K)),
    "weight_gradient": (_weight_gradient, lambda M, N, K: (K, M, N)),
}


def case(form, precision, *shape, multiprocessors=2, **variant) -> Case:
    """The product C (M, N) = A (M, K) B (K, N), shape being (M, N, K), launched for so many multiprocessors."""
    compute, layer = _LAYER[form]
    kernel = f"gemm_{form}_{precision}_{gemm_shape(*shape, multiprocessors).rows}"

    def run(rng, backend):
        return compute(rng, backend, precision, *layer(*shape), **variant)

    return Case(kernel, _name(*shape, multiprocessors=multiprocessors, **variant), run, multiprocessors)


def few() -> list[Case]:
    """Every kernel once, with all that its form can do: tiles that end in every direction, odd pitches, more tiles than
    places for them in shared memory, small tiles whose K blocks share, and sums of columns that cross tiles."""
    all_that_it_can = {
        "forward": {"activation": "gelu", "z": True},
        "input_gradient": {"activation": "silu", "bias": True},
        "weight_gradient": {},
    }
    launches = ((70, 47, 356), 4), ((130, 33, 50), ONE_BLOCK)
    return [
        case(form, precision, *shape, multiprocessors=multiprocessors, **all_that_it_can[form])
        for (shape, multiprocessors), form, precision in itertools.product(launches, FORMS, PRECISIONS)
    ]


def _more():
    for form, precision in itertools.product(FORMS, PRECISIONS):
        yield case(form, precision, 20, 68, 40)  # 16 bytes at once and two columns of tiles
        yield case(form, precision, 36, 72, 24, multiprocessors=ONE_BLOCK)
        yield case(form, precision, 24, 36, 72, offset=1, multiprocessors=1)  # nothing is aligned
        yield case(form, precision, 1, 1, 1)
    for form, precision in zip(FORMS, ("tf32", "bf16", "tf32"), strict=True):
        yield case(form, precision, 3, 5, 0)
        yield case(form, precision, 0, 5, 3)
    yield case("forward", "tf32", 9, 34, 7, offset=2, z=True, activation="silu")
    yield case("forward", "bf16", 9, 35, 7, z=True, bias=False)
    yield case(
        "input_gradient", "tf32", 70, 66, 5
    )  # two rows and two columns of tiles, each of which adds its own sums
    yield case("input_gradient", "bf16", 65, 6, 6, sums=False, activation="relu")
    yield case("input_gradient", "bf16", 129, 12, 8, multiprocessors=ONE_BLOCK, activation="gelu", bias=True)
    for a in ACTIVATIONS:
        yield case("forward", "tf32", 5, 10, 8, activation=a)
        yield case("input_gradient", "tf32", 9, 11, 4, activation=a, bias=True)


def products() -> list[Case]:
    """All of them."""
    return [*few(), *_more()]
