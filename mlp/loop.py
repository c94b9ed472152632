"""The training loop: epochs, batches, early stopping. It knows a model only by the methods it calls.

A learner has batch_size, steps_per_launch, begin_epoch(index, epoch), train(start, stop, lr), synchronize(),
evaluate(index), totals(), snapshot() and restore(snapshot); see scratch.ScratchLearner and torch_models.TorchLearner,
which have what run.py needs besides.
"""

import math
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

from .configs import Config
from .data import Split
from .optim import STEPS_PER_RATE, learning_rate

SECONDS_PER_READING = 0.2


@dataclass(frozen=True)
class EpochRow:
    """A row of history.csv. Training loss and accuracy are those of the batches as they were trained on."""

    epoch: int  # from 1
    lr: float  # in the middle of the epoch
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float  # training only, without the validation
    images_per_second: float


@dataclass
class History:
    rows: list[EpochRow] = field(default_factory=list)
    best_epoch: int = 0  # whose parameters the learner ends with; 0: the initial ones
    outcome: str = "finished"  # or "stopped early", "interrupted", "diverged"


class Interrupt:
    """While active, Ctrl-C only sets `requested`, so that no step is torn; a second Ctrl-C acts as usual."""

    def __init__(self):
        self.requested = False

    def __enter__(self):
        try:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        except ValueError:  # not in the main thread, where there are no signals to handle
            self._previous = None
        return self

    def _handle(self, *_):
        self.requested = True
        signal.signal(signal.SIGINT, self._previous)

    def __exit__(self, *_):
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)


class Reporter:
    """Hears of the progress; this one says nothing."""

    wants_readings = False  # each waits for the GPU and copies the running loss

    def begin_epoch(self, epoch: int, epochs: int, images: int) -> None: ...
    def advance(self, images: int) -> None: ...
    def reading(self, loss: float, accuracy: float) -> None: ...
    def end_epoch(self, row: EpochRow, best: bool) -> None: ...


def fit(learner, split: Split, config: Config, reporter: Reporter | None = None,
        on_epoch: Callable[[History], None] = lambda history: None, annotate=nullcontext) -> History:  # fmt: skip
    """Train until the epochs, the patience or the user ends it, and leave the learner with its best parameters.

    Best means the lowest validation loss. on_epoch is called after every epoch, with the rows so far. An epoch and
    its validation run inside `with annotate("epoch"):` (see ranges.py).
    Ctrl-C ends after the current step; the epoch that it cut short is not counted.
    """
    reporter = reporter or Reporter()
    history, best_loss, best = History(), math.inf, learner.snapshot()
    with Interrupt() as interrupt:
        for epoch in range(1, config.epochs + 1):
            with annotate("epoch"):
                row = _epoch(learner, split, config, epoch, reporter, interrupt)
            if row is None:
                history.outcome = "interrupted"
                break
            history.rows.append(row)
            improved = row.val_loss < best_loss
            if improved:
                best_loss, best, history.best_epoch = row.val_loss, learner.snapshot(), epoch
            reporter.end_epoch(row, improved)
            on_epoch(history)
            if not math.isfinite(row.train_loss) or not math.isfinite(row.val_loss):
                history.outcome = "diverged"
            elif interrupt.requested:
                history.outcome = "interrupted"
            elif config.patience and epoch - history.best_epoch >= config.patience:
                history.outcome = "stopped early"
            if history.outcome != "finished":
                break
    learner.restore(best)
    return history


def _epoch(learner, split, config, epoch, reporter, interrupt) -> EpochRow | None:
    """Train and validate one epoch; None when it was interrupted."""
    n, stride = len(split.train), learner.batch_size * learner.steps_per_launch
    stretch = learner.batch_size * STEPS_PER_RATE
    reporter.begin_epoch(epoch, config.epochs, n)
    started = read = time.perf_counter()
    learner.begin_epoch(split.train, epoch)
    for start in range(0, n, stride):
        if interrupt.requested:
            return None
        stop = min(start + stride, n)
        begin = start - start % stretch
        middle = (begin + min(begin + stretch, n)) / 2
        learner.train(start, stop, learning_rate(config, epoch - 1, middle / n))
        reporter.advance(stop - start)
        if reporter.wants_readings and time.perf_counter() - read > SECONDS_PER_READING:
            loss, correct = learner.totals()
            reporter.reading(loss / stop, correct / stop)
            read = time.perf_counter()
    learner.synchronize()
    seconds = time.perf_counter() - started
    val = learner.evaluate(split.val)
    loss, correct = learner.totals()  # of the training; they came with the copy that evaluate() has made
    lr = learning_rate(config, epoch - 1)
    return EpochRow(epoch, lr, loss / n, correct / n, val.cross_entropy, val.accuracy, seconds, n / seconds)
