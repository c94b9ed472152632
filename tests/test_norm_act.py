"""norm_act and norm_act_backward against float64 formulas and against torch's autograd."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import ACTIVATIONS, plain

from .checks import ELEMENTWISE, OFFSETS, REDUCTION, assert_close, assert_same_bits, one_misaligned, to_numpy
from .norm_references import keep, norm_gradient_checks, norm_inputs, pre_activation, value_check

COUNTED = dict(seed=0xFEDC_BA98_7654_3210, layer=3, step=9, row=5)
VARIANTS = list(itertools.product((False, True), (0.0, 0.3)))  # with normalisation or not, and with dropout or not


def _passed(form, arrays, p, offset=0):
    return {name: form.array(x, offset=offset) for name, x in arrays.items()} | {"dropout": p} | (COUNTED if p else {})


def _forward(form, inputs, activation, p, offset=0, **more):
    z, _, bias, arrays = inputs
    out, intact = form.outputs(*z.shape, offset=offset)
    passed = _passed(form, arrays, p, offset) | more
    y = form.ops.norm_act(form.array(z, offset=offset), form.array(bias, offset=offset), activation, out=out, **passed)
    assert y is out
    intact()
    value_check(y, z, bias, activation, arrays, p, **(COUNTED if p else {}), **more).verify()


def _backward(form, inputs, activation, p, offset=0, in_place=False, **more):
    z, dy, bias, arrays = inputs
    out, intact = form.outputs(*z.shape, offset=offset)
    if in_place:
        out[...] = form.array(dy)
    sums = {name: form.outputs(z.shape[1], offset=offset) for name in ("bias_grad", *("weight_grad",) * bool(arrays))}
    before = form.array(z, offset=offset)
    results = form.ops.norm_act_backward(
        out if in_place else form.array(dy, offset=offset), before, form.array(bias), activation, out=out,
        **{name: array for name, (array, _) in sums.items()}, **_passed(form, arrays, p, offset), **more,
    )  # fmt: skip
    assert results[0] is out and results[1] is sums["bias_grad"][0]
    assert results[2] is (sums["weight_grad"][0] if arrays else None)
    intact()
    for _, sums_intact in sums.values():
        sums_intact()
    assert_same_bits(before, z)
    for check in norm_gradient_checks(results, dy, z, bias, activation, arrays, p, **(COUNTED if p else {}), **more):
        check.verify()


@pytest.mark.parametrize(("norm", "p"), VARIANTS)
def test_awkward_shapes(form, rng, norm, p):
    for B, N in form.shapes[:: 4 if p else 1]:  # the reference of dropout is slow
        inputs = norm_inputs(rng, B, N, norm)
        for offset in OFFSETS:
            _forward(form, inputs, "relu", p, offset)
            _backward(form, inputs, "relu", p, offset)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("norm", "p"), VARIANTS)
def test_activations(form, rng, activation, norm, p):
    for B, N in ((17, 48), (33, 31)):
        inputs = norm_inputs(rng, B, N, norm)
        _forward(form, inputs, activation, p)
        _backward(form, inputs, activation, p)


@pytest.mark.parametrize(("norm", "p"), VARIANTS)
def test_in_place(form, rng, norm, p):
    for B, N in ((1, 1), (3, 33), (513, 48)):
        z, _, bias, arrays = inputs = norm_inputs(rng, B, N, norm)
        _backward(form, inputs, "silu", p, in_place=True)
        values = form.array(z)
        y = form.ops.norm_act(values, form.array(bias), "silu", out=values, **_passed(form, arrays, p))
        assert y is values
        value_check(y, z, bias, "silu", arrays, p, **(COUNTED if p else {})).verify()


@pytest.mark.parametrize("eps", [0.0, 1e-3, 1.0])
def test_eps(form, rng, eps):
    inputs = norm_inputs(rng, 40, 12, True)
    _forward(form, inputs, "gelu", 0.0, eps=eps)
    _backward(form, inputs, "gelu", 0.0, eps=eps)


def test_one_misaligned_array_rules_out_packs(form, rng):
    z, dy, bias, arrays = norm_inputs(rng, 9, 48, True)
    for at in one_misaligned(6):
        out, intact = form.outputs(9, 48, offset=at[0])
        source, shift = form.array(z, offset=at[1]), form.array(bias, offset=at[2])
        passed = {name: form.array(x, offset=k) for (name, x), k in zip(arrays.items(), at[3:], strict=True)}
        form.ops.norm_act(source, shift, "silu", dropout=0.3, out=out, **passed, **COUNTED)
        intact()
        value_check(out, z, bias, "silu", arrays, 0.3, **COUNTED).verify()
        passed |= dict(dropout=0.3, out=out, **COUNTED)
        results = form.ops.norm_act_backward(form.array(dy), source, shift, "silu", **passed)
        intact()
        for check in norm_gradient_checks(results, dy, z, bias, "silu", arrays, 0.3, **COUNTED):
            check.verify()


def test_no_columns(form):
    for B in (0, 5):
        z, none = form.array(np.zeros((B, 0))), form.array(np.zeros(0))
        norm = dict(mean=none, var=none, weight=none, dropout=0.5)
        assert form.ops.norm_act(z, none, **norm).shape == (B, 0)
        dz, dbias, dweight = form.ops.norm_act_backward(z, z, none, **norm)
        assert dz.shape == (B, 0) and dbias.shape == dweight.shape == (0,)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_norm_and_dropout_it_is_bias_act(form, rng, activation):
    """To the bit; the column sums are added in another order."""
    z, dy, bias, _ = (form.array(x) if isinstance(x, np.ndarray) else x for x in norm_inputs(rng, 33, 40, False))
    assert_same_bits(form.ops.norm_act(z, bias, activation), form.ops.bias_act(z, bias, activation))
    dz, dbias, _ = form.ops.norm_act_backward(dy, z, bias, activation)
    expected = form.ops.bias_act_backward(dy, z, activation, bias)
    assert_same_bits(dz, expected[0])
    assert_close(dbias, expected[1], REDUCTION, magnitude=np.abs(to_numpy(dy)).sum(0))


@pytest.mark.parametrize(("norm", "p"), VARIANTS)
def test_large_batch(backend, rng, norm, p):
    """What threads share, and what several row blocks add."""
    inputs = norm_inputs(rng, 3000, 400, norm)
    _forward(backend, inputs, "gelu", p)
    _backward(backend, inputs, "gelu", p)


def test_special_values(form):
    """Infinities, NaN, denormals and signed zeros, as the formulas have them, without and with normalisation."""
    values = np.array([0.0, 1e-40, 1e-20, 3.7, 89.0, 1e4, np.inf], np.float32)
    z = np.concatenate([values, -values, [np.nan]])[None].repeat(4, 0)
    zeros, ones = np.zeros(z.shape[1], np.float32), np.ones(z.shape[1], np.float32)
    norm = dict(mean=form.array(zeros), var=form.array(ones), weight=form.array(ones), eps=0.0)
    with np.errstate(all="ignore"):
        plainly = form.ops.norm_act(form.array(z), form.array(zeros), "relu")
        normalised = form.ops.norm_act(form.array(z), form.array(zeros), "relu", **norm)
    expected = np.where(np.abs(z) < form.smallest, 0.0, np.where(z < 0, 0.0, z))
    assert_close(plainly, expected, rtol=0.0)
    assert_close(normalised, expected, ELEMENTWISE, form.smallest)


@pytest.mark.parametrize("norm", [False, True])
def test_nan_stays_in_its_column(form, rng, norm):
    """In z or in dy: with normalisation it is in all of the column's gradient, and in no other column."""
    z, dy, bias, arrays = norm_inputs(rng, 20, 9, norm)
    passed = _passed(form, arrays, 0.0)
    bad = [x.copy() for x in (dy, z)]
    bad[0][3, 4] = bad[1][3, 4] = np.nan
    for pair in ((bad[0], z), (dy, bad[1])):
        with np.errstate(invalid="ignore"):
            results = form.ops.norm_act_backward(*map(form.array, pair), form.array(bias), "silu", **passed)
        dz, *sums = (to_numpy(x) for x in results if x is not None)
        assert np.isnan(dz[3, 4]) and np.isnan(dz[:, 4]).all() == norm
        assert all(np.isnan(x[4]) for x in sums) and not any(np.isnan(np.delete(x, 4, -1)).any() for x in (dz, *sums))


def _torch_function(torch, activation):
    functional = torch.nn.functional
    if activation == "identity":
        return lambda u: u
    if activation == "gelu_tanh":
        return lambda u: functional.gelu(u, approximate="tanh")
    return getattr(functional, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_training_against_torch(form, rng, activation):
    """nn.BatchNorm1d in training, with the mask as a product: the gradient goes through the statistics, too."""
    torch = pytest.importorskip("torch")
    z, dy, bias, arrays = norm_inputs(rng, 65, 33, True)
    layer = torch.nn.BatchNorm1d(33, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(arrays["weight"]))
        layer.bias.copy_(torch.tensor(bias))
    x = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor(keep(65, 33, 0.3, **COUNTED) / 0.7)
    expected = _torch_function(torch, activation)(layer(x)) * mask
    expected.backward(torch.tensor(dy, dtype=torch.float64))

    mean, var = form.ops.batch_norm_stats(form.array(z))
    passed = dict(mean=mean, var=var, weight=form.array(arrays["weight"]), dropout=0.3, **COUNTED)
    y = form.ops.norm_act(form.array(z), form.array(bias), activation, **passed)
    arguments = form.array(dy), form.array(z), form.array(bias), activation
    dz, dbias, dweight = form.ops.norm_act_backward(*arguments, **passed)
    _, size, xhat = pre_activation(z, bias, **arrays)
    assert_close(y, expected.detach(), REDUCTION, magnitude=size + 1.0)
    sizes = np.abs(dy).sum(0), np.abs(dy * xhat).sum(0)
    assert_close(dbias, layer.bias.grad, 2 * REDUCTION, magnitude=sizes[0])
    assert_close(dweight, layer.weight.grad, 2 * REDUCTION, magnitude=sizes[1])
    scale = np.abs(arrays["weight"]) / np.sqrt(arrays["var"])
    bound = scale * (np.abs(dy) + sizes[0] / 65 + np.abs(xhat) * sizes[1] / 65)
    assert_close(dz, x.grad, 2 * REDUCTION, magnitude=bound)


def test_evaluation_against_torch(form, rng):
    """The running statistics in the place of the batch's, and no dropout."""
    torch = pytest.importorskip("torch")
    z, _, bias, arrays = norm_inputs(rng, 65, 33, True)
    layer = torch.nn.BatchNorm1d(33, dtype=torch.float64)
    running = form.array(np.zeros(33)), form.array(np.ones(33))
    for part in (z[:30], z[30:]):
        layer(torch.tensor(part, dtype=torch.float64))
        form.ops.batch_norm_stats(form.array(part), running_mean=running[0], running_var=running[1])
    layer.eval()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(arrays["weight"]))
        layer.bias.copy_(torch.tensor(bias))
        expected = torch.relu(layer(torch.tensor(z, dtype=torch.float64)))
    y = form.ops.norm_act(
        form.array(z), form.array(bias), mean=running[0], var=running[1], weight=form.array(arrays["weight"])
    )
    assert_close(y, expected, REDUCTION, magnitude=np.abs(to_numpy(expected)) + np.abs(z).max(0))


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 70), st.integers(1, 70), st.sampled_from(ACTIVATIONS), st.booleans(), st.sampled_from((0.0, 0.4)),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_fused_equals_plain(B, N, activation, norm, p, seed):
    z, dy, bias, arrays = norm_inputs(np.random.default_rng(seed), B, N, norm)
    passed = dict(arrays, dropout=p, seed=seed)
    y, expected = (ops.norm_act(z, bias, activation, **passed) for ops in (kernels, plain))
    size = pre_activation(z, bias, **arrays)[1]
    assert_close(y, expected, 2 * ELEMENTWISE, magnitude=2 * size)
    fused, reference = (ops.norm_act_backward(dy, z, bias, activation, **passed) for ops in (kernels, plain))
    for check in norm_gradient_checks(fused, dy, z, bias, activation, arrays, p, seed=seed):
        check.verify()
    for check in norm_gradient_checks(reference, dy, z, bias, activation, arrays, p, seed=seed):
        check.verify()
