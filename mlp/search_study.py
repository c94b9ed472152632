"""A study on disk: trials that several processes, now or later, add to one SQLite file until there are enough."""

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import optuna
import sqlalchemy
from optuna.trial import TrialState

from . import InputError
from .data import Dataset
from .search_space import Space

HEARTBEAT_SECONDS = 5  # while a trial runs, its process writes the time into the study so often
# A trial whose process has not done so for this long is lost. Not shorter: the clocks of several machines differ.
GRACE_SECONDS = 60
LOCK_SECONDS = 60.0  # how long a process waits for another's writing
WAIT_SECONDS = 0.5
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
WHERE = frozenset(("data", "device", "fused", "gemm", "memory_limit"))  # what does not change the outcome, but rounding

warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # heartbeat and constant liar
optuna.logging.set_verbosity(optuna.logging.ERROR)


class NumberedTPE(optuna.samplers.BaseSampler):
    """TPE whose random numbers follow from the seed and the number of the trial. So no two processes draw the same,
    a study goes on after an interruption as it would have without, and one process alone makes the same study again.
    Trials that run elsewhere count as bad ones meanwhile ("constant liar"), which keeps processes apart."""

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
        storage = optuna.storages.RDBStorage(
            sqlalchemy.URL.create("sqlite", database=str(file)).render_as_string(),
            engine_kwargs={"connect_args": {"timeout": LOCK_SECONDS}},
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=GRACE_SECONDS,
        )
        study = optuna.create_study(
            storage=storage,
            study_name="search",
            direction="maximize",
            load_if_exists=True,
            sampler=NumberedTPE(space.base.seed),
            # The first trials show what is usual, and the first epochs of a low learning rate do not show where it ends.
            pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=max(1, space.base.epochs // 4)),
        )
        _compare(study, file, _fingerprint(space, dataset))
    except (OSError, RuntimeError, sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        reason = " ".join(str(getattr(error, "orig", None) or error.__cause__ or error).split())
        raise InputError(f"--study {file} cannot be used ({reason}); give a file of a search, or a new one") from None
    return study


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


def add_trials(study: optuna.Study, total: int, objective: Callable, on_trial: Callable[[], None]) -> None:
    """Run trials until `total` are finished, those of other processes among them, and wait for what runs elsewhere:
    if its process dies, its trial is made here. on_trial is called after each trial, and while waiting.

    objective(trial) returns what is to be high, or raises optuna.TrialPruned; what else it raises ends the search.
    """

    def guarded(trial):
        before = study.get_trials(deepcopy=False, states=(*FINISHED, TrialState.RUNNING))
        if sum(other.number < trial.number for other in before) >= total:
            raise NotNeeded
        return objective(trial)

    while len(finished(study)) < total:
        if len(study.get_trials(deepcopy=False, states=(*FINISHED, TrialState.RUNNING))) < total:
            study.optimize(guarded, n_trials=1, catch=(NotNeeded,), gc_after_trial=True)
        else:
            optuna.storages.fail_stale_trials(study)
            time.sleep(WAIT_SECONDS)
        on_trial()
