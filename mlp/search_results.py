"""What a search shows while it runs, and what it leaves behind."""

import csv
import io
import json
import warnings
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from . import plots
from .data import Dataset
from .files import replace_text
from .search_space import Space, as_flags
from .search_study import WHERE, finished

# What belongs together, searched or not: a learning rate means little with another optimizer or number of epochs.
RECIPE = (
    "hidden", "batch_size", "optimizer", "momentum", "lr", "schedule", "decay", "gamma", "l2", "decoupled", "epochs",
)  # fmt: skip
COLUMNS = ("trial", "state", "outcome", "val_accuracy", "kept_epoch", "epochs", "seconds")
ENOUGH = 5  # trials that should be among the best share that PED-ANOVA compares with all


class Progress:
    """A line for every trial that ends, in whatever process, and a bar of them on a terminal."""

    def __init__(self, study: optuna.Study, total: int):
        self._study, self._seen = study, {trial.number for trial in finished(study)}
        self._bar = tqdm(total=total, initial=len(self._seen), desc="search", unit="trial", leave=False, disable=None)

    def update(self) -> None:
        """Show the trials that have ended since the last call."""
        new = [trial for trial in finished(self._study) if trial.number not in self._seen]
        for trial in sorted(new, key=lambda trial: trial.datetime_complete):
            self._seen.add(trial.number)
            so_far = best([t for t in finished(self._study) if t.number in self._seen])
            with self._bar.external_write_mode():
                print(_line(trial, so_far), flush=True)
            self._bar.update()

    def show(self, text: str) -> None:
        """Say beside the bar what is being done."""
        self._bar.set_postfix_str(text)

    def wait(self) -> None:
        """What is still to come runs elsewhere, or did when its process died."""
        self.show("waiting for trials of other processes")
        self.update()

    def close(self) -> None:
        self._bar.close()


def best(trials: list[FrozenTrial]) -> FrozenTrial | None:
    """The complete trial of the highest validation accuracy, the earliest of several."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return max(complete, key=lambda trial: (trial.value, -trial.number), default=None)


def _line(trial: FrozenTrial, so_far: FrozenTrial | None) -> str:
    reached = f"{last_accuracy(trial):7.2%}" if last_accuracy(trial) is not None else f"{'-':>7}"
    highest = f"best {so_far.value:7.2%} (trial {so_far.number})" if so_far else "no best yet"
    return (
        f"trial {trial.number:3d}  {outcome(trial):13} val {reached}  {highest}  "
        f"{trial.duration.total_seconds():6.1f} s  {as_flags(trial.user_attrs['fields'])}"
    )


def outcome(trial: FrozenTrial) -> str:
    """How a trial ended, in words."""
    return trial.user_attrs.get("outcome", "pruned" if trial.state == TrialState.PRUNED else trial.state.name.lower())


def last_accuracy(trial: FrozenTrial) -> float | None:
    """The validation accuracy of the epoch that was kept, or of the last one before a trial was cut short."""
    if trial.state == TrialState.COMPLETE:
        return trial.value
    return trial.intermediate_values[max(trial.intermediate_values)] if trial.intermediate_values else None


def write(folder: Path, study: optuna.Study, space: Space, dataset: Dataset) -> FrozenTrial | None:
    """best.json, trials.csv, history.png and importance.png, each as far as there are trials for it, and a summary on
    the terminal. Returns the best trial, None where none is complete."""
    trials = study.get_trials(deepcopy=False)
    done, top = finished(study), best(trials)
    title = f"{space.base.model} on {dataset.name}"
    replace_text(folder / "trials.csv", _table(trials))
    if done:
        points = [(t.number, last_accuracy(t), t.state == TrialState.COMPLETE) for t in done]
        plots.search_history(folder / "history.png", [p for p in points if p[1] is not None], f"search of {title}")
    complete = [trial for trial in done if trial.state == TrialState.COMPLETE]
    if len(complete) >= ENOUGH and len(space.ranges) > 1:
        plots.importance(
            folder / "importance.png", importances(study, len(complete)),
            f"what decided the accuracy: {title}, {len(complete)} complete trials",
        )  # fmt: skip
    if top:
        about = {"trial": top.number, "val_accuracy": top.value, "data": dataset.name, "data_sha256": dataset.checksum}
        text = json.dumps({"config": recipe(space, top.user_attrs["fields"]), **about}, indent=2)
        replace_text(folder / "best.json", text + "\n")
    _print_summary(done, top, space, folder)
    return top


def recipe(space: Space, fields: dict) -> dict:
    """What `--config` needs to train the trial of these fields again: they, what they belong with, and what flags
    decided; without what nothing would read, and without the backend, so that m1 and m2 can share it."""
    config = space.config(fields)
    unread = {
        "momentum": config.optimizer != "sgd",
        "decay": config.schedule != "linear",
        "gamma": config.schedule != "exponential",
        "decoupled": not config.l2,
    }
    names = [*RECIPE, *sorted(space.fixed - WHERE - {"backend", *RECIPE})]
    return {name: getattr(config, name) for name in names if not unread.get(name)}


def importances(study: optuna.Study, complete: int) -> dict[str, float]:
    """By parameter its share in what sets the best trials apart, by PED-ANOVA (Watanabe et al., IJCAI 2023)."""
    share = min(0.5, max(0.1, ENOUGH / complete))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=share)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # all alike, where the accuracies are
        return optuna.importance.get_param_importances(study, evaluator=evaluator)


def _table(trials: list[FrozenTrial]) -> str:
    names = list(dict.fromkeys(name for trial in trials for name in trial.user_attrs.get("fields", ())))
    parameters = list(dict.fromkeys(name for trial in trials for name in trial.params if name not in names))
    file = io.StringIO(newline="")
    rows = csv.writer(file)
    rows.writerow([*COLUMNS, *names, *parameters])
    for trial in trials:
        fields = trial.user_attrs.get("fields", {})
        seconds = round(trial.duration.total_seconds(), 3) if trial.duration else None
        kept, epochs = trial.user_attrs.get("kept_epoch"), max(trial.intermediate_values, default=0)
        rows.writerow(
            [trial.number, trial.state.name.lower(), outcome(trial), last_accuracy(trial), kept, epochs, seconds]
            + [",".join(map(str, v)) if isinstance(v, list) else v for v in map(fields.get, names)]
            + [trial.params.get(name) for name in parameters]
        )
    return file.getvalue()


def _print_summary(done: list[FrozenTrial], top: FrozenTrial | None, space: Space, folder: Path) -> None:
    counts = {}
    for trial in done:
        counts[outcome(trial)] = counts.get(outcome(trial), 0) + 1
    print(f"\n{len(done)} trials: " + (", ".join(f"{n} {name}" for name, n in counts.items()) or "none finished"))
    if top:
        config = folder / "best.json"
        print(f"best: trial {top.number}, validation accuracy {top.value:.2%} in epoch {top.user_attrs['kept_epoch']}")
        print(f"  {as_flags(top.user_attrs['fields'])}")
        fused = " --fused" if space.base.fused else ""
        print(f"results in {folder}; to train it: python train.py --model {space.base.model}{fused} --config {config}")
