"""Finished runs, read from their folders and put in order: by data set, by model, seeds of one experiment together."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from . import InputError, one_line

PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
# What of config.json does not make a run another experiment: the seed, and how the same data, the same results and the
# versions came about.
IGNORED = {"seed", "data", "data_name", "class_names", "plan", "threads", "command", "versions", "revision",
           "processes", "resumed"}  # fmt: skip
# What tables and plots rely on.
CONFIG = {"data_sha256": str, "class_names": list, "model": str, "fused": bool, "seed": int, "backend": str,
          "versions": dict}  # fmt: skip
METRICS = {"data": str, "device": str, "test": dict, "noise": dict}
OPTIONAL = {"seed", "backend", "versions"}  # of older runs, too
SHOWN = {"model", "fused", "backend", "device_name"}  # by columns of their own


@dataclass(frozen=True)
class Run:
    """A finished run: the contents of its config.json, metrics.json and history.csv."""

    folder: Path
    config: dict
    metrics: dict
    history: list[dict[str, float]]  # a row per epoch, by the names of progress.EpochRow

    @property
    def experiment(self) -> str:
        """Equal for runs that differ in nothing but the seed."""
        settings = {name: value for name, value in self.config.items() if name not in IGNORED}
        return json.dumps(settings, sort_keys=True)

    @property
    def backend(self) -> str:
        """Whose arrays: the config's backend, or the library of arrays whose version it notes."""
        libraries = [name for name in self.config.get("versions", {}) if name != "python"]
        return self.config.get("backend") or next(iter(libraries), "")


@dataclass(frozen=True)
class Row:
    """A row of a table and a line of a plot: the runs of one experiment, or one published result."""

    name: str
    kernels: str
    backend: str
    device: str
    results: list[dict]  # as metrics.json
    histories: list[list[dict]]
    published: bool = False

    def values(self, *path) -> list[float]:
        """The numbers at metrics[path[0]][path[1]]... of all runs; none of a run where that was not measured."""
        found = []
        for value in self.results:
            for name in path:
                value = value.get(name) if isinstance(value, dict) else None
            if isinstance(value, (int, float)):
                found.append(value)
        return found

    def noise(self, score: str) -> dict[float, tuple[float, float]]:
        """Mean and standard deviation over the runs of a score, "accuracy" or "macro_f1", by the noise's sigma."""
        sigmas = sorted({sigma for result in self.results for sigma in result.get("noise", {})}, key=float)
        measured = {sigma: self.values("noise", sigma, score) for sigma in sigmas}
        return {float(sigma): spread(values) for sigma, values in measured.items() if values}


@dataclass(frozen=True)
class Section:
    """What can be compared: rows of one data set."""

    data: str
    classes: int
    rows: list[Row]


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation (of a sample; 0 of a single value)."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def read(folders: list[Path]) -> list[Run]:
    """The runs in these folders, one that is given twice only once; InputError for a folder that holds no whole run."""
    return [_read(folder) for folder in {Path(folder).resolve(): Path(folder) for folder in folders}.values()]


def _read(folder: Path) -> Run:
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no run, expected a config.json; give a folder that train.py wrote")
    try:
        config, metrics = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "metrics"))
        with open(folder / "history.csv", newline="") as file:
            history = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
        for contents, kinds in ((config, CONFIG), (metrics, METRICS)):
            for name, kind in kinds.items():
                if name not in contents and name not in OPTIONAL:
                    raise ValueError(f"{name} is missing")
                if name in contents and not isinstance(contents[name], kind):
                    raise ValueError(f"{name} is no {kind.__name__}")
        if not config["class_names"]:
            raise ValueError("class_names is empty")
        for name in ("epoch", "val_loss", "val_accuracy"):
            if not all(name in row for row in history):
                raise ValueError(f"history.csv has no {name}")
        for sigma in metrics["noise"]:
            float(sigma)
        metrics["noise"] = {sigma: _scores(value) for sigma, value in metrics["noise"].items()}
        return Run(folder, config, metrics, history)
    except FileNotFoundError as error:
        name = Path(error.filename).name
        raise InputError(f"{folder} is not a finished run: it has no {name}; let it end, or leave it out") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = one_line(error)
        raise InputError(f"{folder} is damaged or not a run of this program ({reason}); leave it out") from None


def _scores(value) -> dict:
    """Of runs from when noise was judged by accuracy alone, that."""
    return value if isinstance(value, dict) else {"accuracy": float(value)}


def sections(runs: list[Run]) -> list[Section]:
    """The runs by data set; in each by model, followed by what was published for that model on that data set."""
    by_data = {}
    for one in runs:
        by_data.setdefault((one.metrics["data"], one.config["data_sha256"]), []).append(one)
    names = [name for name, _ in by_data]
    return [
        Section(
            name if names.count(name) == 1 else f"{name} ({sha256[:8]})",
            len(those[0].config["class_names"]),
            [row for of_model in _grouped(those, lambda one: one.config["model"]) for row in _rows(of_model, name)],
        )
        for (name, sha256), those in by_data.items()
    ]


def _grouped(runs: list[Run], key) -> list[list[Run]]:
    groups = {}
    for one in sorted(runs, key=lambda one: one.config["model"]):
        groups.setdefault(key(one), []).append(one)
    return list(groups.values())


def _count(same: list[Run]) -> str:
    """How many runs, and of how many seeds where some have the same: those do not vary as the others do."""
    seeds = len({one.config.get("seed") for one in same})
    return "" if len(same) == 1 else f" (n={len(same)})" if seeds == len(same) else f" (n={len(same)}, {seeds} seeds)"


def _rows(runs: list[Run], data_name: str) -> list[Row]:
    """The rows of one model."""
    model, experiments = runs[0].config["model"], _grouped(runs, lambda one: one.experiment)
    settings = [json.loads(same[0].experiment) for same in experiments]
    differing = [name for name in settings[0] if any(other.get(name) != settings[0][name] for other in settings)]
    rows = []
    for same, setting in zip(experiments, settings):
        name = ", ".join([model, *(f"{key} {setting.get(key)}" for key in differing if key not in SHOWN)])
        name += _count(same)
        kernels = "fused" if setting["fused"] else "plain"
        results, histories = [one.metrics for one in same], [one.history for one in same]
        rows.append(Row(name, kernels, same[0].backend, same[0].metrics["device"], results, histories))
    if data_name == PUBLISHED["data"] and model in PUBLISHED["models"]:
        result = PUBLISHED["models"][model]
        rows.append(Row(f"{model}, published", "", "cupy", PUBLISHED["device"], [result], [], published=True))
    return rows
