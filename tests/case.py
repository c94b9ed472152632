"""One launch of one kernel with the checks of its results; cases.py has the list of them.

The functions that are named like the ops make a Case of a shape and a variant.
"""

import contextlib
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from unittest import mock

import numpy as np

from kernels import plain
from kernels.launches import softmax_items

from . import references
from .checks import Backend, Check, to_numpy

SEED = 0xFEDC_BA98_7654_3210
OUT_OF_RANGE = (-1, 2**31 - 1, -(2**31))  # labels and indices; beside them the first that is too large
ONE_BLOCK = 0  # multiprocessors with which the smallest grid is chosen, so that its threads loop


@dataclass(frozen=True)
class Case:
    """One launch. `compute` makes the inputs, runs the op on a backend and gives checks of the results."""

    kernel: str  # the entry point of module.cu
    name: str
    compute: Callable[[np.random.Generator, Backend], Iterable[Check]]
    multiprocessors: int | None = None  # to launch for, where the device's own number will not do
    also: tuple = ()  # other entry points that the op launches

    def run(self, backend: Backend) -> list[Check]:
        rng = np.random.default_rng(zlib.crc32(str(self).encode()))
        launch_for = contextlib.nullcontext()
        if self.multiprocessors is not None and backend.device is not None:
            launch_for = mock.patch.object(backend.device, "multiprocessors", lambda: self.multiprocessors)
        with launch_for, np.errstate(all="ignore"):
            return list(self.compute(rng, backend))

    def measure(self, backend: Backend) -> dict:
        """The check that comes closest to its tolerance, or what went wrong, as gpu_check.py writes it."""
        result = {"kernel": self.kernel, "case": self.name, "passed": False}
        try:
            worst = max(self.run(backend), key=Check.share)
        except Exception as error:
            return result | {"error": f"{type(error).__name__}: {error}"}
        result |= {"what": worst.what, "max_relative_error": worst.error(), "tolerance": worst.tolerance}
        return result | {"passed": worst.share() <= 1.0}

    def __str__(self):
        return f"{self.kernel} {self.name}"


def _name(*shape, multiprocessors=None, **variant) -> str:
    """"33x47 offset 1 in_place": what differs from the defaults."""
    words = ["x".join(map(str, shape))]
    words += [k if v is True else f"{k} {v}" for k, v in variant.items() if v is not False and v != 0]
    words += [f"on {multiprocessors} multiprocessors"] * (multiprocessors is not None)
    return " ".join(words)


def _case(kernel, compute, *shape, multiprocessors=None, also=(), **variant) -> Case:
    name = _name(*shape, multiprocessors=multiprocessors, **variant)
    return Case(kernel, name, lambda rng, backend: compute(rng, backend, *shape, **variant), multiprocessors, also)


def _output(backend, offset, like=None, shape=None, dtype=np.float32):
    """An output, and the check of what is beside it; with the values of `like` where it is an input too."""
    out, intact = backend.outputs(*(like.shape if shape is None else shape), dtype=dtype, offset=offset)
    if like is not None:
        out[...] = backend.array(like, dtype)
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


def _softmax(rng, backend, B, C, offset=0, in_place=False, totals=True, scale=None, labels="", logits="", padding=0,
             confusion=False, smoothing=0.0, weighted=False):  # fmt: skip
    x, y = references.logits_and_labels(rng, B, C)
    weights = rng.uniform(0.1, 3.0, C).astype(np.float32) if weighted else None
    if labels:
        y[1::3] = np.resize((*OUT_OF_RANGE, C), y[1::3].size)
    if logits:
        x[1, C // 2] = float(logits)
    padded = np.pad(x, ((0, 0), (0, padding)), constant_values=np.nan)  # which must not be read
    dlogits, intact = _output(backend, offset, padded if in_place else None, padded.shape)
    sums = backend.array([0.0, 0.0], np.float64) if totals else None
    counts, counts_intact = _output(backend, offset, np.full((C, C), 5) if confusion else None, (C, C), np.int64)
    loss, _ = backend.ops.softmax_cross_entropy(
        dlogits if in_place else backend.array(padded, offset=offset),
        backend.array(y, np.int32, offset), scale, out=dlogits, totals=sums,
        confusion=counts if confusion else None, classes=C if padding else None, label_smoothing=smoothing,
        class_weights=None if weights is None else backend.array(weights, offset=offset),
    )  # fmt: skip
    intact()
    counts_intact()
    scale = scale or (1.0 / B if B else np.nan)
    losses, expected, softmax, right = references.softmax_cross_entropy(x, y, scale, smoothing, weights)
    of_rows, targets = references.weights_and_targets(y, C, smoothing, weights)
    yield references.dlogits_check(backend, dlogits[:, :C], expected, softmax, scale * of_rows[:, None], targets)
    yield Check("padding", dlogits[:, C:], np.zeros((B, padding)), 0.0)
    yield references.loss_check("loss", loss, losses, scale, of_rows)
    if totals:
        yield references.loss_check("totals[0]", sums[0], losses, weights=of_rows)
        yield Check("totals[1]", sums[1], np.float64(right), 0.0)
    if confusion:
        yield Check("confusion", counts, 5 + references.confusion(x, y), 0.0)


def softmax_cross_entropy(*shape, **variant) -> Case:
    return _case(f"softmax_xent_{softmax_items(shape[1])}", _softmax, *shape, **variant)


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


def _average(rng, backend, P, decay=0.99, step=3, offset=0, device_scalars=False):
    a, p, *_ = references.optimizer_state(rng, P, fresh=False)
    average, intact = _output(backend, offset, a)
    passed = backend.array(step) if device_scalars else step
    backend.ops.average_step(average, backend.array(p, offset=offset), decay=decay, step=passed)
    intact()
    return references.step_checks(backend, ("average",), (average,), *references.average(a, p, decay=decay, step=step))


def average(*shape, **variant) -> Case:
    return _case("average", _average, *shape, **variant)


def _gather(rng, backend, B, D, images=7, offset=0, index="", affine=False, begin="", part=False, draw=None,
            batch_offset=None, **settings):  # fmt: skip
    pixels = rng.integers(0, 256, (images, D), np.uint8)
    labels = rng.integers(-5, 50, images).astype(np.int32)
    rows, maps = rng.integers(0, images, 2 * B if begin else B).astype(np.int32), None
    if index:
        rows[1::2] = np.resize((*OUT_OF_RANGE, images), rows[1::2].size)
    if affine:
        maps = (np.eye(2, 3) + rng.normal(0, 0.3, (B, 2, 3)) * [1, 1, D**0.5 / 2]).astype(np.float32)
    numbers = rng.permutation(1000)[:images] if part else None
    of_batch = offset if batch_offset is None else batch_offset
    x, intact = _output(backend, of_batch, shape=(B, D))
    y, y_intact = _output(backend, of_batch, shape=(B,), dtype=np.int32)
    backend.ops.gather_batch(
        backend.array(pixels, np.uint8, offset), backend.array(labels, np.int32, offset),
        backend.array(rows, np.int32, offset), out_x=x, out_y=y, seed=SEED,
        offset=backend.array([int(begin)], np.int64, offset) if begin else None,
        affine=None if maps is None else backend.array(maps, offset=offset),
        numbers=None if numbers is None else backend.array(numbers, np.int32, offset),
        draw=None if draw is None else backend.array([draw], np.int64, offset), **settings,
    )  # fmt: skip
    intact()
    y_intact()
    rows = references.positions(rows, int(begin), B) if begin else rows
    return references.gather_checks(
        x, y, pixels, labels, rows, seed=SEED, affine=maps, numbers=numbers, draw=draw or 0, **settings
    )


def gather(*shape, **variant) -> Case:
    augmented = any(variant.get(name) for name in ("affine", "noise_sigma", "augment"))
    return _case("gather_augmented" if augmented else "gather", _gather, *shape, **variant)


def _shuffle(rng, backend, N, offset=0, seed=SEED, epoch=3):
    index = rng.integers(-(2**31), 2**31, N).astype(np.int32)
    out, intact = _output(backend, offset, shape=(N,), dtype=np.int32)
    backend.ops.shuffle(backend.array(index, np.int32, offset), seed=seed, epoch=epoch, out=out)
    intact()
    if N <= 2000:
        yield Check("out", out, index[references.permutation(N, seed, epoch)], 0.0)
    else:
        yield Check("out", out, plain.shuffle(index, seed=seed, epoch=epoch), 0.0)


def shuffle(*shape, **variant) -> Case:
    return _case("shuffle", _shuffle, *shape, **variant)


def _advance(rng, backend, by, begin=7, step=None, offset=0):
    position, intact = _output(backend, offset, np.array([begin], np.int64), dtype=np.int64)
    count, count_intact = _output(backend, offset, np.array([step or 0.0], np.float32))
    backend.ops.advance(position, by, None if step is None else count)
    intact()
    count_intact()
    wrapped = (begin + by + 2**63) % 2**64 - 2**63
    yield Check("offset", to_numpy(position) == np.int64(wrapped), np.array([True]), 0.0)
    yield Check("step", count, np.array([0.0 if step is None else step + 1.0]), 0.0)


def advance(*shape, **variant) -> Case:
    return _case("advance", _advance, *shape, **variant)


def _to_bfloat16(rng, backend, n, offset=0):
    x = rng.integers(0, 2**32, n, np.uint32)
    x[::3] = x[::3] >> 16 << 16 | 0x8000  # ties
    x[1::7] = np.resize((0, 0x80000000, 0x7F800000, 0xFF800001, 0x7FFFFFFF, 0x7F7FFFFF, 1, 0x807FFFFF), x[1::7].size)
    y, intact = _output(backend, offset, shape=(n,), dtype=np.uint16)
    backend.ops.to_bfloat16(backend.array(x.view(np.float32), offset=offset), out=y)
    intact()
    yield Check("y", y, references.bfloat16(x.view(np.float32)), 0.0)


def to_bfloat16(*shape, **variant) -> Case:
    return _case("to_bfloat16", _to_bfloat16, *shape, **variant)
