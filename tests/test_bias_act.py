"""bias_act and bias_act_backward against float64 formulas and against torch's autograd."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import ACTIVATIONS, plain

from .checks import ELEMENTWISE, OFFSETS, REDUCTION, assert_close, one_misaligned
from .references import RTOL, SLOPE, VALUE, activation_inputs, gradient_checks

SPECIAL = np.array(
    [0.0, 1e-45, 1e-40, 1.2e-38, 1e-20, 0.5, 1.0, 3.7, 5.0, 5.5, 6.0, 10.0, 88.0, 89.0, 104.0, 1e4, np.inf],
    np.float32,
)
SPECIAL = np.concatenate([SPECIAL, -SPECIAL, [np.float32(np.nan)]])


def _assert_gradients(dz, dbias, dy, u, activation):
    for check in gradient_checks(dz, dbias, dy, u, activation):
        check.verify()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_on_awkward_shapes(form, rng, activation):
    for B, N in form.shapes:
        z, bias, _ = activation_inputs(rng, B, N)
        u = z.astype(np.float64) + bias
        for offset in OFFSETS:
            out, intact = form.outputs(B, N, offset=offset)
            result = form.ops.bias_act(form.array(z, offset=offset), form.array(bias), activation, out=out)
            assert result is out
            assert_close(out, VALUE[activation](u), RTOL[activation], magnitude=np.abs(u))
            intact()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_on_awkward_shapes(form, rng, activation):
    for B, N in form.shapes:
        z, bias, dy = activation_inputs(rng, B, N)
        u = (z + bias).astype(np.float64)
        for offset in OFFSETS:
            out, intact = form.outputs(B, N, offset=offset)
            grad, grad_intact = form.outputs(N, offset=offset)
            args = form.array(dy, offset=offset), form.array(z, offset=offset), activation, form.array(bias)
            results = form.ops.bias_act_backward(*args, out=out, bias_grad=grad)
            assert results[0] is out and results[1] is grad
            _assert_gradients(out, grad, dy, u, activation)
            intact()
            grad_intact()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inputs_stay_as_they_were(form, rng, activation):
    z, bias, dy = activation_inputs(rng, 5, 9)
    arrays = [form.array(x) for x in (z, bias, dy)]
    form.ops.bias_act(arrays[0], arrays[1], activation)
    form.ops.bias_act_backward(arrays[2], arrays[0], activation, arrays[1])
    for array, before in zip(arrays, (z, bias, dy), strict=True):
        assert_close(array, before, rtol=0.0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_place(form, rng, activation):
    for B, N in [(1, 1), (3, 33), (513, 48), (2, 1023)]:
        z, bias, dy = activation_inputs(rng, B, N)
        expected = VALUE[activation](z.astype(np.float64) + bias)
        values, gradient = form.array(z), form.array(dy)
        assert form.ops.bias_act(values, form.array(bias), activation, out=values) is values
        assert_close(values, expected, RTOL[activation], magnitude=np.abs(z + bias))
        dz, dbias = form.ops.bias_act_backward(
            gradient, form.array(z), activation, form.array(bias), out=gradient
        )
        assert dz is gradient
        _assert_gradients(dz, dbias, dy, (z + bias).astype(np.float64), activation)


def test_one_misaligned_array_rules_out_packs(form, rng):
    z, bias, dy = (rng.normal(0, 3, shape).astype(np.float32) for shape in ((9, 48), 48, (9, 48)))
    u = (z + bias).astype(np.float64)
    for z_at, out_at in one_misaligned(2):
        out, intact = form.outputs(9, 48, offset=out_at)
        form.ops.bias_act(form.array(z, offset=z_at), form.array(bias), "silu", out=out)
        assert_close(out, VALUE["silu"](u), ELEMENTWISE, magnitude=np.abs(u))
        intact()
    for dy_at, z_at, out_at in one_misaligned(3):
        out, intact = form.outputs(9, 48, offset=out_at)
        args = form.array(dy, offset=dy_at), form.array(z, offset=z_at), "silu", form.array(bias)
        _, dbias = form.ops.bias_act_backward(*args, out=out)
        _assert_gradients(out, dbias, dy, u, "silu")
        intact()


def test_no_columns(form):
    for B in (0, 5):
        z, bias = form.array(np.zeros((B, 0))), form.array(np.zeros(0))
        assert form.ops.bias_act(z, bias, "relu").shape == (B, 0)
        dz, dbias = form.ops.bias_act_backward(z, z, "relu", bias)
        assert dz.shape == (B, 0) and dbias.shape == (0,)


@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu"])
def test_the_output_serves_as_saved(form, rng, activation):
    z, bias, dy = activation_inputs(rng, 65, 47)
    y = form.ops.bias_act(form.array(z), form.array(bias), activation)
    dz, dbias = form.ops.bias_act_backward(form.array(dy), y, activation)
    _assert_gradients(dz, dbias, dy, (z + bias).astype(np.float64), activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values(form, activation):
    """Signed zeros, denormals, infinities and NaN, each in every lane of a pack of 4."""
    z = np.stack([np.roll(SPECIAL, shift) for shift in range(4)])
    u = np.where(np.abs(z) < form.smallest, np.copysign(0.0, z), z).astype(np.float64)
    zeros, ones = np.zeros(z.shape[1], np.float32), np.ones_like(z)
    with np.errstate(all="ignore"):
        y = form.ops.bias_act(form.array(z), form.array(zeros), activation)
        assert_close(y, VALUE[activation](u), RTOL[activation], form.smallest, np.abs(u))
        dz, dbias = form.ops.bias_act_backward(form.array(ones), form.array(z), activation)
        expected = SLOPE[activation](u)
        assert_close(dz, expected, RTOL[activation], magnitude=1.0)
        assert_close(dbias, expected.sum(0), REDUCTION, magnitude=4.0)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_far_from_zero_the_smooth_ones_are_exactly_relu(form, activation):
    """An error relative to |u| would still allow 1e-3 at u = -1e4."""
    z = form.array([[-1e4, -200.0, 200.0, 1e4]])
    zeros = form.array(np.zeros(4))
    with np.errstate(over="ignore"):
        assert_close(form.ops.bias_act(z, zeros, activation), [[0.0, 0.0, 200.0, 1e4]], rtol=0.0)
        dz, _ = form.ops.bias_act_backward(form.array(np.ones((1, 4))), z, activation)
    assert_close(dz, [[0.0, 0.0, 1.0, 1.0]], rtol=0.0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_batch(backend, rng, activation):
    """2.4 million elements: the CPU shares them among threads, the GPU fills every multiprocessor."""
    z, bias, dy = activation_inputs(rng, 4000, 601)
    u = z.astype(np.float64) + bias
    out, intact = backend.outputs(*z.shape)
    backend.ops.bias_act(backend.array(z), backend.array(bias), activation, out=out)
    assert_close(out, VALUE[activation](u), RTOL[activation], magnitude=np.abs(u))
    grad, grad_intact = backend.outputs(z.shape[1])
    backend.ops.bias_act_backward(
        backend.array(dy), backend.array(z), activation, backend.array(bias), out=out, bias_grad=grad
    )
    _assert_gradients(out, grad, dy, (z + bias).astype(np.float64), activation)
    intact()
    grad_intact()


@pytest.mark.parametrize("shape", [(50_000, 1), (50_000, 3), (20_000, 47)])
def test_column_sums_of_tall_arrays(backend, shape):
    """Equal terms are the worst case of a running float32 sum: its roundings all point the same way."""
    dy = backend.array(np.full(shape, 0.1))
    _, dbias = backend.ops.bias_act_backward(dy, dy, "identity")
    assert_close(dbias, np.full(shape[1], shape[0] * float(np.float32(0.1))), REDUCTION)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_torch(form, rng, activation):
    torch = pytest.importorskip("torch")
    functions = {
        "identity": lambda u: u,
        "relu": torch.nn.functional.relu,
        "leaky_relu": torch.nn.functional.leaky_relu,
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda u: torch.nn.functional.gelu(u, approximate="tanh"),
    }
    z, bias, dy = activation_inputs(rng, 64, 33)
    z.ravel()[: SPECIAL.size] = SPECIAL
    bias[...] = np.where(np.arange(33) < 30, 0.0, bias)
    z64 = torch.tensor(np.where(np.abs(z) < form.smallest, 0.0, z), dtype=torch.float64, requires_grad=True)
    bias64 = torch.tensor(bias, dtype=torch.float64, requires_grad=True)
    expected = functions[activation](z64 + bias64)
    expected.backward(torch.tensor(dy, dtype=torch.float64))
    with np.errstate(all="ignore"):
        y = form.ops.bias_act(form.array(z), form.array(bias), activation)
        dz, dbias = form.ops.bias_act_backward(form.array(dy), form.array(z), activation, form.array(bias))
    assert_close(y, expected.detach(), RTOL[activation], form.smallest, np.abs(z.astype(np.float64) + bias))
    assert_close(dz, z64.grad, RTOL[activation], magnitude=np.abs(dy))
    assert_close(dbias, bias64.grad, REDUCTION, magnitude=np.abs(dy).sum(0))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 70), st.integers(1, 70), st.sampled_from(ACTIVATIONS), st.integers(0, 2**32 - 1))
def test_fused_equals_plain(B, N, activation, seed):
    z, bias, dy = activation_inputs(np.random.default_rng(seed), B, N)
    assert_close(
        kernels.bias_act(z, bias, activation),
        plain.bias_act(z, bias, activation),
        2e-6,
        magnitude=np.abs(z + bias),
    )
    fused, reference = (ops.bias_act_backward(dy, z, activation, bias) for ops in (kernels, plain))
    assert_close(fused[0], reference[0], 2 * ELEMENTWISE, magnitude=np.abs(dy))
    assert_close(fused[1], reference[1], 2 * REDUCTION, magnitude=np.abs(dy).sum(0))
