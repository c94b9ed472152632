"""adam_step and sgd_step against float64 formulas and against torch.optim."""

import numpy as np
import pytest

from .checks import ELEMENTWISE, EPS, OFFSETS, assert_close, assert_same_bits, one_misaligned, to_numpy

SIZES = (0, 1, 2, 3, 4, 5, 31, 32, 33, 47, 127, 1023, 8191, 8193, 32_769)  # 8192: a chunk of the CPU
LARGE = 1_500_001  # shared among the CPU's threads

ADAM_CASES = {
    "defaults": dict(lr=1e-3),
    "l2": dict(lr=1e-2, weight_decay=0.1),
    "decoupled": dict(lr=1e-2, weight_decay=0.1, decoupled=True),
    "other betas": dict(lr=1e-3, beta1=0.5, beta2=0.95, eps=1e-3),
    "rms": dict(lr=1e-3, beta1=0.0),
    "no memory": dict(lr=1e-3, beta1=0.0, beta2=0.0),
    "lr 0": dict(lr=0.0, weight_decay=0.1, decoupled=True),
}
SGD_CASES = {
    "plain": dict(lr=0.1),
    "momentum": dict(lr=0.1, momentum=0.9),
    "l2": dict(lr=0.1, momentum=0.9, weight_decay=0.01),
    "l2 without momentum": dict(lr=0.1, weight_decay=0.01),
    "momentum above 1": dict(lr=0.1, momentum=1.5),
}


def adam(p, g, m, v, *, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled=False):
    """The new p, m, v in float64, and the tolerance of each.

    p is rounded once, when it is moved; decoupled decay rounds the factor that shrinks it and the product,
    too. The move is relative to what it would be if the terms of m had equal signs, because they may cancel.
    """
    p, g, m, v = (x.astype(np.float64) for x in (p, g, m, v))
    l2 = 0.0 if decoupled else weight_decay
    gradient, size = g + l2 * p, np.abs(g) + l2 * np.abs(p)
    new_m = beta1 * m + (1 - beta1) * gradient
    new_v = beta2 * v + (1 - beta2) * gradient**2
    denominator = np.sqrt(new_v / (1 - beta2**step)) + eps
    rate = lr / (1 - beta1**step) / denominator
    kept = p * (1 - lr * weight_decay) if decoupled else p
    m_size = beta1 * np.abs(m) + (1 - beta1) * size
    p_bound = (3 if decoupled else 1) * EPS * np.abs(p) + 2 * ELEMENTWISE * rate * m_size
    v_bound = ELEMENTWISE * (beta2 * v + (1 - beta2) * size**2)
    return (kept - rate * new_m, new_m, new_v), (p_bound, ELEMENTWISE * m_size, v_bound)


def sgd(p, g, u, *, lr, momentum=0.0, weight_decay=0.0):
    """The new p and velocity in float64, and the tolerance of each."""
    p, g, u = (x.astype(np.float64) for x in (p, g, u))
    new_u = momentum * u + g + weight_decay * p
    u_size = momentum * np.abs(u) + np.abs(g) + weight_decay * np.abs(p)
    return (p - lr * new_u, new_u), (EPS * np.abs(p) + ELEMENTWISE * lr * u_size, ELEMENTWISE * u_size)


def _state(rng, P, fresh):
    """p, g, m, v; m and v are 0 where the optimizer is fresh. A third of p is 0: only its move shows."""
    p, g, m = (rng.normal(0, 1, P).astype(np.float32) for _ in range(3))
    p[::3] = 0.0
    g *= np.float32(10.0) ** rng.integers(-4, 3, P).astype(np.float32)
    v = (0.1 * g**2 + 0.1 * rng.random(P).astype(np.float32)) * 10
    return (p, g, 0 * m, 0 * v) if fresh else (p, g, m, v)


def _guarded(form, values, offset):
    out, intact = form.outputs(values.size, offset=offset)
    out[...] = form.array(values)
    return out, intact


def _assert_adam(form, state, offset=0, **settings):
    (p, p_intact), (m, m_intact), (v, v_intact) = (_guarded(form, state[k], offset) for k in (0, 2, 3))
    g = form.array(state[1], offset=offset)
    assert form.ops.adam_step(p, g, m, v, **settings) is None
    for actual, expected, bound in zip((p, m, v), *adam(*state, **settings), strict=True):
        assert_close(actual, expected, 1.0, atol=form.smallest, magnitude=bound)
    assert_same_bits(g, state[1])
    for intact in (p_intact, m_intact, v_intact):
        intact()


@pytest.mark.parametrize("case", ADAM_CASES)
def test_adam(form, rng, case):
    for P in SIZES:
        for offset in OFFSETS:
            for step in (1, 2, 1000, 10**6):
                _assert_adam(form, _state(rng, P, fresh=step == 1), offset, step=step, **ADAM_CASES[case])


@pytest.mark.parametrize("case", ADAM_CASES)
def test_adam_on_a_large_model(backend, rng, case):
    _assert_adam(backend, _state(rng, LARGE, fresh=False), step=7, **ADAM_CASES[case])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_adam_reads_step_and_learning_rate_from_arrays(backend, rng, shape):
    state = _state(rng, 1000, fresh=False)
    numbers, arrays = ([backend.array(x) for x in state] for _ in range(2))
    lr, step = np.float32(3e-3), 5
    backend.ops.adam_step(*numbers, step=step, lr=float(lr))
    backend.ops.adam_step(
        *arrays, step=backend.array(step).reshape(shape), lr=backend.array(lr).reshape(shape)
    )
    for a, b in zip(arrays, numbers, strict=True):
        assert_same_bits(a, b)


def test_adam_without_gradient_or_memory_moves_nothing(form, rng):
    state = _state(rng, 50, fresh=True)
    p, g, m, v = (form.array(x) for x in (state[0], 0 * state[1], state[2], state[3]))
    form.ops.adam_step(p, g, m, v, step=1, lr=0.1)
    for actual, expected in zip((p, m, v), (state[0], state[2], state[3]), strict=True):
        assert_close(actual, expected, rtol=0.0)


@pytest.mark.parametrize("where", range(4))
def test_nan_stays_in_its_element(form, rng, where):
    state = _state(rng, 9, fresh=False)
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
            _assert_sgd(
                form, _state(rng, P, fresh=False)[:3], offset, with_velocity=with_velocity, **settings
            )


@pytest.mark.parametrize("with_velocity", [True, False])
def test_sgd_on_a_large_model(backend, rng, with_velocity):
    settings = dict(lr=0.1, momentum=0.9 if with_velocity else 0.0, weight_decay=0.1)
    _assert_sgd(backend, _state(rng, LARGE, fresh=False)[:3], with_velocity=with_velocity, **settings)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_sgd_reads_the_learning_rate_from_an_array(backend, rng, shape):
    p, g, u, _ = _state(rng, 1000, fresh=False)
    a, b = backend.array(p), backend.array(p)
    backend.ops.sgd_step(a, backend.array(g), backend.array(u), lr=0.25, momentum=0.9)
    lr = backend.array(0.25).reshape(shape)
    backend.ops.sgd_step(b, backend.array(g), backend.array(u), lr=lr, momentum=0.9)
    assert_same_bits(a, b)


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
    ]:
        expected = step(op, [0] * count, settings)
        for offsets in one_misaligned(count):
            for a, b in zip(step(op, offsets, settings), expected, strict=True):
                assert_close(a, to_numpy(b), ELEMENTWISE)


def test_simt_one_block_and_numbers_on_the_device(simt_launches, rng):
    """On a GPU of 0 multiprocessors one block does everything, in several passes."""
    ops = simt_launches(multiprocessors=0)
    step, lr = np.array(5, np.float32), np.array(0.25, np.float32)
    start = rng.random((4, 3003)).astype(np.float32)
    arrays = [x.copy() for x in start]
    ops.adam_step(*arrays, step, lr, 0.9, 0.999, 1e-8, 0.1, True)
    expected, bounds = adam(*start, step=5, lr=0.25, weight_decay=0.1, decoupled=True)
    for actual, reference, bound in zip((arrays[0], *arrays[2:]), expected, bounds, strict=True):
        assert_close(actual, reference, 1.0, magnitude=bound)
    for with_velocity in (True, False):
        p, g, velocity, _ = (x.copy() for x in start)
        momentum = 0.9 if with_velocity else 0.0
        ops.sgd_step(p, g, velocity if with_velocity else None, lr, momentum, 0.1)
        expected, bounds = sgd(*start[:3], lr=0.25, momentum=momentum, weight_decay=0.1)
        for actual, reference, bound in zip((p, velocity)[: 1 + with_velocity], expected, bounds, strict=False):
            assert_close(actual, reference, 1.0, magnitude=bound)


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
    start = _state(rng, 333, fresh=True)
    gradients = [_state(rng, 333, fresh=True)[1] for _ in range(steps)]
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
    p = _state(rng, 333, fresh=True)[0]
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
