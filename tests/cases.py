"""Every kernel on the shapes and in the variants that trip kernels: one list for every way of executing them.

test_sanitizers.py runs it thread by thread and on the host library, under sanitizers; gpu_check.py on a GPU.
`representative()` is small, yet launches every kernel and takes every branch: packs of 4 and single elements,
rows in registers and in memory, one block and a last block that adds what the others left. `every()` goes
through the awkward shapes of checks.py, too.
"""

import contextlib
import itertools
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from unittest import mock

import numpy as np

from kernels import ACTIVATIONS
from kernels.launches import REGISTER_ROWS, softmax_kernel

from . import references
from .checks import FEW_SHAPES, OFFSETS, Backend, Check

SEED = 0xFEDC_BA98_7654_3210
OUT_OF_RANGE = (-1, 2**31 - 1, -(2**31))  # labels and indices; beside them the first that is too large
ONE_BLOCK = 0  # multiprocessors with which the smallest grid is chosen, so that its threads loop


@dataclass(frozen=True)
class Case:
    """One launch. `compute` makes the inputs, runs the op on a backend and gives the checks of its results."""

    kernel: str  # the entry point of module.cu
    name: str
    compute: Callable[[np.random.Generator, Backend], Iterable[Check]]
    multiprocessors: int | None = None  # to launch for, where the device's own number will not do

    def run(self, backend: Backend) -> list[Check]:
        rng, launch_for = np.random.default_rng(zlib.crc32(str(self).encode())), contextlib.nullcontext()
        if self.multiprocessors is not None and backend.device is not None:
            launch_for = mock.patch.object(backend.device, "multiprocessors", lambda: self.multiprocessors)
        with launch_for, np.errstate(all="ignore"):
            return list(self.compute(rng, backend))

    def measure(self, backend: Backend) -> dict:
        """The check that comes closest to its tolerance, or what went wrong, as gpu_check.py writes it."""
        result = {"kernel": self.kernel, "case": self.name, "passed": False}
        try:
            worst = max(self.run(backend), key=lambda c: c.error() / c.tolerance if c.tolerance else c.error())
        except Exception as error:
            return result | {"error": f"{type(error).__name__}: {error}"}
        error = worst.error()
        result |= {"what": worst.what, "max_relative_error": error, "tolerance": worst.tolerance}
        return result | {"passed": error <= worst.tolerance}

    def __str__(self):
        return f"{self.kernel} {self.name}"


def _name(*shape, multiprocessors=None, **variant) -> str:
    """"33x47 offset 1 in_place": what differs from the defaults."""
    words = ["x".join(map(str, shape))]
    words += [k if v is True else f"{k} {v}" for k, v in variant.items() if v is not False and v != 0]
    words += [f"on {multiprocessors} multiprocessors"] * (multiprocessors is not None)
    return " ".join(words)


def _case(kernel, compute, *shape, multiprocessors=None, **variant) -> Case:
    name = _name(*shape, multiprocessors=multiprocessors, **variant)
    return Case(kernel, name, lambda rng, backend: compute(rng, backend, *shape, **variant), multiprocessors)


def _output(backend, offset, like=None, shape=None, dtype=np.float32):
    """An output, and the check of what is beside it; with the values of `like` where it is an input as well."""
    out, intact = backend.outputs(*(like.shape if shape is None else shape), dtype=dtype, offset=offset)
    if like is not None:
        out[...] = backend.array(like)
    return out, intact


def bias_act(activation, *shape, **variant) -> Case:
    def compute(rng, backend, B, N, offset=0, in_place=False):
        z, bias, _ = references.activation_inputs(rng, B, N)
        y, intact = _output(backend, offset, z if in_place else None, (B, N))
        source = y if in_place else backend.array(z, offset=offset)
        backend.ops.bias_act(source, backend.array(bias), activation, out=y)
        intact()
        return references.activation_checks(y, z.astype(np.float64) + bias, activation)

    return _case(f"bias_act_{activation}", compute, *shape, **variant)


def bias_act_backward(activation, *shape, **variant) -> Case:
    def compute(rng, backend, B, N, offset=0, in_place=False, with_bias=False):
        z, bias, dy = references.activation_inputs(rng, B, N)
        u = z + bias
        dz, intact = _output(backend, offset, dy if in_place else None, (B, N))
        dbias, dbias_intact = _output(backend, offset, shape=(N,))
        source = dz if in_place else backend.array(dy, offset=offset)
        saved = backend.array(z if with_bias else u, offset=offset)
        added = backend.array(bias) if with_bias else None
        backend.ops.bias_act_backward(source, saved, activation, added, out=dz, bias_grad=dbias)
        intact()
        dbias_intact()
        return references.gradient_checks(dz, dbias, dy, u.astype(np.float64), activation)

    return _case(f"bias_act_backward_{activation}", compute, *shape, **variant)


def _softmax(rng, backend, B, C, offset=0, in_place=False, totals=True, scale=None, labels="", logits=""):
    x, y = references.logits_and_labels(rng, B, C)
    if labels:
        y[1::3] = np.resize((*OUT_OF_RANGE, C), y[1::3].size)
    if logits:
        x[1, C // 2] = float(logits)
    dlogits, intact = _output(backend, offset, x if in_place else None, (B, C))
    sums = backend.array([0.0, 0.0], np.float64) if totals else None
    loss, _ = backend.ops.softmax_cross_entropy(
        dlogits if in_place else backend.array(x, offset=offset),
        backend.array(y, np.int32, offset), scale, out=dlogits, totals=sums,
    )  # fmt: skip
    intact()
    scale = scale or (1.0 / B if B else np.nan)
    losses, expected, softmax, right = references.softmax_cross_entropy(x, y, scale)
    yield references.dlogits_check(backend, dlogits, expected, softmax, scale)
    yield references.loss_check("loss", loss, losses, scale)
    if totals:
        yield references.loss_check("totals[0]", sums[0], losses)
        yield Check("totals[1]", sums[1], np.float64(right), 0.0)


def softmax_cross_entropy(*shape, **variant) -> Case:
    return _case(softmax_kernel(shape[1]), _softmax, *shape, **variant)


def _adam(rng, backend, P, settings="defaults", step=3, offset=0, device_scalars=False):
    state, options = references.optimizer_state(rng, P, fresh=step == 1), references.ADAM_CASES[settings]
    (p, *a), (m, *b), (v, *c) = (_output(backend, offset, state[k]) for k in (0, 2, 3))
    passed = options | {"step": step}
    if device_scalars:
        passed |= {"step": backend.array(step), "lr": backend.array(options["lr"])}
    backend.ops.adam_step(p, backend.array(state[1], offset=offset), m, v, **passed)
    for intact in (*a, *b, *c):
        intact()
    return references.step_checks(backend, "pmv", (p, m, v), *references.adam(*state, step=step, **options))


def adam(*shape, **variant) -> Case:
    return _case("adam", _adam, *shape, **variant)


def _sgd(rng, backend, P, settings="momentum", offset=0, velocity=True, device_scalars=False):
    p, g, u, _ = references.optimizer_state(rng, P, fresh=False)
    options = references.SGD_CASES[settings]
    outputs = [_output(backend, offset, x) for x in ((p, u) if velocity else (p,))]
    passed = options | ({"lr": backend.array(options["lr"])} if device_scalars else {})
    arrays = [out for out, _ in outputs]
    backend.ops.sgd_step(arrays[0], backend.array(g, offset=offset), *arrays[1:], **passed)
    for _, intact in outputs:
        intact()
    expected, bounds = references.sgd(p, g, u, **options)
    n = len(arrays)
    return references.step_checks(backend, ("p", "velocity")[:n], arrays, expected[:n], bounds[:n])


def sgd(*shape, **variant) -> Case:
    return _case("sgd", _sgd, *shape, **variant)


def _gather(rng, backend, B, D, images=7, offset=0, index="", affine=False, **settings):
    pixels, labels = rng.integers(0, 256, (images, D), np.uint8), rng.integers(-5, 50, images).astype(np.int32)
    rows, maps = rng.integers(0, images, B).astype(np.int32), None
    if index:
        rows[1::2] = np.resize((*OUT_OF_RANGE, images), rows[1::2].size)
    if affine:
        maps = (np.eye(2, 3) + rng.normal(0, 0.3, (B, 2, 3)) * [1, 1, D**0.5 / 2]).astype(np.float32)
    x, intact = _output(backend, offset, shape=(B, D))
    y, y_intact = _output(backend, offset, shape=(B,), dtype=np.int32)
    backend.ops.gather_batch(
        backend.array(pixels, np.uint8, offset), backend.array(labels, np.int32, offset),
        backend.array(rows, np.int32, offset), out_x=x, out_y=y, seed=SEED,
        affine=None if maps is None else backend.array(maps, offset=offset), **settings,
    )  # fmt: skip
    intact()
    y_intact()
    return references.gather_checks(x, y, pixels, labels, rows, seed=SEED, affine=maps, **settings)


def gather(*shape, **variant) -> Case:
    return _case("gather", _gather, *shape, **variant)


def _representative():
    for a in ACTIVATIONS:
        yield bias_act(a, 3, 33)
        yield bias_act(a, 5, 7, offset=1)
        yield bias_act_backward(a, 17, 48, with_bias=True, multiprocessors=1)
        yield bias_act_backward(a, 5, 33)
    for case in (bias_act, bias_act_backward):
        for shape in ((0, 5), (1, 1), (4, 3)):  # an empty batch; fewer columns than a pack
            yield case("relu", *shape)
        yield case("relu", 2, 400, in_place=True)
        yield case("identity", 9, 12, in_place=True)  # backward: only the column sums
        yield case("identity", 9, 11, in_place=True, offset=1)
        yield case("relu", 30, 41, multiprocessors=ONE_BLOCK)
        yield case("relu", 30, 40, multiprocessors=ONE_BLOCK)
    yield bias_act_backward("relu", 70, 4, multiprocessors=4)  # the last block's threads add two partial sums
    yield bias_act_backward("relu", 9, 127, multiprocessors=2, offset=1, with_bias=True)
    for items in REGISTER_ROWS:
        yield softmax_cross_entropy(2, 32 * items)
    for shape in ((2, 1025), (0, 5), (1, 1), (9, 5)):
        yield softmax_cross_entropy(*shape, offset=1)
    yield softmax_cross_entropy(10, 3, multiprocessors=ONE_BLOCK, totals=False, scale=0.5)
    for C in (33, 1030):
        yield softmax_cross_entropy(2, C, in_place=True)
        yield softmax_cross_entropy(7, C, labels="out of range")
        yield softmax_cross_entropy(2, C, logits="nan")
    for step in (adam, sgd):
        for P in (0, 1, 37):
            yield step(P)
        yield step(37, offset=1)
        yield step(1100, multiprocessors=ONE_BLOCK, settings="l2")
        yield step(5, device_scalars=True)
    yield adam(6, settings="decoupled", step=1)
    yield sgd(37, settings="plain", velocity=False)
    yield sgd(6, settings="l2 without momentum", velocity=False, offset=1)
    yield from (gather(0, 5), gather(1, 1, images=1), gather(3, 16), gather(3, 16, offset=1), gather(3, 9))
    yield gather(40, 49, mean=0.25, scale=2.0, multiprocessors=ONE_BLOCK)
    for variant in ({"noise_sigma": 0.5}, {"affine": True}, {"noise_sigma": 0.5, "affine": True}):
        yield gather(3, 9, **variant)
        yield gather(8, 16, index="out of range", **variant)


def representative() -> list[Case]:
    return list(_representative())


def _shapes(shapes, sizes):
    for a, (B, N), offset in itertools.product(ACTIVATIONS, shapes, OFFSETS):
        if a in ("relu", "gelu") or (B, N) in FEW_SHAPES:  # the shapes' own branches do not depend on it
            yield bias_act(a, B, N, offset=offset)
            yield bias_act_backward(a, B, N, offset=offset)
            yield bias_act_backward(a, B, N, offset=offset, with_bias=True)
    around_registers = [(3, 32 * items + more) for items in REGISTER_ROWS for more in (0, 1)]
    for (B, C), offset in itertools.product([*shapes, *around_registers, (2, 5000)], OFFSETS):
        yield softmax_cross_entropy(B, C, offset=offset)
    for P, offset in itertools.product(sizes, OFFSETS):
        for step, settings in itertools.product((1, 1000), references.ADAM_CASES):
            yield adam(P, settings=settings, step=step, offset=offset)
        for settings, options in references.SGD_CASES.items():
            for velocity in (True, False) if not options.get("momentum") else (True,):
                yield sgd(P, settings=settings, velocity=velocity, offset=offset)
    for (B, D), offset in itertools.product([*shapes, (5, 784)], OFFSETS):
        yield gather(B, D, offset=offset, mean=0.17, scale=3.0)
        yield gather(B, D, offset=offset, noise_sigma=0.5)
        if int(D**0.5) ** 2 == D:
            yield gather(B, D, offset=offset, affine=True)


def _large():
    """Enough for several waves of blocks on a GPU, and for the CPU to share among threads."""
    for a in ACTIVATIONS:
        yield bias_act(a, 4000, 601)
        yield bias_act_backward(a, 4000, 601, with_bias=True)
    yield bias_act_backward("identity", 20_000, 47)
    for shape in ((20_000, 47), (3000, 400), (2057, 1), (600, 2000)):
        yield softmax_cross_entropy(*shape)
    yield adam(1_500_001)
    yield sgd(1_500_001)
    yield sgd(1_500_001, settings="plain", velocity=False)
    yield gather(2000, 784)
    yield gather(2000, 784, noise_sigma=0.5, affine=True)


def shared(least: int) -> list[Case]:
    """What the CPU shares among threads, where it does so for `least` units of work (about a nanosecond) or more."""
    rows = least // 47 + 1
    return [
        bias_act("relu", 6 * rows, 47), bias_act_backward("gelu", 2 * rows, 47, with_bias=True),
        bias_act_backward("identity", 4 * rows, 47, in_place=True), softmax_cross_entropy(rows, 47, offset=1),
        softmax_cross_entropy(rows, 47, labels="out of range"), adam(2 * least + 1), sgd(3 * least, offset=1),
        sgd(3 * least, settings="plain", velocity=False), gather(2 * rows, 47, offset=1, index="out of range"),
        gather(rows, 49, noise_sigma=0.5, affine=True),
    ]  # fmt: skip


def every(shapes, sizes, large: bool) -> list[Case]:
    """The representative list, the awkward shapes and sizes, and where execution is fast the large ones."""
    return [*representative(), *_shapes(shapes, sizes), *(_large() if large else ())]
