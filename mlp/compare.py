"""python -m mlp compare: finished runs side by side, and beside the results that were published for the same models."""

from pathlib import Path

import numpy as np

from .files import file_name, make_folder
from .plots import new_figure, save
from .results import Row, Run, Section, read, sections, spread

SCORES = {"accuracy": "accuracy", "macro_f1": "macro F1"}
NONE = "–"


def run(args) -> int:
    """Print the tables and write compare.md and the plots; InputError for a folder that is not a finished run."""
    runs = read(args.runs)
    text = tables(runs)
    folder = make_folder(args.out)
    (folder / "compare.md").write_text(text, encoding="utf-8")
    written = plot(runs, folder)
    print(text)
    print(f"written: {folder / 'compare.md'}, {', '.join(map(str, written))}")
    return 0


def tables(runs: list[Run]) -> str:
    """Markdown: for each data set a table of results and, for each score, one of what is left of it under noise."""
    parts = []
    for section in sections(runs):
        parts += [f"## {section.data}", _results(section.rows)]
        for score, name in SCORES.items():
            if rows := [row for row in section.rows if row.noise(score)]:
                parts.append(f"Test {name} (%) by the standard deviation of Gaussian noise on pixels in [0, 1]:")
                parts.append(_noise(rows, score))
    return "\n\n".join(parts) + "\n"


def _results(rows: list[Row]) -> str:
    header = ["model", "kernels", "backend", "device", "parameters", "epochs", "s/epoch", "val accuracy %",
              "test accuracy %", "test macro F1 %", "test cross-entropy"]  # fmt: skip
    body = [
        [
            *(text or NONE for text in (row.name, row.kernels, row.backend, row.device)),
            _cell(row.values("parameters"), ",.0f"),
            _cell(row.values("epochs"), ".4g"),
            _cell(row.values("seconds_per_epoch"), ".3g"),
            _cell(row.values("val", "accuracy"), ".2f", 100),
            _cell(row.values("test", "accuracy"), ".2f", 100),
            _cell(row.values("test", "macro_f1"), ".2f", 100),
            _cell(row.values("test", "cross_entropy"), ".4f"),
        ]
        for row in rows
    ]  # fmt: skip
    return markdown(header, body, left=4)


def _noise(rows: list[Row], score: str) -> str:
    sigmas = sorted({sigma for row in rows for sigma in row.noise(score)})
    body = [
        [row.name, row.kernels or NONE, row.backend or NONE]
        + [_cell(row.values("noise", str(sigma), score), ".2f", 100) for sigma in sigmas]
        for row in rows
    ]
    return markdown(["model", "kernels", "backend", *map(str, sigmas)], body, left=3)


def _cell(values: list[float], form: str, unit: float = 1) -> str:
    """The mean, and the standard deviation where there are several values that differ."""
    if not values:
        return NONE
    middle, deviation = spread(values)
    return f"{unit * middle:{form}}" + (f" ± {unit * deviation:{form}}" if deviation else "")


def markdown(header: list[str], body: list[list[str]], left: int) -> str:
    """A table that is aligned as plain text, too; the first `left` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *body)]
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [
        [f"{cell:{'<' if i < left else '>'}{width}}" for i, (cell, width) in enumerate(zip(line, widths))]
        for line in (header, rule, *body)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(runs: list[Run], folder: Path) -> list[Path]:
    """Write noise.png and curves.png into `folder`, or a pair for each data set where there are several."""
    written, found = [], sections(runs)
    for section in found:
        suffix = "" if len(found) == 1 else "-" + file_name(section.data)
        for name, draw in (("noise", _plot_noise), ("curves", _plot_curves)):
            written.append(folder / f"{name}{suffix}.png")
            save(draw(section), written[-1])
    return written


def _lines(rows: list[Row]):
    """Each row with the label and the style of its line; what was published in the colour of the row before, dashed."""
    colour = -1
    for row in rows:
        colour += not row.published
        yield row, row.name if row.published else f"{row.name} {row.backend} {row.kernels}", {
            "color": f"C{colour % 10}", "linestyle": "--" if row.published else "-" if colour < 10 else "-.",
        }  # fmt: skip


def _plot_noise(section: Section):
    figure = new_figure(figsize=(10, 4.6))
    figure.suptitle(f"{section.data}: test images under Gaussian noise{_band(section)}", fontsize=11)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (score, label) in zip(panels, SCORES.items()):
        for row, name, style in _lines(section.rows):
            by_sigma = row.noise(score)
            means, deviations = (np.array([100 * pair[i] for pair in by_sigma.values()]) for i in (0, 1))
            axes.plot(list(by_sigma), means, marker="o", markersize=4, label=name, **style)
            axes.fill_between(list(by_sigma), means - deviations, means + deviations, color=style["color"], alpha=0.2)
        axes.set_xlabel("noise standard deviation (pixels in [0, 1])")
        axes.set_ylabel(f"{label} (%)")
        axes.set_ylim(0, 100)
        axes.grid(alpha=0.3)
    panels[0].axhline(100 / section.classes, color="grey", linestyle=":", label="guessing a class")
    _legend(figure, panels[0])
    return figure


def _band(section: Section) -> str:
    return "; bands: ± standard deviation" if any(len(row.results) > 1 for row in section.rows) else ""


def _plot_curves(section: Section):
    figure = new_figure(figsize=(10, 4.6))
    figure.suptitle(f"{section.data}: validation by epoch; a dot is the epoch that was kept", fontsize=11)
    panels = figure.subplots(1, 2)
    for axes, (column, label, unit) in zip(
        panels, (("val_loss", "cross-entropy (nats)", 1), ("val_accuracy", "accuracy (%)", 100))
    ):
        for row, name, style in _lines(section.rows):
            for result, history in zip(row.results, row.histories):
                epochs, values = [epoch["epoch"] for epoch in history], [unit * epoch[column] for epoch in history]
                kept = [i for i, epoch in enumerate(epochs) if epoch == result.get("best_epoch")]
                axes.plot(epochs, values, marker="o", markevery=kept, label=name, **style)
                name = None  # a line for each seed, one label for all
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    _legend(figure, panels[0])
    return figure


def _legend(figure, axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, max(1, len(labels))), fontsize=8)
