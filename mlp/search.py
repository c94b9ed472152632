"""Search for a better configuration: many short trainings, each with other widths, learning rate, schedule, weight
decay and batch size, chosen by Optuna's TPE; those that lag behind the median are cut short.

What is maximised is the validation accuracy of the epoch that a run keeps, the one of the lowest validation loss:
then the best trial, trained again by itself, has the accuracy that it was chosen for. The test images stay unseen.
"""

import gc
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
from collections.abc import Collection
from pathlib import Path

import numpy as np
import optuna

from kernels.host import cores

from . import InputError, data
from .configs import Config
from .distributed import is_job
from .files import file_name, make_folder
from .loop import Reporter, fit
from .run import make_learner, select_device
from .search_results import Progress, write
from .search_space import Space
from .search_study import WAIT_SECONDS, add_trials, finished, open_study

THREAD_VARIABLES = ("KERNELS_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")


def silent(*_) -> None:
    """Tell nobody."""


class TrialReporter(Reporter):
    """Hands every epoch of a training to Optuna, which may end it."""

    def __init__(self, trial, check, show):
        self._trial, self._check, self._show = trial, check, show

    def begin_epoch(self, epoch, epochs, images):
        self._last = epochs

    def advance(self, images):
        self._check()

    def end_epoch(self, row, best):
        self._show(f"trial {self._trial.number}, epoch {row.epoch}/{self._last}, val {row.val_accuracy:.2%}")
        if not math.isfinite(row.train_loss) or not math.isfinite(row.val_loss):
            return  # an accuracy of no meaning
        self._trial.report(row.val_accuracy, row.epoch)
        if row.epoch < self._last and self._trial.should_prune():
            raise optuna.TrialPruned


class Objective:
    """Trains a trial. Data and device are there once, for all trials of this process.

    check: called often, raises KeyboardInterrupt to end the search. show: takes a text that says what is being done.
    """

    def __init__(self, space: Space, dataset: data.Dataset, check=silent, show=silent):
        self.space, self.dataset, self.check, self.show = space, dataset, check, show
        self.split = data.stratified_split(dataset.labels)
        self.device = select_device(space.base)

    def __call__(self, trial: optuna.Trial) -> float:
        """The validation accuracy of the epoch that was kept. optuna.TrialPruned also where the loss became NaN or
        infinite, or the model does not fit into the memory: results, which tell the sampler where not to look."""
        self.free()
        fields = self.space.suggest(trial)
        trial.set_user_attr("fields", fields)
        config = self.space.config(fields)
        try:
            learner, _ = make_learner(config, self.dataset, self.device, len(self.split.train))
        except InputError:
            trial.set_user_attr("outcome", "does not fit")
            raise optuna.TrialPruned from None
        with np.errstate(over="ignore", invalid="ignore"):  # a loss that diverges is an outcome
            history = fit(learner, self.split, config, TrialReporter(trial, self.check, self.show))
        if history.outcome == "interrupted":
            raise KeyboardInterrupt
        if history.outcome == "terminated":
            sys.exit(128 + signal.SIGTERM)
        trial.set_user_attr("outcome", history.outcome)
        trial.set_user_attr("kept_epoch", history.best_epoch)
        if history.outcome == "diverged":
            raise optuna.TrialPruned
        return history.rows[history.best_epoch - 1].val_accuracy

    def free(self) -> None:
        """Give back what the last trial took; only now, as an exception that ended it has kept its learner alive."""
        gc.collect()
        self.device.release_memory()


def run(config: Config, given: Collection[str], *, search: int | None = None, study: Path | None = None,
        jobs: int = 1, out: Path | None = None, **of_one_run: bool) -> int:  # fmt: skip
    """Add trials to `study` until `search` are finished, in `jobs` processes, and write the results into `out`.

    config, given: the preset with its flags, and the fields that flags have decided, which are not searched. study: a
    file, default runs/search-<model>-<data>.db; it goes on if it is there. out: default a folder beside it.
    of_one_run: flags that must not be set.

    Prints as it goes. Returns the exit status: 0, 130 after Ctrl-C, 1 where no trial is complete; what there is has
    been written in each case. InputError for whatever the user can mend.
    """
    _refuse(search, jobs, of_one_run)
    if is_job():
        raise InputError("--search has processes of its own; give --jobs instead of starting it by torchrun")
    space = Space.around(config, given)
    dataset = data.load(config.data)
    objective = Objective(space, dataset)
    make_learner(config, dataset, objective.device, len(objective.split.train))  # what is not possible shows now
    objective.free()
    file = study or Path("runs") / f"search-{config.model}-{file_name(dataset.name)}.db"
    out = out or file.with_name(f"{file.stem}-results")
    opened = open_study(file, space, dataset)
    make_folder(out)
    if dataset.notice:
        print(f"\n*** {dataset.notice} ***\n")
    print(
        f"search around {config.model} on {dataset.name}, at most {config.epochs} epochs: {', '.join(space.ranges)}\n"
        f"{search} trials, of which {len(finished(opened))} are finished in {file}; "
        f"{jobs} {'process' if jobs == 1 else 'processes'} on {objective.device.name}",
        flush=True,
    )
    status = _search(opened, file, search, jobs, objective)
    if write(out, opened, space, dataset) is None and not status:
        print("error: no trial is complete; try a lower --lr, or more trials", file=sys.stderr)
        return 1
    return status


def _refuse(search, jobs, of_one_run) -> None:
    if search is None:
        raise InputError("--study and --jobs belong to --search N; give it, too")
    for flag, number in (("--search", search), ("--jobs", jobs)):
        if number < 1:
            raise InputError(f"{flag} {number} is not possible; give a whole number of at least 1")
    for name, value in of_one_run.items():
        if value:
            raise InputError(f"--{name.replace('_', '-')} belongs to a single training; leave it or --search out")


def _search(study, file, trials, jobs, objective) -> int:
    """0, 130 after Ctrl-C, or the status of a process that failed."""
    progress = Progress(study, trials)
    try:
        if jobs > 1:
            return _in_processes(file, trials, jobs, objective.space, progress)
        objective.show = progress.show
        add_trials(study, trials, objective, progress.update, progress.wait)
        return 0
    except KeyboardInterrupt:
        return 130
    finally:
        progress.update()
        progress.close()


# ---- several processes


def _in_processes(file, trials, jobs, space, progress) -> int:
    """Share the cores and the trials among `jobs` processes; the first status that is not 0."""
    for variable in THREAD_VARIABLES:  # before they import NumPy
        os.environ.setdefault(variable, str(max(1, cores() // jobs)))
    context = multiprocessing.get_context("spawn")  # a fork would share threads and the GPU
    lifeline, held = context.Pipe(duplex=False)  # at its end when this process closes it or dies
    workers = [context.Process(target=_work, args=(file, trials, space, lifeline)) for _ in range(jobs)]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # they inherit that: only this process hears of Ctrl-C
    for worker in workers:
        worker.start()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        while any(worker.is_alive() for worker in workers):
            multiprocessing.connection.wait([w.sentinel for w in workers if w.is_alive()], WAIT_SECONDS)
            progress.update()
    finally:
        held.close()
        for worker in workers:
            worker.join()
    for worker in workers:
        if worker.exitcode < 0:
            print(f"error: signal {-worker.exitcode} ended a process of the search; try fewer --jobs", file=sys.stderr)
    return next((abs(worker.exitcode) for worker in workers if worker.exitcode), 0)


def _work(file, trials, space, lifeline) -> None:
    """A process of its own: add trials to the study until there are enough, or the lifeline ends."""

    def check():
        if lifeline.poll():
            raise KeyboardInterrupt

    try:
        dataset = data.load(space.base.data)
        objective = Objective(space, dataset, check)
        add_trials(open_study(file, space, dataset), trials, objective, on_trial=check, on_wait=check)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
