"""What a study has found: report.md with its tables and plots, and results.json with the numbers of every run."""

import json
import time
from pathlib import Path

import numpy as np

from . import compare
from .evaluate import NOISE_SIGMA
from .plots import new_figure, save
from .results import Run, read, spread

BASE = "none"  # the refinement that is none


def write(folder: Path, parts) -> None:
    """parts: study.Part of each data set; all their runs are finished."""
    models = [_read(part.models) for part in parts]
    refined = [_read(part.refinements) for part in parts]
    runs = [one for of in models for same in of.values() for one in same]
    pictures = [f"![{path.stem}]({path.name})" for path in compare.plot(runs, folder)]
    gains = {_data(of): {name: _gain(same, of[BASE]) for name, same in of.items()} for of in refined}
    text = [
        "# Study of the models",
        _origin(runs),
        "Mean ± standard deviation over the seeds. Seconds per epoch are those of training, without validation. "
        "`fused` means our kernels, in a model from scratch as in one of torch.",
        compare.tables(runs).rstrip(),
        *pictures,
        "## Robust against plain",
        "Test accuracy of `robust` minus that of `m3`, in points, by the standard deviation of the noise; the "
        "difference of runs of the same seed.",
        _robustness(models),
        "## What each refinement is worth",
        "Each alone, added to `m1` with the fused kernels: the change of validation accuracy in points, seed by seed, "
        "and what the test images then give. It helps where the change is above 0 on every data set.",
        _refinements(refined, gains),
        "![What each refinement is worth](refinements.png)",
    ]
    save(_plot(gains), folder / "refinements.png")
    (folder / "report.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    numbers = [_numbers(name, one) for of in (*models, *refined) for name, same in of.items() for one in same]
    (folder / "results.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def _read(jobs) -> dict[str, list[Run]]:
    """The runs by the names of their rows, in the order of their seeds."""
    rows = {}
    for job, one in zip(jobs, read([job.folder for job in jobs]), strict=True):
        rows.setdefault(job.name, []).append(one)
    return rows


def _data(rows: dict[str, list[Run]]) -> str:
    return next(iter(rows.values()))[0].metrics["data"]


def _origin(runs: list[Run]) -> str:
    devices = sorted({one.metrics["device"] for one in runs})
    versions = {name: number for one in runs for name, number in one.config["versions"].items()}
    with_numbers = ", ".join(f"{name} {number}" for name, number in versions.items())
    seeds = sorted({one.config["seed"] for one in runs})
    return f"{', '.join(devices)}; {with_numbers}; {time.strftime('%Y-%m-%d')}; seeds {', '.join(map(str, seeds))}."


def _points(values) -> str:
    """A difference of fractions in percentage points, with its sign."""
    middle, deviation = spread([100.0 * value for value in values])
    return f"{middle:+.2f}" + (f" ± {deviation:.2f}" if len(values) > 1 else "")


def _robustness(models) -> str:
    body = []
    for rows in models:
        pairs = list(zip(rows["robust fused"], rows["m3"], strict=True))
        noises = [[one.metrics["noise"] for one in pair] for pair in pairs]
        cells = [
            _points([a[str(sigma)]["accuracy"] - b[str(sigma)]["accuracy"] for a, b in noises]) for sigma in NOISE_SIGMA
        ]
        body.append([_data(rows), *cells])
    return compare.markdown(["data", *map(str, NOISE_SIGMA)], body, left=1)


def _gain(same: list[Run], base: list[Run]) -> list[float]:
    """Change of validation accuracy, seed by seed."""
    return [one.metrics["val"]["accuracy"] - b.metrics["val"]["accuracy"] for one, b in zip(same, base, strict=True)]


def _refinements(refined, gains) -> str:
    names = [_data(rows) for rows in refined]
    header = ["refinement", *(f"{name}: {what}" for name in names for what in (
        "val accuracy", "test accuracy %", "test macro F1 %", "test cross-entropy")), "helps"]  # fmt: skip
    body = []
    for refinement in refined[0]:
        line = [refinement]
        for name, rows in zip(names, refined):
            line.append("" if refinement == BASE else _points(gains[name][refinement]))
            for score, unit, form in (("accuracy", 100, ".2f"), ("macro_f1", 100, ".2f"), ("cross_entropy", 1, ".4f")):
                middle, deviation = spread([unit * one.metrics["test"][score] for one in rows[refinement]])
                line.append(f"{middle:{form}} ± {deviation:{form}}")
        helps = all(np.mean(gains[name][refinement]) > 0 for name in names)
        body.append([*line, "" if refinement == BASE else "yes" if helps else "no"])
    return compare.markdown(header, body, left=1)


def _plot(gains):
    names = [name for name in next(iter(gains.values())) if name != BASE]
    figure = new_figure(figsize=(9, 0.5 * len(names) + 1.6))
    axes = figure.subplots()
    height = 0.8 / len(gains)
    for k, (data, of) in enumerate(gains.items()):
        pairs = [spread([100.0 * value for value in of[name]]) for name in names]
        places = np.arange(len(names)) + height * (k - (len(gains) - 1) / 2)
        axes.barh(places, [m for m, _ in pairs], height, xerr=[d for _, d in pairs], capsize=3, label=data)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_xlabel("change of m1's validation accuracy (points); lines: ± standard deviation over the seeds")
    axes.grid(alpha=0.3, axis="x")
    axes.legend()
    return figure


def _numbers(name: str, one: Run) -> dict:
    kept = ("model", "backend", "fused", "data", "device", "outcome", "epochs", "best_epoch", "parameters",
            "seconds_per_epoch", "seconds", "val", "test", "noise")  # fmt: skip
    return {"row": name, "seed": one.config["seed"], **{key: one.metrics[key] for key in kept}}
