"""The MLP and its learner: memory, initial values, gradients, and the fused against the plain ops."""

import numpy as np
import pytest
import torch

import kernels
from kernels import plain
from mlp import configs
from mlp.data import Split
from mlp.loop import fit
from mlp.model import MLP, arena
from mlp.scratch import ScratchLearner

from .training import BACKENDS, all_rows, close, easy_dataset, learner

M1_SIZES = (784, 400, 240, 120, 47)
TORCH_ACTIVATIONS = {
    "relu": torch.relu,
    "leaky_relu": torch.nn.functional.leaky_relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def address(array):
    return array.__array_interface__["data"][0]


def padding(flat, views):
    """Which elements of an arena belong to no view."""
    outside = np.ones(flat.size, bool)
    for view in views:
        start = (address(view) - address(flat)) // flat.itemsize
        outside[start : start + view.size] = False
    return outside


def mlp(sizes, activation="relu", ops=plain, dtype=np.float32, rows=64, seed=3):
    """A model whose biases are random too, so that a gradient that forgets them shows."""
    model = MLP(sizes, activation, rows=rows, ops=ops, dtype=dtype, seed=seed)
    rng = np.random.default_rng(seed)
    for bias in model.biases:
        bias[...] = 0.3 * rng.standard_normal(bias.shape)
    return model


def random_batch(sizes, rows, dtype=np.float32, seed=1):
    rng = np.random.default_rng(seed)
    return rng.random((rows, sizes[0])).astype(dtype), rng.integers(0, sizes[-1], rows).astype(np.int32)


def loss_and_gradients(model, x, labels):
    """The mean loss; model.gradients is filled."""
    loss, dlogits = model.ops.owner.softmax_cross_entropy(model.forward(x), labels)
    model.backward(x, dlogits)
    return float(loss)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arena_views_are_aligned_apart_and_zero(dtype):
    shapes = [(3, 5), (5,), (5, 7), (7,), (1,), (2, 2)]
    flat, views = arena(shapes, np, dtype)
    assert [view.shape for view in views] == shapes
    assert flat.ndim == 1 and flat.dtype == dtype and not flat.any()
    assert all(address(view) % 16 == 0 and view.flags.c_contiguous for view in views)
    for number, view in enumerate(views, 1):
        view[...] = number  # a later view that overlaps an earlier one overwrites it
    assert all((view == number).all() for number, view in enumerate(views, 1))
    assert np.count_nonzero(flat) == sum(view.size for view in views)
    assert not flat[padding(flat, views)].any()


def test_m1_has_the_published_number_of_parameters():
    model = MLP(M1_SIZES, "relu", rows=1, ops=plain)
    assert model.parameter_count == 444_847
    assert model.parameters.size - padding(model.parameters, model.weights + model.biases).sum() == 444_847


def test_initial_weights_are_those_of_he():
    model = MLP(M1_SIZES, "relu", rows=1, ops=plain, seed=5)
    for weight, bias in zip(model.weights, model.biases):
        std, n = np.sqrt(2.0 / weight.shape[0]), weight.size
        assert abs(weight.mean()) <= 5 * std / np.sqrt(n)
        assert abs(weight.std() - std) <= 5 * std / np.sqrt(2 * n)
        assert abs((np.abs(weight) > 2 * std).mean() - 0.0455) <= 5 * np.sqrt(0.0455 / n)  # a normal's tails
        assert not bias.any()
    first, second = model.weights[1].ravel()[:1000], model.weights[2].ravel()[:1000]
    assert abs(np.corrcoef(first, second)[0, 1]) <= 0.15


def test_initial_weights_depend_on_the_seed_alone():
    first, again, other = (MLP((20, 9, 4), "relu", rows=1, ops=plain, seed=seed) for seed in (7, 7, 8))
    fused = MLP((20, 9, 4), "relu", rows=50, ops=kernels, seed=7)
    assert np.array_equal(first.parameters, again.parameters)
    assert np.array_equal(first.parameters, fused.parameters)
    assert not np.array_equal(first.parameters, other.parameters)


def central_differences(model, x, labels, elements, h=1e-5):
    result = []
    for k in elements:
        kept, ends = model.parameters[k], []
        for end in (kept + h, kept - h):
            model.parameters[k] = end
            ends.append(float(plain.softmax_cross_entropy(model.forward(x), labels)[0]))
        model.parameters[k] = kept
        result.append((ends[0] - ends[1]) / (2 * h))
    return np.array(result)


@pytest.mark.parametrize("activation", configs.ACTIVATIONS)
@pytest.mark.parametrize("sizes, rows, count", [((11, 7, 6, 5), 9, None), (M1_SIZES, 6, 60)])
def test_gradients_equal_finite_differences(activation, sizes, rows, count):
    model = mlp(sizes, activation, dtype=np.float64)
    x, labels = random_batch(sizes, rows, np.float64)
    loss_and_gradients(model, x, labels)
    used = np.flatnonzero(~padding(model.parameters, model.weights + model.biases))
    if count:  # of the large model those with the largest gradients among a random tenth
        some = np.random.default_rng(0).permutation(used)[: len(used) // 10]
        used = some[np.argsort(-np.abs(model.gradients[some]))[:count]]
    gradients = model.gradients[used].copy()
    assert np.count_nonzero(gradients) > len(used) / 3
    assert close(gradients, central_differences(model, x, labels, used), 1e-6)


@pytest.mark.parametrize("ops", [plain, kernels], ids=BACKENDS)
@pytest.mark.parametrize("activation", configs.ACTIVATIONS)
def test_gradients_equal_those_of_torch(activation, ops):
    model = mlp(M1_SIZES, activation, ops, rows=70)
    x, labels = random_batch(M1_SIZES, 65)
    loss = loss_and_gradients(model, x, labels)

    leaves = [torch.tensor(p, requires_grad=True) for p in model.weights + model.biases]
    weights, biases = leaves[: len(model.weights)], leaves[len(model.weights) :]
    y = torch.tensor(x)
    for weight, bias in zip(weights[:-1], biases[:-1]):
        y = TORCH_ACTIVATIONS[activation](y @ weight + bias)
    expected = torch.nn.functional.cross_entropy(y @ weights[-1] + biases[-1], torch.tensor(labels).long())
    expected.backward()
    expected = expected.item()

    assert abs(loss - expected) <= 1e-6 * expected
    for ours, leaf in zip(model.weight_grads + model.bias_grads, leaves):
        assert close(ours, leaf.grad.numpy(), 1e-5)


@pytest.mark.parametrize("ops", [plain, kernels], ids=BACKENDS)
def test_backward_leaves_dlogits_and_the_batch_unchanged(ops):
    model = mlp((30, 8, 5), "gelu", ops)
    x, labels = random_batch(model.sizes, 10)
    _, dlogits = ops.softmax_cross_entropy(model.forward(x), labels)
    before = x.copy(), dlogits.copy()
    model.backward(x, dlogits)
    assert np.array_equal(x, before[0]) and np.array_equal(dlogits, before[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changes", [
    dict(optimizer="sgd", lr=0.1),
    dict(optimizer="sgd", lr=0.1, momentum=0.9, l2=0.01),
    dict(l2=0.01),
    dict(l2=0.01, decoupled=True),
])  # fmt: skip
def test_padding_stays_zero(backend, changes):
    data = easy_dataset(60, 5)
    ours = learner(backend, data, hidden=(21, 13), batch_size=25, **changes)
    before = ours.model.parameters.copy()
    ours.begin_epoch(all_rows(data))
    for start in (0, 25, 50):
        ours.train_step(start, min(start + 25, 60), ours.config.lr)
    outside = padding(ours.model.parameters, ours.model.weights + ours.model.biases)
    assert outside.any()
    assert not ours.model.parameters[outside].any() and not ours.model.gradients[outside].any()
    assert (ours.model.parameters != before)[~outside].mean() > 0.5


def parameters_of(model):
    """All weights, then all biases, in float64 and without padding."""
    return np.concatenate([array.ravel() for array in model.weights + model.biases]).astype(np.float64)


def losses_and_hits(ours, data, steps, batch):
    """What every single step adds to totals()."""
    order = np.random.default_rng(4).permutation(np.resize(all_rows(data), steps * batch)).astype(np.int32)
    ours.begin_epoch(order)
    read = [(0.0, 0)]
    for start in range(0, steps * batch, batch):
        ours.train_step(start, start + batch, ours.config.lr)
        read.append(ours.totals())
    return np.diff(np.array(read), axis=0).T


@pytest.mark.parametrize("model", ["m0", "m1"])
def test_a_hundred_fused_steps_equal_plain_ones(model):
    data = easy_dataset(1000, 47)
    runs = [losses_and_hits(learner(backend, data, model=model), data, 100, 128) for backend in BACKENDS]
    (plain_loss, plain_hits), (fused_loss, fused_hits) = runs
    assert plain_loss.shape == (100,) and plain_loss[-10:].mean() < 0.99 * plain_loss[:10].mean()
    assert (np.abs(fused_loss - plain_loss) <= 1e-5 * np.abs(plain_loss)).all()
    assert (np.abs(fused_hits - plain_hits) <= 1).all()  # two logits may change places in the last bit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("start, stop", [(0, 1), (96, 103), (0, 103)])
@pytest.mark.parametrize("chunk_rows", [8, 2048])
def test_a_step_descends_along_the_mean_gradient_of_its_rows(backend, start, stop, chunk_rows):
    """A batch of one row, a ragged last one and the full set, each against the model in float64."""
    data = easy_dataset(103, 5)
    ours = learner(backend, data, chunk_rows, hidden=(20, 10), optimizer="sgd", lr=0.5, batch_size="full")
    exact = MLP(ours.model.sizes, "relu", rows=103, ops=plain, dtype=np.float64)
    before = parameters_of(ours.model)
    for wide, narrow in zip(exact.weights + exact.biases, ours.model.weights + ours.model.biases):
        wide[...] = narrow
    order = np.random.default_rng(0).permutation(all_rows(data))
    rows = order[start:stop]
    loss = loss_and_gradients(exact, data.images[rows] / 255.0, data.labels[rows])
    hits = np.count_nonzero(exact.forward(data.images[rows] / 255.0).argmax(axis=1) == data.labels[rows])
    ours.begin_epoch(order)
    ours.train_step(start, stop, lr=0.5)
    expected = np.concatenate([gradient.ravel() for gradient in exact.weight_grads + exact.bias_grads])
    assert close(before - parameters_of(ours.model), 0.5 * expected, 1e-5)
    assert abs(ours.totals()[0] - loss * len(rows)) <= 1e-6 * loss * len(rows)
    assert ours.totals()[1] == hits


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_batch_takes_one_step_per_epoch(backend):
    steps = []

    class Counting(ScratchLearner):
        def _accumulated_step(self, start, stop):
            steps.append((start, stop))
            super()._accumulated_step(start, stop)

    data = easy_dataset(120, 4)
    config = configs.preset("m1", hidden=(10,), batch_size="full", epochs=3)
    rows = all_rows(data)
    small = learner(backend, data, chunk_rows=32).device
    history = fit(Counting(config, data, small, 100), Split(rows[:100], rows[100:110], rows[110:]), config)
    assert steps == [(0, 100)] * 3 and len(history.rows) == 3
