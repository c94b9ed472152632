"""The PyTorch twin: it trains and judges as the from-scratch model does, from the same configuration."""

import numpy as np
import pytest
import torch

from mlp import InputError, configs
from mlp.data import stratified_split
from mlp.loop import fit
from mlp.torch_models import TorchLearner

from .training import all_rows, close, easy_dataset, graphs_of_torch, learner

DATA = easy_dataset(300, 7)
HIDDEN = (96, 40)


def twin(**changes):
    config = configs.preset("m2", hidden=HIDDEN, **changes)
    return TorchLearner(config, DATA, "cpu", len(DATA.labels))


def twenty_steps(ours, rows):
    """Loss and hits of each step."""
    ours.begin_epoch(np.random.default_rng(4).permutation(np.resize(all_rows(DATA), 20 * rows)))
    read = [(0.0, 0)]
    for step in range(20):
        ours.train_step(step * rows, (step + 1) * rows, ours.config.lr)
        read.append(ours.totals())
    return np.diff(np.array(read), axis=0).T


@pytest.mark.parametrize("changes", [
    dict(l2=1e-3),
    dict(l2=0.1, decoupled=True, beta1=0.8, beta2=0.99, eps=1e-6),
    dict(optimizer="sgd", lr=0.05, momentum=0.9, l2=1e-3),
    *(dict(activation=name) for name in configs.ACTIVATIONS),
])  # fmt: skip
def test_twenty_steps_equal_those_from_scratch(changes):
    ours, theirs = learner("plain", DATA, hidden=HIDDEN, **changes), twin(**changes)
    (loss, hits), (their_loss, their_hits) = twenty_steps(ours, 64), twenty_steps(theirs, 64)
    assert (np.abs(their_loss - loss) <= 1e-4 * loss).all() and loss[-1] < 0.95 * loss[0]
    assert (np.abs(their_hits - hits) <= 1).all()  # two logits may change places in the last bit
    for sigma in (0.0, 0.3):
        one, other = ours.evaluate(all_rows(DATA), sigma), theirs.evaluate(all_rows(DATA), sigma)
        assert abs(one.cross_entropy - other.cross_entropy) <= 1e-4 * one.cross_entropy
        assert np.abs(one.confusion - other.confusion).sum() <= 2 and other.n == 300


def test_it_starts_from_the_same_parameters_and_gives_them_back():
    ours, theirs = learner("plain", DATA, hidden=HIDDEN, seed=3), twin(seed=3)
    start, kept = theirs.snapshot(), {name: array.copy() for name, array in theirs.arrays().items()}
    expected = ours.arrays()
    assert list(kept) == list(expected)
    assert all(np.array_equal(kept[name], expected[name]) for name in expected)
    twenty_steps(theirs, 32)
    assert not np.array_equal(theirs.arrays()["weight1"], kept["weight1"])
    theirs.restore(start)
    assert all(np.array_equal(theirs.arrays()[name], kept[name]) for name in kept)


def test_a_batch_in_chunks_is_the_same_step():
    whole, chunked = twin(batch_size="full"), twin(batch_size="full")
    chunked.chunk_rows = 128
    (loss, _), (chunked_loss, _) = twenty_steps(whole, 300), twenty_steps(chunked, 300)
    assert (np.abs(chunked_loss - loss) <= 1e-5 * loss).all() and loss[-1] < 0.9 * loss[0]
    for one, other in zip(whole.arrays().values(), chunked.arrays().values()):
        assert close(other, one, 1e-4)
    one, other = whole.evaluate(all_rows(DATA), 0.2), chunked.evaluate(all_rows(DATA), 0.2)
    assert abs(one.cross_entropy - other.cross_entropy) <= 1e-4 * one.cross_entropy


def test_the_loop_trains_it():
    split = stratified_split(DATA.labels)
    theirs = TorchLearner(configs.preset("m2", hidden=HIDDEN, epochs=8, batch_size=64), DATA, "cpu", len(split.train))
    history = fit(theirs, split, theirs.config)
    assert history.outcome == "finished" and history.rows[-1].val_loss < 0.8 * history.rows[0].val_loss
    best = theirs.evaluate(split.val).cross_entropy
    assert best == pytest.approx(min(row.val_loss for row in history.rows), rel=1e-5)


def test_compiled_steps_are_the_same_and_one_graph(monkeypatch):
    graphs = graphs_of_torch(monkeypatch)
    (loss, hits), (compiled_loss, compiled_hits) = (twenty_steps(twin(compile=compile), 32) for compile in (False, True))
    assert len(graphs) == 1
    assert (np.abs(compiled_loss - loss) <= 1e-5 * loss).all() and np.array_equal(hits, compiled_hits)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a GPU here")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(InputError, match="torch finds no GPU"):
        TorchLearner(configs.preset("m2"), DATA, "cuda", 300)
