"""The ops on torch tensors: no copy, torch in and torch out, errors that name the argument."""

import numpy as np
import pytest

import kernels

from .checks import ELEMENTWISE, assert_close, assert_same_bits
from .test_arguments import ARGUMENTS, OPS

torch = pytest.importorskip("torch")

_DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _tensors(op, device="cpu"):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("this build of torch finds no GPU")
    return {name: torch.tensor(x, device=device) for name, x in OPS[op].arrays.items()}


@pytest.mark.parametrize("device", _DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_given_outputs_are_written_and_returned(op, device):
    """The same bits as with arrays, in the tensors' own memory."""
    arrays = {name: x.copy() for name, x in OPS[op].arrays.items()}
    tensors = _tensors(op, device)
    before = {name: x.data_ptr() for name, x in tensors.items()}
    expected = OPS[op].function(**arrays, **OPS[op].numbers)
    results = OPS[op].function(**tensors, **OPS[op].numbers)
    for name, tensor in tensors.items():
        assert tensor.data_ptr() == before[name]
        if device == "cpu":
            assert_same_bits(tensor, arrays[name])
        else:
            assert_close(tensor, arrays[name], ELEMENTWISE, atol=1e-7)
    if expected is None:
        assert results is None
    else:
        returned = results if isinstance(results, tuple) else (results,)
        given = [tensors[k] for k in ("out", "bias_grad", "weight_grad", "out_x", "out_y") if k in tensors]
        assert all(any(r is t for r in returned) for t in given)


@pytest.mark.parametrize(
    "op", ["bias_act", "bias_act_backward", "softmax_cross_entropy", "gather_batch", "shuffle", "to_bfloat16",
           "norm_act", "norm_act_backward"],
)
def test_new_results_are_tensors(op):
    optional = OPS[op].outputs
    arrays = {name: x for name, x in OPS[op].arrays.items() if name not in optional}
    expected = OPS[op].function(**arrays)
    results = OPS[op].function(**{name: torch.tensor(x) for name, x in arrays.items()})
    if not isinstance(results, tuple):
        expected, results = (expected,), (results,)
    assert len(results) == len(expected)
    for result, reference in zip(results, expected, strict=True):
        assert isinstance(result, torch.Tensor) and result.shape == np.shape(reference)
        assert_same_bits(result, np.asarray(reference))
        result.fill_(1)  # a tensor of its own, that may be written


def test_scalars_may_be_tensors():
    """lr and step as tensors of one element on the device of p give what numbers give."""
    numbers, scalars = _tensors("adam_step"), _tensors("adam_step")
    kernels.adam_step(**numbers, step=3, lr=0.5)
    kernels.adam_step(**scalars, step=torch.tensor(3.0), lr=torch.tensor(0.5))
    for name in numbers:
        assert_same_bits(scalars[name], numbers[name])


def test_in_place_on_a_tensor():
    z = torch.tensor([[-1.0, 2.0]])
    assert kernels.bias_act(z, torch.tensor([0.5, 0.5]), out=z) is z
    assert z.tolist() == [[0.0, 2.5]]


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_kinds_do_not_mix(op, name):
    """The first argument decides the kind; where it is the odd one out, the error names the second."""
    arrays, tensors = {k: x.copy() for k, x in OPS[op].arrays.items()}, _tensors(op)
    first, second = list(arrays)[:2]
    for values in (tensors | {name: arrays[name]}, arrays | {name: tensors[name]}):
        with pytest.raises(TypeError, match=rf"\b{second if name == first else name}\b"):
            OPS[op].function(**values, **OPS[op].numbers)


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_wrong_tensors(op, name):
    tensors = _tensors(op)
    valid = tensors[name]

    def assert_refused(error, value):
        with pytest.raises(error, match=rf"\b{name}\b"):
            OPS[op].function(**(tensors | {name: value}), **OPS[op].numbers)

    assert_refused(TypeError, valid.to(torch.bfloat16))
    assert_refused(TypeError, valid.to(torch.float16))
    assert_refused(TypeError, valid.to(torch.float32, copy=True).requires_grad_())
    if name not in OPS[op].one_element:
        assert_refused(ValueError, torch.stack([valid, valid], -1).flatten(-2)[..., ::2])
    if name not in OPS[op].any_shape:
        assert_refused(ValueError, valid[None])


@pytest.mark.gpu
def test_a_side_stream_is_torchs():
    """The op runs in the order of torch's current stream, behind work that it depends on."""
    if not torch.cuda.is_available():
        pytest.skip("this build of torch finds no GPU")
    bias = torch.zeros(4096, device="cuda")
    for _ in range(20):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            z = torch.full((4096, 4096), float("nan"), device="cuda")
            torch.cuda._sleep(
                10_000_000
            )  # some milliseconds: an op on another stream would overtake the fill
            z.fill_(2.0)
            y = kernels.bias_act(z, bias)
            total = y.sum()
        side.synchronize()
        assert total.item() == 2.0 * 4096 * 4096
