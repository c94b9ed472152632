"""The pictures of a run. matplotlib draws without a display and is imported only here."""

from pathlib import Path

import numpy as np

from . import InputError, one_line
from .evaluate import Evaluation
from .files import replacing
from .progress import EpochRow


def new_figure(*args, **kwargs):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(*args, layout="constrained", **kwargs)
    FigureCanvasAgg(figure)
    return figure


def save(figure, path: Path) -> None:
    """Write a figure; InputError for a file that cannot be written or a format that matplotlib does not know."""
    if path.is_dir():
        raise InputError(f"{path} is a folder, expected the name of a picture; give one, such as picture.png")
    try:
        with replacing(path, durable=False) as file:
            figure.savefig(file, dpi=120, format=path.suffix[1:] or "png")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{path} cannot be written ({reason}); give another name, such as picture.png") from None


def training(path: Path, rows: list[EpochRow], best_epoch: int, title: str) -> None:
    """Loss and accuracy by epoch, training against validation, with the epoch whose parameters were kept."""
    figure = new_figure(figsize=(10, 4))
    figure.suptitle(title)
    epochs = [row.epoch for row in rows]
    panels = (("loss", "cross-entropy (nats)", 1.0), ("accuracy", "accuracy (%)", 100.0))
    for axes, (name, label, unit) in zip(figure.subplots(1, 2), panels):
        for part, text in (("train", "training (while learning)"), ("val", "validation")):
            values = [unit * getattr(row, f"{part}_{name}") for row in rows]
            axes.plot(epochs, values, marker=".", label=text)
        if best_epoch:
            axes.axvline(best_epoch, color="grey", linestyle=":", label=f"kept: epoch {best_epoch}")
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    save(figure, path)


def confusion(path: Path, matrix: np.ndarray, class_names: tuple[str, ...], title: str) -> None:
    """Where each class's images went: rows are labels and add up to 100 %."""
    from matplotlib.colors import PowerNorm

    share = 100.0 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    size = max(6.0, 0.22 * len(class_names) + 1.5)
    figure = new_figure(figsize=(size + 1.0, size))
    axes = figure.subplots()
    image = axes.imshow(share, norm=PowerNorm(0.4, vmin=0, vmax=100), cmap="magma_r")  # shows the rare errors too
    ticks = range(len(class_names))
    axes.set_xticks(ticks, class_names, fontsize=8)
    axes.set_yticks(ticks, class_names, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, label="% of the label's images", shrink=0.8)
    save(figure, path)


def noise(path: Path, by_sigma: dict[float, Evaluation], classes: int, title: str) -> None:
    """Accuracy and macro F1 by the standard deviation of Gaussian pixel noise, and what guessing would reach."""
    figure = new_figure(figsize=(6, 4))
    axes = figure.subplots()
    for name, label, style in (("accuracy", "accuracy", "o-"), ("macro_f1", "macro F1", "s--")):
        values = [100.0 * getattr(evaluation, name) for evaluation in by_sigma.values()]
        axes.plot(list(by_sigma), values, style, markersize=5, label=label)
    axes.axhline(100.0 / classes, color="grey", linestyle=":", label="guessing a class")
    axes.set_xlabel("noise standard deviation (pixels in [0, 1])")
    axes.set_ylabel("of the test images (%)")
    axes.set_ylim(0, 100)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def search_history(path: Path, points: list[tuple[int, float, bool]], title: str) -> None:
    """Validation accuracy by trial: (number, accuracy, whether it is complete), and the best complete one so far."""
    figure = new_figure(figsize=(8, 4.5))
    axes = figure.subplots()
    kinds = ((True, "o", "C0", "complete"), (False, "x", "grey", "cut short: last epoch"))
    for complete, marker, color, label in kinds:
        chosen = [(number, 100.0 * accuracy) for number, accuracy, whether in points if whether == complete]
        if chosen:
            axes.scatter(*zip(*chosen), marker=marker, color=color, label=label, zorder=3)
    complete = [(number, 100.0 * accuracy) for number, accuracy, whether in points if whether]
    if complete:
        numbers, accuracies = zip(*complete)
        axes.step(numbers, np.maximum.accumulate(accuracies), where="post", color="C1", label="best so far")
    axes.set_xlabel("trial")
    axes.set_ylabel("validation accuracy (%)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    if points:
        axes.legend()
    save(figure, path)


def importance(path: Path, shares: dict[str, float], title: str) -> None:
    """A bar for each parameter's share, the largest on top."""
    names = sorted(shares, key=shares.get)
    figure = new_figure(figsize=(8, 1.2 + 0.4 * len(names)))
    axes = figure.subplots()
    bars = axes.barh(names, [100.0 * shares[name] for name in names])
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.margins(x=0.1)
    axes.set_xlabel("importance (% of all, by PED-ANOVA)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, axis="x")
    save(figure, path)
