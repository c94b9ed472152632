"""batch_norm_stats against float64 and torch: awkward shapes, running statistics, offsets, NaN."""

import numpy as np
import pytest

from .checks import OFFSETS, REDUCTION, assert_close, assert_same_bits, to_numpy
from .norm_references import norm_inputs, statistics_checks


def _verify(form, z, offset=0, momentum=0.1):
    N = z.shape[1]
    before = np.linspace(-1, 2, N).astype(np.float32), np.linspace(0, 3, N).astype(np.float32)
    (mean, *a), (var, *b) = (form.outputs(N, offset=offset) for _ in range(2))
    running = [form.array(x, offset=offset) for x in before]
    results = form.ops.batch_norm_stats(
        form.array(z, offset=offset), mean=mean, var=var, running_mean=running[0], running_var=running[1],
        momentum=momentum,
    )  # fmt: skip
    assert results[0] is mean and results[1] is var
    for check in statistics_checks(z, mean, var, running, before, momentum):
        check.verify()
    for intact in (*a, *b):
        intact()


def test_awkward_shapes(form, rng):
    for B, N in form.shapes:
        for offset in OFFSETS:
            _verify(form, norm_inputs(rng, B, N, False)[0], offset)


@pytest.mark.parametrize("momentum", [0.0, 0.37, 1.0])
def test_momentum(form, rng, momentum):
    _verify(form, norm_inputs(rng, 65, 33, False)[0], momentum=momentum)


@pytest.mark.parametrize("shape", [(50_000, 1), (50_000, 3), (20_000, 47), (3000, 400)])
def test_tall_arrays(backend, rng, shape):
    """What threads share, and what several row blocks do."""
    _verify(backend, norm_inputs(rng, *shape, False)[0])


def test_far_from_zero_nothing_cancels(form, rng):
    """The mean of the squares minus the square of the mean would have no digit left."""
    z = (rng.normal(0, 1, (513, 40)) + 3000).astype(np.float32)
    _, var = form.ops.batch_norm_stats(form.array(z))
    assert_close(var, z.astype(np.float64).var(0), 3e-4)


def test_a_constant_column_has_its_value_and_no_variance(form):
    """Exactly: otherwise 1 / sqrt(var + eps) would make noise of it."""
    values = np.array([0.1, -3e4, 1e-20, 7.3, 1e30], np.float32)
    for B in (1, 2, 7, 600):
        mean, var = form.ops.batch_norm_stats(form.array(np.tile(values, (B, 1))))
        if form.name == "host" and form.ops.__name__.endswith("plain"):
            assert_close(mean, values, REDUCTION)
        else:
            assert_close(mean, values, rtol=0.0)
            assert_close(var, np.zeros(5), rtol=0.0)


def test_of_no_rows_nothing_is_known(form):
    running = form.array([1.0, 2.0, 3.0]), form.array([4.0, 5.0, 6.0])
    mean, var = form.ops.batch_norm_stats(form.array(np.zeros((0, 3))), running_mean=running[0], running_var=running[1])
    assert np.isnan(to_numpy(mean)).all() and np.isnan(to_numpy(var)).all()
    assert to_numpy(running[0]).tolist() == [1.0, 2.0, 3.0] and to_numpy(running[1]).tolist() == [4.0, 5.0, 6.0]


def test_one_row_has_no_variance(form):
    """torch refuses it; B - 1 in the running variance would be a division by zero."""
    running = form.array([0.0, 0.0]), form.array([1.0, 2.0])
    mean, var = form.ops.batch_norm_stats(form.array([[3.0, -4.0]]), running_mean=running[0], running_var=running[1])
    assert to_numpy(mean).tolist() == [3.0, -4.0] and to_numpy(var).tolist() == [0.0, 0.0]
    assert_close(running[1], [0.9, 1.8], 1e-6)


def test_no_columns(form):
    for B in (0, 5):
        mean, var = form.ops.batch_norm_stats(form.array(np.zeros((B, 0))))
        assert mean.shape == var.shape == (0,)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_column(form, rng, bad):
    z = norm_inputs(rng, 70, 9, False)[0]
    for row in (0, 33, 69):
        spoiled = z.copy()
        spoiled[row, 4] = bad
        with np.errstate(invalid="ignore"):
            results = form.ops.batch_norm_stats(form.array(spoiled))
        for spoiled_result, result in zip(results, form.ops.batch_norm_stats(form.array(z)), strict=True):
            a, b = to_numpy(spoiled_result), to_numpy(result)
            assert np.isnan(a[4]) if np.isnan(bad) else not np.isfinite(a[4])
            assert_same_bits(np.delete(a, 4), np.delete(b, 4))


def test_against_torch(form, rng):
    torch = pytest.importorskip("torch")
    z = norm_inputs(rng, 130, 33, False)[0]
    layer = torch.nn.BatchNorm1d(33, momentum=0.3, dtype=torch.float64)
    layer(torch.tensor(z, dtype=torch.float64))
    running = form.array(np.zeros(33)), form.array(np.ones(33))
    form.ops.batch_norm_stats(form.array(z), running_mean=running[0], running_var=running[1], momentum=0.3)
    assert_close(running[0], layer.running_mean, REDUCTION, magnitude=np.abs(z).max(0))
    assert_close(running[1], layer.running_var, REDUCTION)
