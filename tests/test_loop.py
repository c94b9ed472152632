"""The training loop: early stopping, interruption, history, and runs that can be repeated bit by bit."""

import dataclasses
import math
import signal
import threading

import numpy as np
import pytest

from kernels import host
from mlp import configs, loop
from mlp.data import Split, stratified_split
from mlp.distributed import Job
from mlp.evaluate import Evaluation
from mlp.loop import Reporter, fit
from mlp.progress import EpochRow
from mlp.scratch import ScratchLearner

from .training import BACKENDS, all_rows, cpu, easy_dataset

ROWS = 25
SPLIT = Split(*np.split(np.arange(30, dtype=np.int32), [ROWS, 29]))


class Scripted:
    """A learner whose validation losses are given; its weights are the number of steps it took."""

    batch_size, steps_per_launch, job = 10, 1, Job()

    def __init__(self, val_losses, train_loss=0.5, on_step=lambda steps: None):
        self.val_losses, self.train_loss, self.on_step = iter(val_losses), train_loss, on_step
        self.weights, self.seen, self.calls, self.epochs = 0, 0, [], []

    def begin_epoch(self, index, epoch):
        assert np.array_equal(index, SPLIT.train)
        self.epochs.append(epoch)
        self.seen = 0

    def train(self, start, stop, lr):
        self.calls.append((start, stop, lr))
        self.weights += 1
        self.seen += stop - start
        self.on_step(self.weights)

    def synchronize(self):
        self.waited = self.weights

    def totals(self):
        return self.train_loss * self.seen, self.seen - 5

    def evaluate(self, index):
        assert self.waited == self.weights  # the time of the training was taken when it was over
        assert np.array_equal(index, SPLIT.val)
        return Evaluation(next(self.val_losses), np.array([[3, 1], [0, 0]]))

    def is_finite(self):
        return math.isfinite(self.train_loss)

    def state(self):
        return self.weights, self.seen, self.train_loss

    def load_state(self, state):
        self.weights, self.seen, self.train_loss = state

    def train_step(self, start, stop, lr):
        self.train(start, stop, lr)

    def first_fault(self, start, stop, lr):
        self.train(start, stop, lr)
        return f"what step {self.weights} made"

    def snapshot(self):
        return self.weights

    def restore(self, snapshot):
        self.weights = snapshot


STEPS = 3  # of an epoch: 10 + 10 + 5 rows


def scripted_config(**changes):
    return configs.preset("m1", **({"epochs": 6, "patience": None} | changes))


@pytest.mark.parametrize("losses, patience, outcome, epochs, best", [
    ([3, 2, 1], None, "finished", 3, 3),
    ([3, 1, 2], None, "finished", 3, 2),
    ([1, 2, 3], None, "finished", 3, 1),
    ([3, 1, 2, 2, 9], 2, "stopped early", 4, 2),
    ([3, 1, 2, 0.5, 2, 2, 9], 2, "stopped early", 6, 4),  # an improvement starts the count again
    ([3, 2, 2, 2], 1, "stopped early", 3, 2),  # an equal loss is none
    ([3, 2, 2.5], 1, "stopped early", 3, 2),
    ([3, 2, 2.5, 2.4], 2, "stopped early", 4, 2),  # in the last epoch allowed too
])  # fmt: skip
def test_the_best_weights_are_kept(losses, patience, outcome, epochs, best):
    learner = Scripted(losses)
    history = fit(learner, SPLIT, scripted_config(epochs=len(losses), patience=patience))
    assert (history.outcome, len(history.rows), history.best_epoch) == (outcome, epochs, best)
    assert learner.weights == STEPS * best
    assert [row.val_loss for row in history.rows] == losses[:epochs]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["train", "val"])
def test_a_loss_that_is_not_finite_ends_the_run(bad, where):
    learner = Scripted([2, 1, bad if where == "val" else 0.5, 0.1])

    def spoil(steps):
        if where == "train" and steps > 2 * STEPS:
            learner.train_loss = bad

    learner.on_step = spoil
    history = fit(learner, SPLIT, scripted_config())
    assert (history.outcome, len(history.rows)) == ("diverged", 3)
    step = 2 * STEPS + 1
    expected = f"step {step} (epoch 3): what step {step} made" if where == "train" else "the validation loss of epoch 3"
    assert history.fault == expected
    if where == "val":
        assert history.best_epoch == 2 and learner.weights == 2 * STEPS


def test_a_run_that_diverges_at_once_keeps_the_initial_weights():
    learner = Scripted([math.nan], train_loss=math.nan)
    history = fit(learner, SPLIT, scripted_config())
    assert (history.outcome, history.best_epoch, learner.weights) == ("diverged", 0, 0)


def test_history_and_reporter_hear_everything():
    heard, lengths = [], []

    class Listener(Reporter):
        def begin_epoch(self, epoch, epochs, images):
            heard.append(("begin", epoch, epochs, images))

        def advance(self, images):
            heard.append(images)

        def end_epoch(self, row, best):
            heard.append(("end", row.epoch, best))

    learner = Scripted([2, 3])
    config = scripted_config(epochs=2, lr=0.4, schedule="exponential", gamma=0.5)
    history = fit(learner, SPLIT, config, Listener(), lambda history: lengths.append(len(history.rows)))
    assert heard == [
        ("begin", 1, 2, ROWS), 10, 10, 5, ("end", 1, True),
        ("begin", 2, 2, ROWS), 10, 10, 5, ("end", 2, False),
    ]  # fmt: skip
    assert lengths == [1, 2]
    assert learner.calls == [(a, min(a + 10, ROWS), lr) for lr in (0.4, 0.2) for a in (0, 10, 20)]
    for number, row in enumerate(history.rows, 1):
        assert (row.epoch, row.lr) == (number, 0.4 * 0.5 ** (number - 1))
        assert (row.train_loss, row.train_accuracy, row.val_accuracy) == (0.5, 20 / 25, 0.75)
        assert row.seconds > 0 and row.images_per_second == pytest.approx(ROWS / row.seconds)
    assert learner.epochs == [1, 2]


def test_a_call_trains_as_many_steps_as_the_learner_launches_at_once():
    learner = Scripted([1])
    learner.steps_per_launch = 2
    fit(learner, SPLIT, scripted_config(epochs=1))
    assert [call[:2] for call in learner.calls] == [(0, 20), (20, ROWS)]


@pytest.mark.parametrize("wanted", [False, True])
def test_the_running_loss_is_read_only_for_who_wants_it(monkeypatch, wanted):
    heard = []

    class Listener(Reporter):
        wants_readings = wanted

        def reading(self, loss, accuracy):
            heard.append((loss, accuracy))

    monkeypatch.setattr(loop, "SECONDS_PER_READING", 0.0)
    fit(Scripted([1]), SPLIT, scripted_config(epochs=1), Listener())
    assert heard == ([(0.5, 5 / 10), (0.5, 15 / 20), (0.5, 20 / 25)] if wanted else [])


@pytest.fixture
def handler():
    """A SIGINT handler of the caller's, which fit must give back."""
    calls = []
    before = signal.signal(signal.SIGINT, lambda *_: calls.append("the caller's"))
    ours = signal.getsignal(signal.SIGINT)
    yield calls
    assert signal.getsignal(signal.SIGINT) is ours
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("step, epochs, best", [(1, 0, 0), (2 * STEPS + 1, 2, 1), (2 * STEPS, 2, 1)])
def test_ctrl_c_finishes_the_step_and_keeps_the_best_weights(handler, step, epochs, best):
    def interrupt(steps):
        if steps == step:
            signal.raise_signal(signal.SIGINT)

    learner = Scripted([1, 2, 3, 4], on_step=interrupt)
    history = fit(learner, SPLIT, scripted_config())
    assert (history.outcome, len(history.rows), history.best_epoch) == ("interrupted", epochs, best)
    assert len(learner.calls) == step and learner.weights == STEPS * best
    assert handler == []


def test_a_second_ctrl_c_reaches_the_handler_of_the_caller(handler):
    def twice(steps):
        if steps == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    assert fit(Scripted([1]), SPLIT, scripted_config(epochs=1)).outcome == "finished"
    assert fit(Scripted([1], on_step=twice), SPLIT, scripted_config()).outcome == "interrupted"
    assert handler == ["the caller's"]


def test_the_handler_comes_back_after_an_exception(handler):
    def fail(steps):
        raise RuntimeError("from the learner")

    with pytest.raises(RuntimeError, match="from the learner"):
        fit(Scripted([1], on_step=fail), SPLIT, scripted_config())


def test_fit_works_outside_the_main_thread(handler):
    results = []
    learner = Scripted([2, 1, 3])
    thread = threading.Thread(target=lambda: results.append(fit(learner, SPLIT, scripted_config(epochs=3))))
    thread.start()
    thread.join(timeout=60)
    assert [history.outcome for history in results] == ["finished"] and learner.weights == 2 * STEPS


def train(backend, **changes):
    """Three epochs on the easy images: the parameters and the history without times."""
    data = easy_dataset(400, 7)
    split = stratified_split(data.labels)
    config = configs.preset("m1", **({"hidden": (96, 40), "epochs": 3, "batch_size": 64} | changes))
    ours = ScratchLearner(config, data, cpu(backend), len(split.train))
    history = fit(ours, split, config)
    rows = [dataclasses.replace(row, seconds=0.0, images_per_second=0.0) for row in history.rows]
    return ours.model.parameters, rows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changes", [{}, {"optimizer": "sgd", "momentum": 0.9}, {"batch_size": "full"}])
def test_the_same_seed_gives_the_same_bits(backend, changes):
    (first, first_rows), (again, again_rows) = train(backend, **changes), train(backend, **changes)
    assert np.isfinite(first).all() and len(first_rows) == 3
    assert np.array_equal(first, again) and first_rows == again_rows
    other, other_rows = train(backend, seed=1, **changes)
    assert not np.array_equal(first, other) and first_rows[0].train_loss != other_rows[0].train_loss


def test_the_number_of_threads_changes_no_bit():
    wide = {"hidden": (1024, 512), "batch_size": 256}  # wide enough for the kernels to use their threads
    results = []
    try:
        for threads in (1, 4):
            host.set_threads(threads)
            results.append(train("fused", **wide))
    finally:
        host.set_threads(host._default_threads())
    (one, one_rows), (four, four_rows) = results
    assert np.array_equal(one, four) and one_rows == four_rows


def test_the_training_set_alone_is_trained_on():
    data = easy_dataset(200, 5)
    split = stratified_split(data.labels)
    seen = []

    class Watching(ScratchLearner):
        def begin_epoch(self, index, epoch):
            super().begin_epoch(index, epoch)
            seen.append(self._training.order[: len(index)].copy())

    config = configs.preset("m0", epochs=2)
    fit(Watching(config, data, cpu("plain"), len(split.train)), split, config)
    assert not np.array_equal(*seen) and not np.array_equal(seen[0], split.train)
    assert len(seen) == 2 and all(np.array_equal(np.sort(order), split.train) for order in seen)
    assert len(np.intersect1d(seen[0], np.concatenate([split.val, split.test]))) == 0
    assert len(all_rows(data)) == sum(map(len, (split.train, split.val, split.test)))


def test_the_columns_of_the_history_are_the_documented_ones():
    assert [field.name for field in dataclasses.fields(EpochRow)] == [
        "epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds",
        "images_per_second",
    ]  # fmt: skip
