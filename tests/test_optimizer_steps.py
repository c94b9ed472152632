"""adam_step, sgd_step and average_step against float64 formulas and against torch.optim."""

import numpy as np
import pytest

from .checks import ELEMENTWISE, EPS, OFFSETS, assert_close, assert_same_bits, one_misaligned, to_numpy
from .references import ADAM_CASES, SGD_CASES, adam, average, optimizer_state, sgd, step_checks

SIZES = (0, 1, 2, 3, 4, 5, 31, 32, 33, 47, 127, 1023, 8191, 8193, 32_769)  # 8192: a chunk of the CPU
LARGE = 1_500_001  # shared among the CPU's threads


def _guarded(form, values, offset):
    out, intact = form.outputs(values.size, offset=offset)
    out[...] = form.array(values)
    return out, intact


def _assert_adam(form, state, offset=0, **settings):
    (p, p_intact), (m, m_intact), (v, v_intact) = (_guarded(form, state[k], offset) for k in (0, 2, 3))
    g = form.array(state[1], offset=offset)
    assert form.ops.adam_step(p, g, m, v, **settings) is None
    for check in step_checks(form, "pmv", (p, m, v), *adam(*state, **settings)):
        check.verify()
    assert_same_bits(g, state[1])
    for intact in (p_intact, m_intact, v_intact):
        intact()


@pytest.mark.parametrize("case", ADAM_CASES)
def test_adam(form, rng, case):
    for P in SIZES:
        for offset in OFFSETS:
            for step in (1, 2, 1000, 10**6):
                state = optimizer_state(rng, P, fresh=step == 1)
                _assert_adam(form, state, offset, step=step, **ADAM_CASES[case])


@pytest.mark.parametrize("case", ADAM_CASES)
def test_adam_on_a_large_model(backend, rng, case):
    _assert_adam(backend, optimizer_state(rng, LARGE, fresh=False), step=7, **ADAM_CASES[case])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_adam_reads_step_and_learning_rate_from_arrays(backend, rng, shape):
    state = optimizer_state(rng, 1000, fresh=False)
    numbers, arrays = ([backend.array(x) for x in state] for _ in range(2))
    lr, step = np.float32(3e-3), 5
    backend.ops.adam_step(*numbers, step=step, lr=float(lr))
    backend.ops.adam_step(
        *arrays, step=backend.array(step).reshape(shape), lr=backend.array(lr).reshape(shape)
    )
    for a, b in zip(arrays, numbers, strict=True):
        assert_same_bits(a, b)


def test_adam_without_gradient_or_memory_moves_nothing(form, rng):
    state = optimizer_state(rng, 50, fresh=True)
    p, g, m, v = (form.array(x) for x in (state[0], 0 * state[1], state[2], state[3]))
    form.ops.adam_step(p, g, m, v, step=1, lr=0.1)
    for actual, expected in zip((p, m, v), (state[0], state[2], state[3]), strict=True):
        assert_close(actual, expected, rtol=0.0)


@pytest.mark.parametrize("where", range(4))
def test_nan_stays_in_its_element(form, rng, where):
    state = optimizer_state(rng, 9, fresh=False)
    arrays = [form.array(x) for x in state]
    arrays[where][4] = np.nan
    form.ops.adam_step(*arrays, step=3, lr=0.1, weight_decay=0.1)
    p, m, v = arrays[0], arrays[2], arrays[3]
    expected, bounds = adam(*state, step=3, lr=0.1, weight_decay=0.1)
    assert (
        np.isnan(float(p[4]))
        and (where == 3 or np.isnan(float(m[4])))
        and (where == 2 or np.isnan(float(v[4])))
    )
    others = np.arange(9) != 4
    for actual, reference, bound in zip((p, m, v), expected, bounds, strict=True):
        assert_close(to_numpy(actual)[others], reference[others], 1.0, magnitude=bound[others])


def _assert_sgd(form, state, offset=0, *, with_velocity, **settings):
    p, g, u = state
    array, intact = _guarded(form, p, offset)
    velocity, velocity_intact = _guarded(form, u, offset) if with_velocity else (None, lambda: None)
    gradient = form.array(g, offset=offset)
    assert form.ops.sgd_step(array, gradient, velocity, **settings) is None
    (new_p, new_u), (p_bound, u_bound) = sgd(p, g, u, **settings)
    assert_close(array, new_p, 1.0, magnitude=p_bound)
    assert_same_bits(gradient, g)
    intact()
    velocity_intact()
    if with_velocity:
        assert_close(velocity, new_u, 1.0, magnitude=u_bound)


@pytest.mark.parametrize("with_velocity", [True, False])
@pytest.mark.parametrize("case", SGD_CASES)
def test_sgd(form, rng, case, with_velocity):
    settings = SGD_CASES[case]
    if settings.get("momentum") and not with_velocity:
        pytest.skip("momentum needs a velocity; test_arguments.py has the error")
    for P in SIZES:
        for offset in OFFSETS:
            state = optimizer_state(rng, P, fresh=False)[:3]
            _assert_sgd(form, state, offset, with_velocity=with_velocity, **settings)


@pytest.mark.parametrize("with_velocity", [True, False])
def test_sgd_on_a_large_model(backend, rng, with_velocity):
    settings = dict(lr=0.1, momentum=0.9 if with_velocity else 0.0, weight_decay=0.1)
    state = optimizer_state(rng, LARGE, fresh=False)[:3]
    _assert_sgd(backend, state, with_velocity=with_velocity, **settings)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_sgd_reads_the_learning_rate_from_an_array(backend, rng, shape):
    p, g, u, _ = optimizer_state(rng, 1000, fresh=False)
    a, b = backend.array(p), backend.array(p)
    backend.ops.sgd_step(a, backend.array(g), backend.array(u), lr=0.25, momentum=0.9)
    lr = backend.array(0.25).reshape(shape)
    backend.ops.sgd_step(b, backend.array(g), backend.array(u), lr=lr, momentum=0.9)
    assert_same_bits(a, b)


def _assert_average(form, rng, P, offset=0, **settings):
    a, p, *_ = optimizer_state(rng, P, fresh=False)
    (array, intact), parameters = _guarded(form, a, offset), form.array(p, offset=offset)
    assert form.ops.average_step(array, parameters, **settings) is None
    for check in step_checks(form, ("average",), (array,), *average(a, p, **settings)):
        check.verify()
    assert_same_bits(parameters, p)
    intact()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999, 0.9999999])
def test_average(form, rng, decay):
    """1 - 0.9999999 has no digit in float32 where it is computed there."""
    for P in SIZES:
        for offset in OFFSETS:
            for step in (1, 2, 80, 10**6, 10**9):
                _assert_average(form, rng, P, offset, decay=decay, step=step)


def test_average_of_a_large_model(backend, rng):
    _assert_average(backend, rng, LARGE, decay=0.999, step=7)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_average_reads_the_step_from_an_array(form, rng, shape):
    a, p, *_ = optimizer_state(rng, 1000, fresh=False)
    for step in (3, 10_000):  # early, and late
        number, array = form.array(a), form.array(a)
        form.ops.average_step(number, form.array(p), decay=0.99, step=step)
        form.ops.average_step(array, form.array(p), decay=0.99, step=form.array(step).reshape(shape))
        assert_close(array, number, 2 * EPS, magnitude=np.abs(a) + np.abs(p))


def test_average_stays_at_what_does_not_move(form, rng):
    p = optimizer_state(rng, 50, fresh=True)[0]
    array = form.array(p)
    for step in (1, 1000):
        form.ops.average_step(array, form.array(p), decay=0.9, step=step)
    assert_same_bits(array, p)


def test_average_against_torch(form, rng):
    """The average of torch.optim.swa_utils, whose decay is constant: late, when ours is, too."""
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(333, 1, bias=False, dtype=torch.float64)
    multiply = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=multiply)
    averaged.update_parameters(model)  # the first of torch's is a copy
    array = form.array(model.weight.detach().numpy().ravel())
    for step in range(1000, 1010):
        p = rng.normal(0, 1, 333).astype(np.float32)
        with torch.no_grad():
            model.weight.copy_(torch.tensor(p))
        averaged.update_parameters(model)
        form.ops.average_step(array, form.array(p), decay=0.9, step=step)
    assert_close(array, averaged.module.weight.detach().numpy().ravel(), 0.0, atol=10 * 4 * EPS)


def test_one_misaligned_array_rules_out_packs(form, rng):
    state = rng.random((4, 47)).astype(np.float32)

    def step(op, offsets, settings):
        arrays = [form.array(x, offset=at) for x, at in zip(state, offsets, strict=False)]
        op(*arrays, **settings)
        return arrays

    for op, count, settings in [
        (form.ops.adam_step, 4, dict(step=2, lr=0.1)),
        (form.ops.sgd_step, 3, dict(lr=0.1)),
        (form.ops.sgd_step, 2, dict(lr=0.1)),
        (form.ops.average_step, 2, dict(decay=0.9, step=2)),
    ]:
        expected = step(op, [0] * count, settings)
        for offsets in one_misaligned(count):
            for a, b in zip(step(op, offsets, settings), expected, strict=True):
                assert_close(a, to_numpy(b), ELEMENTWISE)


def _torch_trajectory(torch, optimizer, p, gradients):
    """The parameters and the optimizer's state after a float64 step on each of the gradients."""
    parameter = torch.nn.Parameter(torch.tensor(p, dtype=torch.float64))
    optimizer = optimizer([parameter])
    for g in gradients:
        parameter.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter]


@pytest.mark.parametrize("case", ADAM_CASES)
def test_adam_against_torch(form, rng, case):
    torch = pytest.importorskip("torch")
    settings = dict(ADAM_CASES[case])
    steps, lr = 6, settings["lr"]
    start = optimizer_state(rng, 333, fresh=True)
    gradients = [optimizer_state(rng, 333, fresh=True)[1] for _ in range(steps)]
    names = dict(lr=lr, eps=settings.get("eps", 1e-8), weight_decay=settings.get("weight_decay", 0.0))
    names["betas"] = settings.get("beta1", 0.9), settings.get("beta2", 0.999)
    kind = torch.optim.AdamW if settings.get("decoupled") else torch.optim.Adam
    expected, state = _torch_trajectory(torch, lambda p: kind(p, **names), start[0], gradients)
    p, _, m, v = (form.array(x) for x in start)
    for step, g in enumerate(gradients, 1):
        form.ops.adam_step(p, form.array(g), m, v, step=step, **settings)
    # Every step adds up to three roundings of p and two millionths of a move, which is a few lr.
    assert_close(p, expected, 3 * EPS * steps, atol=steps * lr * 1e-5)
    largest = np.abs(gradients).max(axis=0)
    assert_close(m, state["exp_avg"], steps * ELEMENTWISE, magnitude=largest + 1)
    assert_close(v, state["exp_avg_sq"], steps * ELEMENTWISE, magnitude=(largest + 1) ** 2)


@pytest.mark.parametrize("case", [name for name in SGD_CASES if name != "momentum above 1"])
def test_sgd_against_torch(form, rng, case):
    torch = pytest.importorskip("torch")
    settings, steps = SGD_CASES[case], 6
    p = optimizer_state(rng, 333, fresh=True)[0]
    gradients = [rng.normal(0, 1, 333).astype(np.float32) for _ in range(steps)]
    expected, state = _torch_trajectory(torch, lambda x: torch.optim.SGD(x, **settings), p, gradients)
    array, velocity = form.array(p), form.array(0 * p)
    for g in gradients:
        form.ops.sgd_step(array, form.array(g), velocity, **settings)
    # |velocity| stays below the sum of the |gradients|, and every step rounds it and p.
    size = np.abs(gradients).sum(axis=0) + np.abs(p)
    assert_close(array, expected, steps * ELEMENTWISE, magnitude=size)
    if settings.get("momentum"):
        assert_close(velocity, state["momentum_buffer"], steps * ELEMENTWISE, magnitude=size)
