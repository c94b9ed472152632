"""python -m mlp predict: which characters are on pictures, by the model of a checkpoint."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import InputError, checkpoint, framing, inference, ink, pictures, printable
from .plots import new_figure, save

TOP = 3


@dataclass
class Reading:
    """What became of one file: an error, or the picture, what the network saw of it, and what it made of that."""

    file: str
    error: str = ""
    picture: np.ndarray | None = None  # float32 (H, W, 3) in [0, 1]
    image: np.ndarray | None = None  # uint8 (28, 28), white ink on black
    top: tuple[tuple[str, float], ...] = ()  # names and probabilities of the TOP most probable classes, best first


def run(args) -> int:
    """Print an answer for each picture; 2 where a picture could not be read, else 0. InputError for a checkpoint that
    cannot be used."""
    model = checkpoint.read(args.checkpoint)
    inference.check(model, args.checkpoint)
    kind = args.frame or framing.choose(model.data_name or Path(model.config.data).name, model.class_names)
    readings = [see(path, kind) for path in args.pictures]
    answer(readings, model)
    if args.json:
        print(json.dumps([_record(reading) for reading in readings], indent=2, ensure_ascii=False))
    else:
        _print(readings)
    for reading in readings:
        if reading.error:
            print(f"error: {reading.error}", file=sys.stderr)
    if args.show and any(not reading.error for reading in readings):
        show(args.show, readings, f"{model.config.model} on {model.data_name or model.config.data}, {kind} frame")
    return 2 if any(reading.error for reading in readings) else 0


def see(path: Path, kind: str) -> Reading:
    """The picture in `path` and the image in the frame `kind` (see framing.FRAMES) that is made of it, or an error."""
    reading = Reading(str(path))
    try:
        reading.picture = pictures.read(path)
        reading.image = framing.frame(ink.scan(reading.picture, path), kind)
    except InputError as error:
        reading.error = str(error)
    return reading


def answer(readings: list[Reading], model: checkpoint.Checkpoint) -> None:
    """Set `top` of all readings that have an image."""
    seen = [reading for reading in readings if not reading.error]
    if not seen:
        return
    images = np.stack([reading.image.ravel() for reading in seen])
    for reading, shares in zip(seen, inference.probabilities(model.arrays, model.config, images)):
        best = np.argsort(-shares, kind="stable")[:TOP]
        reading.top = tuple((model.class_names[i], float(shares[i])) for i in best)


def _record(reading: Reading) -> dict:
    if reading.error:
        return {"file": reading.file, "error": reading.error}
    top = [{"class": name, "probability": probability} for name, probability in reading.top]
    return {"file": reading.file, "top": top}


def _print(readings: list[Reading]) -> None:
    width = max(len(reading.file) for reading in readings)
    for reading in readings:
        if not reading.error:
            print(f"{reading.file:{width}}" + "".join(f"  {name} {share:7.2%}" for name, share in reading.top))


def show(path: Path, readings: list[Reading], title: str) -> None:
    """Draw each picture, what the network saw of it and its probabilities; files with errors are left out."""
    seen = [reading for reading in readings if not reading.error]
    across = min(3, 1 + len(seen) // 5)  # readings side by side
    down = -(-len(seen) // across)
    figure = new_figure(figsize=(5.2 * across, 1.7 * down + 0.5))
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(down, 3 * across, squeeze=False, width_ratios=[1, 1, 1.3] * across)
    for axes in grid.flat:
        axes.set_axis_off()
    for i, reading in enumerate(seen):
        left, middle, right = grid[i // across, 3 * (i % across) : 3 * (i % across) + 3]
        left.imshow(reading.picture, interpolation="antialiased")
        left.set_title(printable(Path(reading.file).name)[-24:], fontsize=8)
        middle.imshow(reading.image, cmap="gray", vmin=0, vmax=255)
        middle.set_title("as the network sees it", fontsize=8)
        _bars(right, reading.top)
    save(figure, path)


def _bars(axes, top) -> None:
    """Horizontal bars of probabilities, the best one on top."""
    axes.set_axis_on()
    names, shares = zip(*top)
    rows = range(len(top))
    bars = axes.barh(rows, [100 * share for share in shares], color=["C0", *["0.75"] * (len(top) - 1)])
    axes.bar_label(bars, [f"{share:.1%}" for share in shares], padding=3, fontsize=8)
    axes.set_yticks(rows, names, fontsize=12)
    axes.set_xticks([])
    axes.set_xlim(0, 150)  # the label of a bar of 100 %
    axes.invert_yaxis()
    axes.spines[["top", "right", "bottom"]].set_visible(False)
