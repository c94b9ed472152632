"""The optimizers against torch.optim, and the learning-rate schedules against their formulas."""

import math

import numpy as np
import pytest
import torch

from mlp import configs
from mlp.optim import learning_rate, optimizer

from .training import BACKENDS, close, cpu

# Fields of our configuration, and the optimizer of torch that they stand for.
CASES = {
    "sgd": (dict(optimizer="sgd"), torch.optim.SGD, {}),
    "sgd-l2": (dict(optimizer="sgd", l2=0.1), torch.optim.SGD, dict(weight_decay=0.1)),
    "momentum": (dict(optimizer="sgd", momentum=0.9), torch.optim.SGD, dict(momentum=0.9)),
    "momentum-l2": (
        dict(optimizer="sgd", momentum=0.8, l2=0.1), torch.optim.SGD, dict(momentum=0.8, weight_decay=0.1),
    ),
    "adam": (dict(), torch.optim.Adam, {}),
    "adam-betas": (
        dict(beta1=0.7, beta2=0.95, eps=1e-3), torch.optim.Adam, dict(betas=(0.7, 0.95), eps=1e-3),
    ),
    "adam-l2": (dict(l2=0.1), torch.optim.Adam, dict(weight_decay=0.1)),
    "adam-decoupled": (dict(l2=0.1, decoupled=True), torch.optim.AdamW, dict(weight_decay=0.1)),
    "adam-decoupled-without-decay": (dict(decoupled=True), torch.optim.AdamW, dict(weight_decay=0.0)),
}  # fmt: skip


def step(device, ours, parameters, gradients, lr):
    """One step of our optimizer, with what the learner does for it."""
    if ours.steps is not None:
        device.ops.advance(np.zeros(1, np.int64), 0, ours.steps)
    ours.step(parameters, gradients, lr)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_twenty_steps_equal_those_of_torch(backend, case, schedule):
    fields, torch_class, arguments = CASES[case]
    config = configs.preset("m1", lr=0.02, schedule=schedule, decay=0.0007, **fields)
    rng = np.random.default_rng(0)
    ours = rng.standard_normal(1003).astype(np.float32)
    start, theirs = ours.copy(), torch.tensor(ours, requires_grad=True)
    device = cpu(backend)
    our_optimizer = optimizer(config, ours, device.xp, device.ops)
    their_optimizer = torch_class([theirs], lr=config.lr, **arguments)
    for number in range(20):
        gradients = (rng.standard_normal(1003) * 10.0 ** rng.uniform(-3, 1)).astype(np.float32)
        kept, lr = gradients.copy(), learning_rate(config, number)
        their_optimizer.param_groups[0]["lr"] = lr
        theirs.grad = torch.tensor(gradients)
        their_optimizer.step()
        step(device, our_optimizer, ours, gradients, lr)
        assert np.array_equal(gradients, kept)
        assert close(ours, theirs.detach().numpy(), 2e-6)
    assert close(ours - start, theirs.detach().numpy() - start, 1e-5)
    assert np.abs(ours - start).max() > 0.05


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_nan_is_not_hidden(backend):
    device = cpu(backend)
    for name in configs.OPTIMIZERS:
        parameters, gradients = np.ones(40, np.float32), np.ones(40, np.float32)
        gradients[17] = np.nan
        ours = optimizer(configs.preset("m1", optimizer=name), parameters, np, device.ops)
        step(device, ours, parameters, gradients, 0.1)
        assert np.flatnonzero(np.isnan(parameters)).tolist() == [17]


def test_constant_schedule():
    assert {learning_rate(configs.preset("m1", lr=0.3), epoch) for epoch in range(50)} == {0.3}


def test_linear_schedule_falls_by_decay_and_ends_at_zero():
    config = configs.preset("m1", lr=0.01, schedule="linear", decay=0.004)
    rates = [learning_rate(config, epoch) for epoch in range(5)]
    assert rates == pytest.approx([0.01, 0.006, 0.002, 0.0, 0.0], abs=1e-15)
    assert rates[3] == 0.0 and learning_rate(config, 10**6) == 0.0


def test_exponential_schedule_multiplies_by_gamma():
    config = configs.preset("m1", lr=0.01, schedule="exponential", gamma=0.5)
    assert [learning_rate(config, epoch) for epoch in range(4)] == [0.01, 0.005, 0.0025, 0.00125]
    published = configs.preset("m1f")
    assert learning_rate(published, 29) == pytest.approx(0.001 * 0.98**29, rel=1e-12)
    assert 0.0 <= learning_rate(published, 10**6) < 1e-300


def test_cosine_schedule_falls_with_every_step_from_the_rate_to_zero():
    config = configs.preset("m1", lr=0.01, schedule="cosine", epochs=4)
    rates = [learning_rate(config, epoch, done) for epoch in range(4) for done in (0.0, 0.25, 0.5, 0.75)]
    assert rates == pytest.approx([0.005 * (1 + math.cos(math.pi * k / 16)) for k in range(16)], rel=1e-12)
    assert rates == sorted(rates, reverse=True) and learning_rate(config, 3, 1.0) == 0.0


@pytest.mark.parametrize("schedule", configs.SCHEDULES)
def test_the_warm_up_rises_to_what_the_schedule_says(schedule):
    config = configs.preset("m1", lr=0.01, schedule=schedule, decay=1e-4, gamma=0.9, epochs=6, warmup=2)
    rates = [learning_rate(config, epoch, done) for epoch in (0, 1) for done in (0.0, 0.5, 0.9)]
    assert rates[0] == 0.0 and rates[:3] == sorted(rates[:3]) and rates[3:] == sorted(rates[3:])
    base = {"linear": 0.0099, "exponential": 0.009}.get(schedule, 0.01)  # of the second epoch
    assert rates[1] == pytest.approx(0.01 / 4, rel=1e-12) and rates[4] == pytest.approx(base * 0.75, rel=1e-12)
    whole = configs.preset("m1", lr=0.01, schedule=schedule, decay=1e-4, gamma=0.9, epochs=6)
    if schedule != "cosine":  # which has fewer epochs left to fall in
        assert learning_rate(config, 2, 0.25) == learning_rate(whole, 2, 0.25)
    assert learning_rate(configs.preset("m1", lr=0.01, schedule="cosine", epochs=2, warmup=2), 1, 1.0) == 0.01
