"""M2 and M3: torch's models against ours from scratch, whatever they are trained with."""

from dataclasses import replace

import numpy as np
import pytest

import kernels
from kernels import plain
from mlp import InputError, configs, products
from mlp.model import MLP, initial_weights
from mlp.torch_models import TorchLearner

from .training import BACKENDS, all_rows, close, cpu, easy_dataset, graphs_of_torch, learner

DATA = easy_dataset(400, 7)
M3 = dict(model="m3", backend="scratch", hidden=(40, 24))


def in_torch(data=DATA, model="m3", **changes):
    config = configs.preset(model, **changes)
    return TorchLearner(config, data, "cpu", len(data.labels))


def losses(ours, steps, rows, data=DATA):
    """Of each step, on the batches that every learner takes in its first epochs."""
    per_epoch = len(data.labels) // rows
    result = []
    for step in range(steps):
        if step % per_epoch == 0:
            ours.begin_epoch(all_rows(data), epoch=1 + step // per_epoch)
            before = 0.0
        start = step % per_epoch * rows
        ours.train_step(start, start + rows, ours.config.lr)
        now = ours.totals()[0]
        result.append((now - before) / rows)
        before = now
    return np.array(result)


def test_a_hundred_steps_of_m2_equal_those_of_m1():
    """The full models as they are, but in float64. In float32 they part, as do any two ways to compute the same: where
    a last bit decides whether a unit is active in a row, Adam makes it a step of its full length."""
    data = easy_dataset(1280, 47)
    theirs, m1 = in_torch(data, "m2"), configs.preset("m1")
    gather = theirs.gather
    theirs.model.double()
    theirs.gather = lambda index, **_: [part.double() if part.is_floating_point() else part for part in gather(index)]
    ours = MLP((784, *m1.hidden, 47), m1.activation, rows=128, ops=plain, dtype=np.float64)
    for weight, rounded in zip(ours.weights, initial_weights(ours.sizes, m1.seed)):
        weight[...] = rounded
    m, v, expected = np.zeros_like(ours.parameters), np.zeros_like(ours.parameters), []
    index = np.empty(1280, np.int32)
    for step in range(100):
        if step % 10 == 0:
            plain.shuffle(all_rows(data), seed=m1.seed, epoch=1 + step // 10, out=index)
        x, labels = plain.gather_batch(data.images, data.labels, index[step % 10 * 128 :][:128])
        loss, dlogits = plain.softmax_cross_entropy(ours.forward(x.astype(np.float64)), labels)
        ours.backward(x.astype(np.float64), dlogits)
        plain.adam_step(ours.parameters, ours.gradients, m, v, step=step + 1, lr=m1.lr)
        expected.append(float(loss))
    expected = np.array(expected)
    assert (np.abs(losses(theirs, 100, 128, data) - expected) <= 1e-6 * expected).all()  # float32: / 255, losses
    assert expected[-1] < 0.1 * expected[0]


@pytest.mark.parametrize("fused", [False, True], ids=BACKENDS)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_a_hundred_steps_of_m2_equal_those_of_m1_in_float32(activation, fused):
    """With an activation that has no kink."""
    data = easy_dataset(12800, 47)
    ours = losses(learner("plain", data, model="m1", activation=activation), 100, 128, data)
    theirs = losses(in_torch(data, "m2", activation=activation, fused=fused), 100, 128, data)
    assert (np.abs(theirs - ours) <= 1e-4 * ours).all() and ours[-1] < 0.2 * ours[0]


CHANGES = [
    dict(activation="leaky_relu"),
    dict(activation="gelu", batch_norm=False, label_smoothing=0.1),
    dict(class_balance=0.99),
    dict(class_balance=0.9, label_smoothing=0.2, l2=0.01, decoupled=True),
    dict(optimizer="sgd", lr=0.05, momentum=0.9, ema=0.9),
    dict(ema=0.99),
    dict(train_noise=0.4, augment=1.0),
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda c: "-".join(c))
@pytest.mark.parametrize("ops", BACKENDS)
@pytest.mark.parametrize("fused", [False, True], ids=["torch", "fused torch"])
def test_ours_equals_torchs_without_dropout(ops, fused, changes):
    """Every way to train M3, batch normalisation and its running statistics included."""
    changes = dict(M3) | dict(dropout=0.0) | changes
    ours = learner(ops, DATA, **changes)
    theirs = in_torch(fused=fused, **changes | {"backend": "torch"})
    one, other = losses(ours, 24, 50), losses(theirs, 24, 50)
    assert (np.abs(other - one) <= 1e-4 * np.abs(one)).all() and one[-4:].mean() < 0.95 * one[:4].mean()
    arrays, expected = ours.arrays(), theirs.arrays()
    assert sorted(arrays) == sorted(expected) and ours.parameter_count == theirs.parameter_count
    for name, array in arrays.items():
        assert close(array, expected[name], 2e-3), name
    for sigma in (0.0, 0.3):
        mine, theirs_ = ours.evaluate(all_rows(DATA), sigma), theirs.evaluate(all_rows(DATA), sigma)
        assert abs(mine.cross_entropy - theirs_.cross_entropy) <= 1e-3 * mine.cross_entropy
        assert np.abs(mine.confusion - theirs_.confusion).sum() <= 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_for_training_and_both_learn_with_it(backend):
    ours, theirs = learner(backend, DATA, **M3 | dict(dropout=0.4)), in_torch(hidden=M3["hidden"], dropout=0.4)
    one, other = losses(ours, 64, 50), losses(theirs, 64, 50)
    assert abs(one[-8:].mean() - other[-8:].mean()) <= 0.15 * other[-8:].mean()
    assert one[-8:].mean() < 0.8 * one[:8].mean()
    first, again = (ours.evaluate(all_rows(DATA)) for _ in range(2))
    assert first.cross_entropy == again.cross_entropy < one[-8:].mean()


@pytest.mark.parametrize("ops", [plain, kernels], ids=BACKENDS)
@pytest.mark.parametrize("norm, dropout", [(True, 0.0), (False, 0.3), (True, 0.3)])
def test_gradients_equal_finite_differences(ops, norm, dropout):
    """Of float64 where the ops take it, else of the plain model with the same parameters and the same mask."""
    sizes, rng = (11, 7, 6, 5), np.random.default_rng(1)
    exact = MLP(sizes, "silu", rows=9, ops=plain, dtype=np.float64, norm=norm, dropout=dropout, seed=5)
    ours = MLP(sizes, "silu", rows=9, ops=ops, norm=norm, dropout=dropout, seed=5)
    for model in (exact, ours):
        noise = np.random.default_rng(2)
        for array in (*model.biases, *model.norm_weights):
            array += noise.normal(0.0, 0.3, array.shape)
    x, labels = rng.normal(size=(9, 11)), (np.arange(9) % 5).astype(np.int32)

    step = np.full(1, 3.0, np.float32)

    def loss(model, x):
        return plain.softmax_cross_entropy(model.forward(x, training=True, step=step), labels)

    value, dlogits = loss(ours, x.astype(np.float32))
    ours.backward(x.astype(np.float32), dlogits)
    assert float(value) == pytest.approx(float(loss(exact, x)[0]), rel=1e-5)
    expected, h = [], 1e-5
    views = [*exact.weights, *exact.biases, *exact.norm_weights]
    for view in views:
        for index in np.ndindex(view.shape):
            kept, ends = view[index], []
            for end in (kept + h, kept - h):
                view[index] = end
                ends.append(float(loss(exact, x)[0]))
            view[index] = kept
            expected.append((ends[0] - ends[1]) / (2 * h))
    grads = [*ours.weight_grads, *ours.bias_grads, *ours.norm_weight_grads]
    assert close(np.concatenate([g.ravel() for g in grads]), expected, 2e-5)


def test_a_batch_in_chunks_drops_the_same_outputs():
    changes = dict(M3) | dict(batch_norm=False, dropout=0.5, batch_size=200)
    whole, chunked = learner("fused", DATA, **changes), learner("fused", DATA, 64, **changes)
    assert chunked.budget.rows == 64
    one, other = losses(whole, 6, 200), losses(chunked, 6, 200)
    assert (np.abs(other - one) <= 1e-5 * one).all()
    assert close(chunked.model.parameters, whole.model.parameters, 1e-3)


def test_batch_normalisation_needs_the_whole_batch():
    with pytest.raises(InputError, match="--batch-norm needs the whole batch at once, and of 200 .*--batch-size"):
        learner("plain", DATA, 64, **M3 | dict(batch_size=200))
    with pytest.raises(InputError, match="--batch-norm has no statistics of a single image.*--batch-size"):
        in_torch(batch_size=399)


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
def test_a_snapshot_brings_back_all_that_is_judged(backend, ema):
    changes = dict(M3) | dict(ema=ema)
    ours = in_torch(**changes | {"backend": "torch"}) if backend == "torch" else learner(backend, DATA, **changes)
    losses(ours, 8, 50)
    kept, before = ours.snapshot(), ours.evaluate(all_rows(DATA), 0.2)
    losses(ours, 8, 50)
    assert ours.evaluate(all_rows(DATA), 0.2).cross_entropy != before.cross_entropy
    ours.restore(kept)
    after = ours.evaluate(all_rows(DATA), 0.2)
    assert after.cross_entropy == before.cross_entropy and (after.confusion == before.confusion).all()
    assert np.isfinite(np.concatenate([a.ravel() for a in ours.arrays().values()])).all()


def test_the_average_of_the_parameters_is_that_of_the_formula():
    ours, bare = learner("fused", DATA, **M3 | dict(ema=0.8)), learner("fused", DATA, **M3)
    average = bare.model.parameters.astype(np.float64)
    for step in range(1, 7):
        for each in (ours, bare):
            each.begin_epoch(all_rows(DATA), epoch=step)
            each.train_step(0, 100, each.config.lr)
        average += (1.0 - min(0.8, (1.0 + step) / (10.0 + step))) * (bare.model.parameters - average)
    assert np.array_equal(ours.model.parameters, bare.model.parameters)
    assert close(ours.snapshot()["parameters"], average, 1e-6)


def test_every_epoch_has_its_own_noise_and_maps():
    ours = learner("fused", DATA, **M3 | dict(train_noise=0.3, augment=1.0))
    batches = []
    for epoch in (1, 2, 1):
        ours.begin_epoch(all_rows(DATA), epoch)
        ours.source.begin(ours._training, all_rows(DATA))  # in their own order
        window = ours.source.window(ours._training, 0)
        ours._offset[...] = 0
        batches.append(ours._gather(100, window, **ours._altered)[0].copy())
    assert np.array_equal(batches[0], batches[2]) and not np.array_equal(batches[0], batches[1])
    assert np.abs(batches[0] - DATA.images[:100] / 255.0).max() > 0.3


def test_own_products_refuse_what_is_not_fused_to_them():
    config = configs.preset("m3", backend="scratch", gemm="own", precision="tf32", fused=True)
    gpu = replace(cpu("fused"), kind="cuda")
    with pytest.raises(InputError, match="--gemm own fuses bias and activation.*--batch-norm"):
        products.select(config, gpu)


def test_torch_compile_makes_one_graph_of_m3(monkeypatch):
    graphs = graphs_of_torch(monkeypatch)
    changes = dict(hidden=M3["hidden"], dropout=0.0)
    one = losses(in_torch(**changes), 12, 50)
    compiled = losses(in_torch(**changes, compile=True), 12, 50)
    assert len(graphs) == 1 and (np.abs(compiled - one) <= 1e-4 * one).all()
