"""The training loop: epochs, batches, early stopping. It knows a model only by the methods it calls.

A learner has batch_size, steps_per_launch, job, begin_epoch(index, epoch), train(start, stop, lr), train_step(start,
stop, lr), synchronize(), evaluate(index), totals(), is_finite(), first_fault(start, stop, lr), state() and load_state(),
snapshot() and restore(), to_host() and from_host(); see scratch.ScratchLearner and torch_models.TorchLearner, which
have what run.py needs besides.
"""

import math
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

from .configs import Config
from .data import Split
from .faults import locate
from .optim import STEPS_PER_RATE, learning_rate, rate_at
from .progress import EpochRow, History, Keeper, Progress

SECONDS_PER_READING = 0.2
OUTCOMES = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Signals:
    """While active, Ctrl-C and SIGTERM are only noted, so that no step is torn; a second one acts as usual."""

    def __init__(self):
        self.received = 0

    def __enter__(self):
        try:
            self._previous = {number: signal.signal(number, self._handle) for number in OUTCOMES}
        except ValueError:  # not in the main thread, where there are no signals to handle
            self._previous = {}
        return self

    def _handle(self, number, _):
        self.received = self.received or number
        signal.signal(number, self._previous[number])

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Reporter:
    """Hears of the progress; this one says nothing."""

    wants_readings = False  # each waits for the GPU and copies the running loss

    def begin_epoch(self, epoch: int, epochs: int, images: int) -> None: ...
    def advance(self, images: int) -> None: ...
    def reading(self, loss: float, accuracy: float) -> None: ...
    def end_epoch(self, row: EpochRow, best: bool) -> None: ...


def fit(learner, split: Split, config: Config, reporter: Reporter | None = None,
        on_epoch: Callable[[History], None] = lambda history: None, annotate=nullcontext, *,
        progress: Progress | None = None, keeper: Keeper | None = None) -> History:  # fmt: skip
    """Train until the epochs, the patience or the user ends it, and leave the learner with its best parameters.

    Best means the lowest validation loss. on_epoch is called after every epoch, with the rows so far. An epoch and
    its validation run inside `with annotate("epoch"):` (see ranges.py). progress: where to go on, instead of from the
    start. keeper: what is told of the progress every now and then.
    Ctrl-C ends after the current step; the epoch that it cut short is not counted. SIGTERM does, too. Whatever ends it
    but the epochs and the patience, the keeper is told the last good progress.
    """
    with Signals() as signals:
        return _Training(learner, split, config, reporter or Reporter(), annotate, keeper, signals).run(
            progress, on_epoch
        )


class _Training:
    def __init__(self, learner, split, config, reporter, annotate, keeper, signals):
        self.learner, self.split, self.config, self.reporter = learner, split, config, reporter
        self.annotate, self.keeper, self.signals = annotate, keeper, signals
        self.images = len(split.train)

    def run(self, progress: Progress | None, on_epoch) -> History:
        learner, config, resumed = self.learner, self.config, progress is not None
        self.kept = progress or Progress(learner.state(), learner.snapshot())
        history = self.kept.history
        while not self._is_over(history) and self.kept.epoch <= config.epochs:
            learner.begin_epoch(self.split.train, self.kept.epoch)
            if resumed:
                learner.load_state(self.kept.state)
                resumed = False
            else:
                self.kept = replace(self.kept, state=learner.state())
            with self.annotate("epoch"):
                row = self._epoch()
            if row is None:
                break
            history.rows.append(row)
            improved = row.val_loss < self.kept.best_loss and history.outcome != "diverged"
            if improved:
                self.kept = replace(self.kept, best_loss=row.val_loss, best=learner.snapshot())
                history.best_epoch = row.epoch
            self.reporter.end_epoch(row, improved)
            on_epoch(history)
            if history.outcome == "diverged":
                break
            self.kept = replace(self.kept, epoch=row.epoch + 1, done=0, seconds=0.0)
        learner.restore(self.kept.best)
        return history

    def _is_over(self, history) -> bool:
        epochs = len(history.rows)
        if self.config.patience and epochs - history.best_epoch >= self.config.patience:
            history.outcome = "stopped early"
        return history.outcome != "finished"

    def _epoch(self) -> EpochRow | None:
        """Train and validate the rest of an epoch; None when it was cut short."""
        learner, config, n, epoch = self.learner, self.config, self.images, self.kept.epoch
        stride = learner.batch_size * learner.steps_per_launch
        self.reporter.begin_epoch(epoch, config.epochs, n)
        if self.kept.done:
            self.reporter.advance(self.kept.done)
        self.started = read = time.perf_counter()
        for start in range(self.kept.done, n, stride):
            if not self._go_on(start):
                return None
            stop = min(start + stride, n)
            learner.train(start, stop, rate_at(config, epoch, start, n, learner.batch_size))
            self.reporter.advance(stop - start)
            if self.reporter.wants_readings and time.perf_counter() - read > SECONDS_PER_READING:
                loss, correct = learner.totals()
                self.reporter.reading(loss / stop, correct / stop)
                read = time.perf_counter()
        learner.synchronize()
        seconds = self._seconds()
        val = learner.evaluate(self.split.val)
        loss, correct = learner.totals()  # of the training; they came with the copy that evaluate() has made
        row = EpochRow(epoch, learning_rate(config, epoch - 1), loss / n, correct / n, val.cross_entropy, val.accuracy,
                       seconds, n / seconds)  # fmt: skip
        if not (math.isfinite(row.train_loss) and math.isfinite(row.val_loss) and self._is_finite()):
            self._diverged()
        return row

    def _go_on(self, start) -> bool:
        """Before the step at `start`: keep the progress where it is time, and see whether to stop here. Processes of a
        job do so together, every now and then."""
        learner, keeper, history = self.learner, self.keeper, self.kept.history
        if learner.job.size > 1 and start % (learner.batch_size * STEPS_PER_RATE):
            return True
        due = keeper is not None and keeper.due(self.kept.epoch)
        received, due = learner.job.most(self.signals.received, due)
        if not received and not due:
            return True
        if start != self.kept.done:
            if not self._is_finite():
                self._diverged()
                return False
            self.kept = replace(self.kept, state=learner.state(), done=start, seconds=self._seconds())
        if keeper is not None:
            keeper.save(self.kept, learner)
        self.started = time.perf_counter()
        if received:
            history.outcome = OUTCOMES[received]
        return not received

    def _is_finite(self) -> bool:
        return not self.learner.job.any(not self.learner.is_finite())

    def _seconds(self) -> float:
        return self.kept.seconds + time.perf_counter() - self.started

    def _diverged(self) -> None:
        history = self.kept.history
        history.outcome, history.fault = "diverged", locate(self.learner, self.split.train, self.config, self.kept)
        if self.keeper is not None:
            self.keeper.save(self.kept, self.learner)
