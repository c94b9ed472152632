"""python -m mlp explore: what a data set consists of, in numbers and pictures."""

import json
from pathlib import Path

import numpy as np

from . import data
from .files import file_name, make_folder
from .plots import new_figure, save

PARTS = ("train", "val", "test")


def run(args) -> int:
    """Load, describe, print, write explore.json and the pictures; InputError as data.load()."""
    dataset = data.load(args.data)
    split = data.stratified_split(dataset.labels)
    folder = make_folder(args.out or Path("runs") / f"explore-{file_name(dataset.name)}")
    about = describe(dataset, split)
    (folder / "explore.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    balance(folder / "balance.png", about)
    samples, means = examples(dataset)
    for name, images, text in (("samples", samples, "a random image"), ("means", means, "the mean image")):
        grid(folder / f"{name}.png", images, dataset.class_names, f"{dataset.name}: {text} of each class")
    pixels(folder / "pixels.png", about)
    if dataset.notice:
        print(f"*** {dataset.notice} ***\n")
    print(summary(about) + f"\nresults in {folder}")
    return 0


def describe(dataset: data.Dataset, split: data.Split) -> dict:
    """The contents of explore.json. Pixels in [0, 1]; `histogram` counts the values 0 to 255."""
    classes = len(dataset.class_names)
    counts = {part: np.bincount(dataset.labels[getattr(split, part)], minlength=classes) for part in PARTS}
    total = sum(counts.values())
    return {
        "data": dataset.name,
        "sha256": dataset.checksum,
        "images": len(dataset.labels),
        "split": {part: int(count.sum()) for part, count in counts.items()},
        "largest_over_smallest": float(total.max() / total.min()),
        "classes": [
            {"name": name, "images": int(total[c])} | {part: int(counts[part][c]) for part in PARTS}
            for c, name in enumerate(dataset.class_names)
        ],
        "pixels": pixel_statistics(dataset.images),
    }


def pixel_statistics(images: np.ndarray) -> dict:
    """Of uint8 images of any shape: mean and standard deviation in [0, 1], share of zeros, histogram of 256 values."""
    histogram = np.zeros(256, np.int64)
    for part in np.array_split(images, -(-len(images) // 10_000)):  # bincount makes int64 of them
        histogram += np.bincount(part.ravel(), minlength=256)
    values, share = np.arange(256) / 255, histogram / histogram.sum()
    mean = float(share @ values)
    return {
        "mean": mean,
        "std": float(np.sqrt(share @ (values - mean) ** 2)),
        "zero_share": float(share[0]),
        "histogram": histogram.tolist(),
    }


def examples(dataset: data.Dataset, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A random image, uint8 (classes, 28, 28), and the mean image, float64 of the same shape, of each class."""
    rng = np.random.default_rng(seed)
    classes = [np.flatnonzero(dataset.labels == c) for c in range(len(dataset.class_names))]
    samples = dataset.images[[rng.choice(members) for members in classes]]
    means = np.stack([dataset.images[members].mean(axis=0) for members in classes])
    return samples.reshape(-1, data.SIDE, data.SIDE), means.reshape(-1, data.SIDE, data.SIDE)


def summary(about: dict) -> str:
    """A few lines: sizes, the classes' sizes side by side, pixels."""
    names, parts = [row["name"] for row in about["classes"]], about["split"]
    by_size = sorted(about["classes"], key=lambda row: row["images"])
    lines = [
        f"{about['data']}: {about['images']:,} images of {len(names)} classes, sha256 {about['sha256'][:12]}",
        f"split: {parts['train']:,} to train, {parts['val']:,} to validate, {parts['test']:,} to test",
        f"classes: from {by_size[0]['images']:,} ({by_size[0]['name']}) to {by_size[-1]['images']:,} "
        f"({by_size[-1]['name']}) images, 1 to {about['largest_over_smallest']:.3g}",
        "pixels in [0, 1]: mean {mean:.4f}, std {std:.4f}, {zero_share:.1%} are 0".format(**about["pixels"]),
        "",
    ]
    across = -(-len(names) // 16)
    down = -(-len(names) // across)
    header = f"{'class':>6}{'train':>9}{'val':>8}{'test':>8}"
    lines.append("    ".join([header] * across))
    for first in range(down):
        rows = about["classes"][first::down]
        lines.append("    ".join(f"{r['name']:>6}{r['train']:9,}{r['val']:8,}{r['test']:8,}" for r in rows))
    return "\n".join(lines)


def balance(path: Path, about: dict) -> None:
    """Images per class and part, in the order of the labels."""
    names = [row["name"] for row in about["classes"]]
    figure = new_figure(figsize=(max(6.0, 0.22 * len(names) + 2), 4))
    axes, bottom = figure.subplots(), np.zeros(len(names))
    for part, label in zip(PARTS, ("training", "validation", "test")):
        counts = np.array([row[part] for row in about["classes"]])
        axes.bar(range(len(names)), counts, bottom=bottom, label=label)
        bottom += counts
    axes.axhline(bottom.mean(), color="grey", linestyle=":", label="mean of the classes")
    axes.set_xticks(range(len(names)), names, fontsize=9)
    axes.set_xlim(-0.7, len(names) - 0.3)
    axes.set_ylim(0, 1.15 * bottom.max())
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("class")
    axes.set_ylabel("images")
    axes.set_title(f"{about['data']}: largest class / smallest = {about['largest_over_smallest']:.3g}", fontsize=10)
    axes.legend(ncols=4, fontsize=8)
    save(figure, path)


def grid(path: Path, images: np.ndarray, names: tuple[str, ...], title: str) -> None:
    """Images (N, 28, 28) from 0, black, to the largest of all values, white, each under its name."""
    across = min(len(images), max(5, round((2 * len(images)) ** 0.5)))
    down = -(-len(images) // across)
    figure = new_figure(figsize=(0.85 * across + 0.3, 1.05 * down + 0.5))
    figure.suptitle(title, fontsize=10)
    for axes in (all_axes := figure.subplots(down, across, squeeze=False).ravel()):
        axes.set_axis_off()
    for axes, image, name in zip(all_axes, images, names):
        axes.imshow(image, cmap="gray", vmin=0, vmax=images.max())
        axes.set_title(name, fontsize=10, pad=2)
    save(figure, path)


def pixels(path: Path, about: dict) -> None:
    """The histogram of all pixels; on a logarithmic axis, because nearly all of them are paper."""
    statistics = about["pixels"]
    figure = new_figure(figsize=(6, 4))
    axes = figure.subplots()
    share = 100 * np.array(statistics["histogram"]) / sum(statistics["histogram"])
    axes.bar(np.arange(256) / 255, share, width=1 / 255)
    axes.axvline(statistics["mean"], color="C3", label=f"mean {statistics['mean']:.3f}")
    low, high = (statistics["mean"] + sign * statistics["std"] for sign in (-1, 1))
    axes.axvspan(max(low, 0), high, color="C3", alpha=0.12, label=f"± standard deviation {statistics['std']:.3f}")
    axes.set_yscale("log")
    axes.set_xlim(-0.01, 1.01)
    axes.set_xlabel("pixel, 0 paper to 1 ink")
    axes.set_ylabel("% of all pixels")
    axes.set_title(f"{about['data']}: {statistics['zero_share']:.1%} of the pixels are 0", fontsize=10)
    axes.legend()
    save(figure, path)
