"""What a model is judged by: against hand calculations, in chunks, under noise, fused and plain."""

import numpy as np
import pytest

from kernels import plain
from mlp.evaluate import NOISE_SIGMA, Evaluation
from mlp.model import MLP

from .training import BACKENDS, all_rows, easy_dataset, learner

HAND = np.array([[5, 1, 0], [2, 2, 0], [0, 1, 3]])  # rows are labels


def test_accuracy_and_macro_f1_by_hand():
    evaluation = Evaluation(0.25, HAND)
    assert evaluation.n == 14
    assert evaluation.accuracy == pytest.approx(10 / 14, rel=1e-15)
    # 2 TP / (2 TP + FP + FN)
    f1 = [2 * 5 / (2 * 5 + 2 + 1), 2 * 2 / (2 * 2 + 2 + 2), 2 * 3 / (2 * 3 + 0 + 1)]
    assert evaluation.macro_f1 == pytest.approx(sum(f1) / 3, rel=1e-15)
    assert evaluation.summary() == {
        "accuracy": evaluation.accuracy, "macro_f1": evaluation.macro_f1, "cross_entropy": 0.25, "n": 14,
    }  # fmt: skip


def test_a_class_that_is_absent_or_never_predicted_counts_as_zero():
    absent = np.array([[4, 0, 0], [0, 4, 0], [0, 0, 0]])
    never = np.array([[4, 0, 0], [0, 4, 0], [1, 0, 0]])
    assert Evaluation(0.0, absent).macro_f1 == pytest.approx(2 / 3, rel=1e-15)
    assert Evaluation(0.0, never).macro_f1 == pytest.approx((8 / 9 + 1 + 0) / 3, rel=1e-15)


def trained(backend, chunk_rows=2048, steps=2):
    """A learner that is right about most images but not about all, and its data."""
    data = easy_dataset(211, 6)
    ours = learner(backend, data, chunk_rows, hidden=(32,), lr=0.002)
    ours.begin_epoch(all_rows(data))
    for _ in range(steps):
        ours.train_step(0, 211, 0.002)
    return ours, data


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_equals_a_calculation_in_float64(backend):
    ours, data = trained(backend)
    exact = MLP(ours.model.sizes, "relu", rows=211, ops=plain, dtype=np.float64)
    for wide, narrow in zip(exact.weights + exact.biases, ours.model.weights + ours.model.biases):
        wide[...] = narrow
    index = np.random.default_rng(1).permutation(all_rows(data))[:150]
    logits = exact.forward(data.images[index] / 255.0)
    shifted = logits - logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(150), data.labels[index]]
    expected = np.zeros((6, 6), np.int64)
    for label, prediction in zip(data.labels[index], logits.argmax(axis=1)):
        expected[label, prediction] += 1
    evaluation = ours.evaluate(index)
    assert evaluation.confusion.tolist() == expected.tolist()
    assert not np.array_equal(expected, expected.T) and 0 < evaluation.accuracy < 1
    assert abs(evaluation.cross_entropy - losses.mean()) <= 1e-6 * losses.mean()
    assert evaluation.accuracy == np.mean(logits.argmax(axis=1) == data.labels[index])


def test_rows_of_the_confusion_are_labels_and_columns_predictions():
    ours, data = trained("plain")
    ours.model.biases[-1][2] = 1e4  # every image becomes class 2
    confusion = ours.evaluate(all_rows(data)).confusion
    assert confusion[:, 2].tolist() == np.bincount(data.labels).tolist()
    assert confusion.sum() == confusion[:, 2].sum() == 211


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk_rows", [1, 7, 210, 211])
@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_chunks_change_nothing(backend, chunk_rows, sigma):
    whole, data = trained(backend)
    chunked = learner(backend, data, chunk_rows, hidden=(32,))
    chunked.restore(whole.snapshot())
    one, many = whole.evaluate(all_rows(data), sigma), chunked.evaluate(all_rows(data), sigma)
    assert one.confusion.tolist() == many.confusion.tolist()
    assert abs(one.cross_entropy - many.cross_entropy) <= 1e-6 * one.cross_entropy


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_is_repeatable_and_does_harm(backend):
    ours, data = trained(backend, steps=6)
    rows = all_rows(data)
    first, again = ours.evaluate(rows, 0.4), ours.evaluate(rows, 0.4)
    assert first.confusion.tolist() == again.confusion.tolist() and first.cross_entropy == again.cross_entropy
    losses = [ours.evaluate(rows, sigma).cross_entropy for sigma in (0.0, 0.3, 3.0)]
    assert losses[0] < losses[1] < losses[2]
    reversed_order = ours.evaluate(rows[::-1].copy(), 0.4)  # the noise belongs to the image, not to its place
    assert reversed_order.confusion.tolist() == first.confusion.tolist()


def test_fused_equals_plain():
    plain_learner, data = trained("plain")
    fused_learner = learner("fused", data, hidden=(32,))
    fused_learner.restore(plain_learner.snapshot())
    for sigma in NOISE_SIGMA:
        one, other = (ours.evaluate(all_rows(data), sigma) for ours in (plain_learner, fused_learner))
        assert one.confusion.tolist() == other.confusion.tolist()
        assert abs(one.cross_entropy - other.cross_entropy) <= 1e-5 * one.cross_entropy


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_changes_neither_parameters_nor_training_totals(backend):
    ours, data = trained(backend)
    before, totals = ours.model.parameters.copy(), ours.totals()
    ours.evaluate(all_rows(data), 0.2)
    assert np.array_equal(ours.model.parameters, before) and ours.totals() == totals
