"""A study on disk: trials that several processes, now or later, add to one SQLite file until there are enough."""

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, OptunaError
from optuna.trial import TrialState
from sqlalchemy.exc import IntegrityError, OperationalError, SQLAlchemyError

from . import InputError
from .data import Dataset
from .search_space import Space

HEARTBEAT_SECONDS = 5  # while a trial runs, its process writes the time into the study so often
# A trial whose process has not done so for this long is lost. Not shorter: the clocks of several machines differ.
GRACE_SECONDS = 30
LOCK_SECONDS = 60.0  # how long a process waits for another's writing
WAIT_SECONDS = 0.5
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
# What does not change the outcome, but rounding.
WHERE = frozenset(("data", "device", "fused", "gemm", "memory_limit", "compile"))

warnings.filterwarnings("ignore", category=ExperimentalWarning)  # heartbeat and constant liar
optuna.logging.set_verbosity(optuna.logging.ERROR)


class NumberedTPE(optuna.samplers.BaseSampler):
    """TPE whose random numbers follow from the seed and the number of the trial. So no two processes draw the same, nor
    does one that goes on with a study, and one process alone makes the same study again. Trials that run elsewhere
    count as bad ones meanwhile ("constant liar"), which keeps processes apart."""

    def __init__(self, seed: int):
        self._seed, self._tpe = seed, None

    def before_trial(self, study, trial):
        (seed,) = np.random.SeedSequence((self._seed, trial.number)).generate_state(1)
        self._tpe = optuna.samplers.TPESampler(seed=int(seed), multivariate=True, constant_liar=True)

    def infer_relative_search_space(self, study, trial):
        return self._tpe.infer_relative_search_space(study, trial)

    def sample_relative(self, study, trial, search_space):
        return self._tpe.sample_relative(study, trial, search_space)

    def sample_independent(self, study, trial, param_name, param_distribution):
        return self._tpe.sample_independent(study, trial, param_name, param_distribution)


class NotNeeded(Exception):
    """As many trials as were asked for are finished or under way."""


def open_study(file: Path, space: Space, dataset: Dataset) -> optuna.Study:
    """The study in `file`, a new one where there is none. InputError where that is not possible, or where its trials
    are of another data set, of other settings or of another space: such do not compare."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        study = optuna.create_study(
            storage=_storage(file),
            study_name="search",
            direction="maximize",
            load_if_exists=True,
            sampler=NumberedTPE(space.base.seed),
            # The first trials show what is usual; the first epochs of a low learning rate do not show where it ends.
            pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=max(1, space.base.epochs // 4)),
        )
        _compare(study, file, _fingerprint(space, dataset))
    except (OSError, RuntimeError, SQLAlchemyError, OptunaError) as error:
        reason = " ".join(str(getattr(error, "orig", None) or error.__cause__ or error).split())
        raise InputError(f"--study {file} cannot be used ({reason}); give a file of a search, or a new one") from None
    return study


def _storage(file: Path) -> optuna.storages.RDBStorage:
    """The storage in `file`. Processes that create it at the same moment run into each other's half made tables."""
    for last in (*[False] * 20, True):
        try:
            return optuna.storages.RDBStorage(
                sqlalchemy.URL.create("sqlite", database=str(file)).render_as_string(),
                engine_kwargs={"connect_args": {"timeout": LOCK_SECONDS}},
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
            )
        except (IntegrityError, OperationalError):
            if last or not file.is_file():
                raise
            time.sleep(0.2)


def _fingerprint(space: Space, dataset: Dataset) -> dict:
    """What the trials of a study have in common, by the names that an error gives to it."""
    settings = {f"--{name}": value for name, value in asdict(space.base).items() if name not in WHERE}
    everything = {"--data": f"{dataset.name} ({dataset.checksum[:12]})", **settings, "the searched space": space.ranges}
    return json.loads(json.dumps(everything))  # as it comes back


def _compare(study: optuna.Study, file: Path, fingerprint: dict) -> None:
    if "fingerprint" not in study.user_attrs:
        study.set_user_attr("fingerprint", fingerprint)
    kept = study.user_attrs["fingerprint"]
    for name in fingerprint | kept:
        there, here = kept.get(name), fingerprint.get(name)
        if there != here:
            raise InputError(
                f"--study {file} is a search with {name} {there}, and this is one with {here}; "
                "give another --study, or what that search was begun with"
            )


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Its complete and pruned trials."""
    return study.get_trials(deepcopy=False, states=FINISHED)


def add_trials(study: optuna.Study, total: int, objective: Callable, on_trial: Callable, on_wait: Callable) -> None:
    """Run trials until `total` are finished, those of other processes among them, and wait for what runs elsewhere:
    where its process dies, another trial is made here. Calls on_trial() after each trial, on_wait() while waiting.

    objective(trial) returns what is to be high, or raises optuna.TrialPruned; what else it raises ends the search.
    """
    given_up = False

    def counted():
        return study.get_trials(deepcopy=False, states=(*FINISHED, TrialState.RUNNING))

    def guarded(trial):
        nonlocal given_up
        if sum(other.number < trial.number for other in counted()) >= total:
            raise NotNeeded
        try:
            return objective(trial)
        finally:  # another process may have taken this one for dead, after the computer has slept for example
            given_up = all(other.number != trial.number for other in counted())

    while len(finished(study)) < total:
        if len(counted()) < total:
            try:
                study.optimize(guarded, n_trials=1, catch=(NotNeeded,), gc_after_trial=True)
            except (ValueError, AssertionError):  # what Optuna makes of a trial that has been failed elsewhere
                if not given_up:
                    raise
            on_trial()
        else:
            on_wait()
            _fail_lost(study)
            time.sleep(WAIT_SECONDS)


def _fail_lost(study: optuna.Study) -> None:
    """Mark the running trials of processes that are gone as failed."""
    optuna.storages.fail_stale_trials(study)  # those that had a heartbeat
    begun_before = datetime.now() - timedelta(seconds=GRACE_SECONDS)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if not trial.params and trial.datetime_start < begun_before:
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
