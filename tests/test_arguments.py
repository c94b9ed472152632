"""What every op refuses: TypeError or ValueError that names the argument, before anything is written."""

import re
from dataclasses import dataclass

import numpy as np
import pytest

import kernels
from kernels import Augment

from .checks import assert_same_bits, to_numpy


@dataclass(frozen=True)
class Op:
    """An op with a valid value for each of its array arguments, and which of them it writes."""

    function: object
    arrays: dict
    outputs: frozenset
    numbers: dict
    fixed: frozenset = frozenset()  # arrays whose shape the others are compared with
    any_shape: frozenset = frozenset()  # arrays that may have any shape
    one_element: frozenset = frozenset()  # arrays of one element
    positional: int = 2  # leading arguments that may be given without their names

    def call(self, backend, *, positional=0, **changes):
        values = {name: backend.array(x, x.dtype) for name, x in self.arrays.items()} | self.numbers | changes
        first = [values.pop(name) for name in list(values)[:positional]]
        return self.function(*first, **values)


def _f(*shape):
    return np.full(shape, 0.5, np.float32)


def _i(*shape):
    return np.zeros(shape, np.int32)


ADAM = dict(step=1, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
NORM_ACT = dict(eps=1e-5, dropout=0.5, seed=3, layer=2, step=1, row=0)
OPS = {
    "bias_act": Op(
        kernels.bias_act,
        dict(z=_f(4, 6), bias=_f(6), out=_f(4, 6)),
        frozenset({"out"}), {}, frozenset({"z"}),
    ),
    "bias_act_backward": Op(
        kernels.bias_act_backward,
        dict(dy=_f(4, 6), saved=_f(4, 6), bias=_f(6), out=_f(4, 6), bias_grad=_f(6)),
        frozenset({"out", "bias_grad"}), {}, frozenset({"dy"}),
    ),
    "softmax_cross_entropy": Op(
        kernels.softmax_cross_entropy,
        dict(logits=_f(4, 6), labels=_i(4), out=_f(4, 6), totals=np.zeros(2), confusion=np.zeros((5, 5), np.int64)),
        frozenset({"out", "totals", "confusion"}), dict(scale=0.5, classes=5, label_smoothing=0.1),
        frozenset({"logits"}),
    ),
    "weighted softmax_cross_entropy": Op(
        kernels.softmax_cross_entropy,
        dict(logits=_f(4, 6), labels=_i(4), out=_f(4, 6), class_weights=_f(5)),
        frozenset({"out"}), dict(classes=5), frozenset({"logits"}),
    ),
    "adam_step": Op(
        kernels.adam_step,
        dict(p=_f(6), g=_f(6), m=_f(6), v=_f(6)),
        frozenset("pmv"), ADAM, frozenset("p"),
    ),
    "sgd_step": Op(
        kernels.sgd_step,
        dict(p=_f(6), g=_f(6), velocity=_f(6)),
        frozenset({"p", "velocity"}), dict(lr=0.1, momentum=0.9, weight_decay=0.0), frozenset("p"),
    ),
    "average_step": Op(
        kernels.average_step,
        dict(average=_f(6), p=_f(6)),
        frozenset({"average"}), dict(decay=0.9, step=1), frozenset({"average"}),
    ),
    "gather_batch": Op(
        kernels.gather_batch,
        dict(images=np.zeros((5, 9), np.uint8), labels=_i(5), index=_i(4), numbers=_i(5), affine=_f(4, 2, 3), out_x=_f(4, 9),
             out_y=_i(4)),
        frozenset({"out_x", "out_y"}), dict(mean=0.0, scale=1.0, noise_sigma=0.0, seed=0),
        frozenset({"images"}),
    ),
    "gather_batch at an offset": Op(
        kernels.gather_batch,
        dict(images=np.zeros((5, 9), np.uint8), labels=_i(5), index=_i(7), offset=np.zeros(1, np.int64), out_x=_f(4, 9),
             affine=_f(4, 2, 3), out_y=_i(4), draw=np.zeros(1, np.int64)),
        frozenset({"out_x", "out_y"}), dict(noise_sigma=0.5), frozenset({"images", "out_x"}),
        one_element=frozenset({"offset", "draw"}),
    ),
    "shuffle": Op(
        kernels.shuffle,
        dict(index=_i(6), out=_i(6)),
        frozenset({"out"}), dict(seed=3, epoch=2), frozenset({"index"}), positional=1,
    ),
    "advance": Op(
        kernels.advance,
        dict(offset=np.zeros(1, np.int64), step=_f(1)),
        frozenset({"offset", "step"}), dict(by=512), one_element=frozenset({"offset", "step"}), positional=1,
    ),
    "to_bfloat16": Op(
        kernels.to_bfloat16,
        dict(x=_f(4, 6), out=np.zeros((4, 6), np.uint16)),
        frozenset({"out"}), {}, any_shape=frozenset({"x"}),
    ),
    "batch_norm_stats": Op(
        kernels.batch_norm_stats,
        dict(z=_f(4, 6), mean=_f(6), var=_f(6), running_mean=_f(6), running_var=_f(6)),
        frozenset({"mean", "var", "running_mean", "running_var"}), dict(momentum=0.1), frozenset({"z"}), positional=1,
    ),
    "norm_act": Op(
        kernels.norm_act,
        dict(z=_f(4, 6), bias=_f(6), mean=_f(6), var=_f(6), weight=_f(6), out=_f(4, 6)),
        frozenset({"out"}), NORM_ACT, frozenset({"z"}),
    ),
    "norm_act_backward": Op(
        kernels.norm_act_backward,
        dict(dy=_f(4, 6), z=_f(4, 6), bias=_f(6), mean=_f(6), var=_f(6), weight=_f(6), out=_f(4, 6), bias_grad=_f(6),
             weight_grad=_f(6)),
        frozenset({"out", "bias_grad", "weight_grad"}), NORM_ACT, frozenset({"dy"}), positional=3,
    ),
}  # fmt: skip
ARGUMENTS = [(op, name) for op in OPS for name in OPS[op].arrays]
SHAPED = [(op, name) for op, name in ARGUMENTS if name not in OPS[op].any_shape]
LONGER = [(op, name) for op, name in ARGUMENTS if name not in OPS[op].one_element]
OUTPUTS = [(op, name) for op in OPS for name in sorted(OPS[op].outputs)]
NUMBERS = [(op, name) for op in OPS for name in OPS[op].numbers]


def _assert_refused(backend, op, error, name, value, **others):
    """`value` for the argument `name` raises `error` and names it; the outputs keep what they held."""
    outputs = {
        k: backend.array(x, x.dtype) for k, x in OPS[op].arrays.items() if k in OPS[op].outputs and k != name
    }
    argument, _, field = name.partition(".")
    given = {argument: Augment(**{field: value}) if field else value}
    with pytest.raises(error, match=rf"\b{re.escape(name)}\b"):
        OPS[op].call(backend, **(outputs | others | given))
    for k, array in outputs.items():
        assert_same_bits(array, OPS[op].arrays[k])


@pytest.mark.parametrize("op", OPS)
def test_the_valid_call_is_valid(backend, op):
    """Without this the refusals below could have other reasons."""
    OPS[op].call(backend)
    OPS[op].call(backend, positional=OPS[op].positional)


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_dtype(backend, op, name):
    valid = OPS[op].arrays[name]
    for dtype in (np.float16, np.float32, np.float64, np.int32, np.int64, np.uint8, np.uint16, np.bool_):
        if dtype != valid.dtype:
            _assert_refused(backend, op, TypeError, name, backend.array(valid, dtype))
    if backend.name == "host" and valid.itemsize > 1:
        _assert_refused(backend, op, TypeError, name, valid.astype(valid.dtype.newbyteorder()))


@pytest.mark.parametrize(("op", "name"), SHAPED)
def test_shape(backend, op, name):
    valid = OPS[op].arrays[name]
    wrong = [valid[None], valid.ravel() if valid.ndim > 1 else valid[:, None]]
    if name in OPS[op].one_element:
        wrong += [np.concatenate([valid, valid]), valid[:0]]
    else:
        wrong += [np.zeros((), valid.dtype)]
    if name not in OPS[op].fixed | OPS[op].one_element | {"index"}:  # the others must fit to these
        wrong += [np.concatenate([valid, valid]), valid[:1], valid[:0]]
        wrong += [valid[:, :1], np.concatenate([valid, valid], 1)] if valid.ndim > 1 else []
    for array in wrong:
        _assert_refused(backend, op, ValueError, name, backend.array(array, valid.dtype))


@pytest.mark.parametrize(("op", "name"), LONGER)
def test_not_contiguous(backend, op, name):
    valid = OPS[op].arrays[name]
    every_second = backend.array(np.repeat(valid, 2, axis=-1), valid.dtype)[..., ::2]
    _assert_refused(backend, op, ValueError, name, every_second)
    if valid.ndim == 2:
        _assert_refused(backend, op, ValueError, name, backend.array(valid.T, valid.dtype).T)


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_not_an_array(backend, op, name):
    valid = OPS[op].arrays[name]
    values = [valid.tolist(), 1.0, "array", valid.tobytes()]
    if backend.xp is not np and name != next(iter(OPS[op].arrays)):
        values.append(valid)  # a NumPy array among CuPy ones
    for value in values:
        _assert_refused(backend, op, TypeError, name, value)


@pytest.mark.parametrize(("op", "name"), OUTPUTS)
def test_read_only_output(op, name):
    array = OPS[op].arrays[name].copy()
    array.flags.writeable = False
    values = {k: x.copy() for k, x in OPS[op].arrays.items()} | OPS[op].numbers | {name: array}
    with pytest.raises(ValueError, match=rf"\b{name}\b.*read-only"):
        OPS[op].function(**values)
    assert_same_bits(array, OPS[op].arrays[name])


@pytest.mark.parametrize("op", ["bias_act", "bias_act_backward", "norm_act", "norm_act_backward"])
def test_activation(backend, op):
    for activation in ("tanh", "ReLU", "", None, 3, ["relu"]):
        _assert_refused(backend, op, ValueError, "activation", activation)


@pytest.mark.parametrize(("op", "name"), NUMBERS)
def test_numbers(backend, op, name):
    for value in (np.nan, np.inf, -np.inf):
        _assert_refused(backend, op, ValueError, name, value)
    for value in ("0.1", [0.1], np.zeros(2, np.float32), 1j):
        _assert_refused(backend, op, TypeError, name, value)


@pytest.mark.parametrize(
    ("op", "name", "value"),
    [
        ("adam_step", "step", 0),
        ("adam_step", "step", -1),
        ("adam_step", "lr", -0.1),
        ("adam_step", "beta1", 1.0),
        ("adam_step", "beta1", -0.1),
        ("adam_step", "beta2", 1.0),
        ("adam_step", "beta2", 2.0),
        ("adam_step", "eps", -1e-8),
        ("adam_step", "weight_decay", -0.1),
        ("sgd_step", "lr", -0.1),
        ("sgd_step", "momentum", -0.1),
        ("sgd_step", "weight_decay", -0.1),
        ("gather_batch", "noise_sigma", -0.1),
        ("gather_batch", "seed", -1),
        ("gather_batch", "seed", 2**64),
        ("shuffle", "seed", -1),
        ("shuffle", "seed", 2**64),
        ("shuffle", "epoch", -1),
        ("shuffle", "epoch", 2**32),
        ("advance", "by", -1),
        ("advance", "by", 2**63),
        ("batch_norm_stats", "momentum", -0.1),
        ("batch_norm_stats", "momentum", 1.1),
        ("norm_act", "eps", -1e-5),
        ("norm_act", "dropout", -0.1),
        ("norm_act", "dropout", 1.0),
        ("norm_act", "seed", 2**64),
        ("norm_act", "layer", -1),
        ("norm_act", "layer", 2**24),
        ("norm_act", "step", -1),
        ("norm_act", "row", -1),
        ("norm_act", "row", 2**32 - 3),  # of 4 rows the last would have no number
        ("norm_act_backward", "dropout", 1.0),
        ("norm_act_backward", "row", 2**32 - 3),
        ("average_step", "decay", -0.1),
        ("average_step", "decay", 1.0),
        ("average_step", "step", 0),
        ("softmax_cross_entropy", "label_smoothing", -0.1),
        ("softmax_cross_entropy", "label_smoothing", 1.0),
        ("softmax_cross_entropy", "classes", 0),
        ("softmax_cross_entropy", "classes", -1),
        ("softmax_cross_entropy", "classes", 7),
    ],
)
def test_numbers_out_of_range(backend, op, name, value):
    _assert_refused(backend, op, ValueError, name, value)


@pytest.mark.parametrize(("op", "name"), [
    ("adam_step", "step"), ("adam_step", "lr"), ("sgd_step", "lr"), ("norm_act", "step"), ("norm_act_backward", "step"),
    ("average_step", "step"),
])  # fmt: skip
def test_scalars_in_arrays(backend, op, name):
    _assert_refused(backend, op, TypeError, name, backend.array(1.0, np.float64))
    _assert_refused(backend, op, TypeError, name, backend.array([1.0, 1.0]))


@pytest.mark.parametrize(("op", "name"), [
    ("gather_batch", "seed"), ("shuffle", "seed"), ("shuffle", "epoch"), ("advance", "by"),
    ("softmax_cross_entropy", "classes"), ("norm_act", "seed"), ("norm_act", "layer"), ("norm_act", "row"),
])  # fmt: skip
def test_whole_numbers(backend, op, name):
    for value in (0.5, 2.0, np.float32(2)):
        _assert_refused(backend, op, TypeError, name, value)
    OPS[op].call(backend, **{name: np.int64(5)})


def test_an_offset_needs_the_rows_of_out_x(backend):
    _assert_refused(backend, "gather_batch at an offset", ValueError, "out_x", None)
    with pytest.raises(ValueError, match=r"out_x must be given where offset is"):
        OPS["gather_batch at an offset"].call(backend, out_x=None, out_y=None)


def test_arrays_of_one_element_may_be_0d(backend):
    """And what is only read may be read-only."""
    zero = backend.array(np.zeros(()), np.int64)
    OPS["advance"].call(backend, offset=zero, step=backend.array(0.5))
    assert int(to_numpy(zero)) == 512
    if backend.name == "host":
        zero.flags.writeable = False
    OPS["gather_batch at an offset"].call(backend, offset=zero)


def test_confusion_has_the_classes_that_are_asked_for(backend):
    counts = backend.array(np.zeros((6, 6)), np.int64)
    _assert_refused(backend, "softmax_cross_entropy", ValueError, "confusion", counts)
    OPS["softmax_cross_entropy"].call(backend, confusion=counts, classes=None)
    OPS["softmax_cross_entropy"].call(backend, confusion=counts, classes=6)


@pytest.mark.parametrize(("op", "names"), [
    ("batch_norm_stats", ("running_mean", "running_var")), ("norm_act", ("mean", "var", "weight")),
    ("norm_act_backward", ("mean", "var", "weight")),
])  # fmt: skip
def test_what_must_be_given_together(backend, op, names):
    for name in names:
        _assert_refused(backend, op, ValueError, name, None)
    without = dict.fromkeys(names) | ({"weight_grad": None} if op == "norm_act_backward" else {})
    OPS[op].call(backend, **without)


def test_a_gradient_needs_a_weight_of_its_own(backend):
    without = dict(mean=None, var=None, weight=None)
    _assert_refused(backend, "norm_act_backward", ValueError, "weight_grad", backend.array(_f(6)), **without)


def test_the_saved_input_of_norm_act_is_not_overwritten(backend):
    z = backend.array(_f(4, 6))
    _assert_refused(backend, "norm_act_backward", ValueError, "z", z, out=z)
    assert_same_bits(z, _f(4, 6))


def test_misaligned_within_an_element():
    odd = np.zeros(4 * 6 + 1, np.uint8)[1:].view(np.float32)
    with pytest.raises(ValueError, match=r"\bz\b.*multiple of 4 bytes"):
        OPS["bias_act"].function(z=odd.reshape(2, 3), bias=np.zeros(3, np.float32))


def test_images_need_a_pixel(backend):
    _assert_refused(backend, "gather_batch", ValueError, "images", backend.array(np.zeros((3, 0)), np.uint8))


def test_momentum_needs_a_velocity(backend):
    _assert_refused(backend, "sgd_step", ValueError, "velocity", None)


def test_logits_need_a_class(backend):
    empty = backend.array(np.zeros((4, 0)))
    _assert_refused(backend, "softmax_cross_entropy", ValueError, "logits", empty, out=None)


@pytest.mark.parametrize("name", ["affine", "augment"])
def test_maps_need_square_images(backend, name):
    images = backend.array(np.zeros((5, 8)), np.uint8)
    value = backend.array(_f(4, 2, 3)) if name == "affine" else Augment()
    others = {"images": images, "out_x": None} | ({"affine": None} if name == "augment" else {})
    _assert_refused(backend, "gather_batch", ValueError, name, value, **others)


def test_what_is_no_augment(backend):
    for value in ((10.0, 0.1, 0.1, 2.0), 10.0, {"rotation": 10.0}, "Augment"):
        _assert_refused(backend, "gather_batch", TypeError, "augment", value, affine=None)
    for field, values in {
        "rotation": (-1.0, 45.1, np.nan, np.inf), "scale": (-0.1, 1.0, np.nan), "shear": (-0.1, 1.0, np.inf),
        "shift": (-1.0, np.nan, np.inf),
    }.items():  # fmt: skip
        for value in values:
            _assert_refused(backend, "gather_batch", ValueError, f"augment.{field}", value, affine=None)
        _assert_refused(backend, "gather_batch", TypeError, f"augment.{field}", "0.1", affine=None)
    OPS["gather_batch"].call(backend, affine=None, augment=Augment(45.0, 0.99, 0.99, 100.0))


def test_an_image_is_mapped_once(backend):
    _assert_refused(backend, "gather_batch", ValueError, "augment", Augment())


def test_the_first_argument_may_be_named(backend):
    z, bias = backend.array([[-1.0, 2.0]]), backend.array([0.0, 0.5])
    assert to_numpy(kernels.bias_act(bias=bias, z=z)).tolist() == [[0.0, 2.5]]
