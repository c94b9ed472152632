"""Data sets: every source checked and brought to one form, and the split that all models share."""

from __future__ import annotations

import hashlib
import re
import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlp import InputError, emnist, glyphs, printable
from mlp.data_files import IMAGES, LABELS, PIXELS, SIDE, read_idx, read_npy

DEFAULT_GLYPHS = 100_000
LARGEST_LABEL = 999

BYMERGE_CLASSES = tuple(glyphs.CLASSES)
# EMNIST splits whose classes are known; any other data set names its classes 0, 1, 2, ...
EMNIST_CLASSES = {
    "emnist-bymerge": BYMERGE_CLASSES,
    "emnist-balanced": BYMERGE_CLASSES,
    "emnist-byclass": tuple(string.digits + string.ascii_letters.swapcase()),
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """A checked data set: every class from 0 to K-1 has at least one image."""

    name: str  # "emnist-bymerge", "glyphs-100000", or the folder's name
    images: np.ndarray  # uint8 (M, 784), C-contiguous, upright characters, white ink (255) on black (0)
    labels: np.ndarray  # int32 (M,)
    class_names: tuple[str, ...]  # one string per class
    checksum: str  # sha256 hex over images and labels
    notice: str = ""  # one line the user must see (set when `auto` fell back to glyphs)


@dataclass(frozen=True, eq=False)
class Split:
    """Sorted int32 index arrays, disjoint, together covering every image."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def load(source: str = "auto", root: Path = Path("data")) -> Dataset:
    """Load a data set; `root` is where downloads and caches are kept.

    source   "emnist": EMNIST ByMerge from root/EMNIST/raw, downloaded if it is not there (the environment
             variables EMNIST_URL and EMNIST_MD5 name a mirror of the archive and its MD5);
             "glyphs" or "glyphs:N": the built-in set of N images (100,000 if not said);
             "auto": emnist if it is there or can be downloaded, else glyphs, with `notice` set;
             anything else: a folder with *-images-idx3-ubyte[.gz] and *-labels-idx1-ubyte[.gz] pairs, or with
             X_images.npy and y_images.npy (uint8 (N, 28, 28) or (N, 784), and integer (N,)).
    Raises InputError, naming the file, for anything missing, damaged or inconsistent.
    """
    try:
        return _load(str(source), Path(root))
    except MemoryError:
        raise InputError(f"the images of {source} do not fit into the memory; give a smaller data set") from None


def _load(source: str, root: Path) -> Dataset:
    if source == "emnist":
        return _load_emnist(root)
    if source == "auto":
        # Only an EMNIST that is absent is replaced: one that is there but damaged is an error.
        try:
            emnist.ensure(root)
        except InputError as error:
            notice = f"NOTICE: this is NOT EMNIST but the built-in glyph set, because {error}"
            return _load_glyphs(DEFAULT_GLYPHS, root, notice)
        return _load_emnist(root)
    if source == "glyphs" or source.startswith("glyphs:"):
        size = source.partition(":")[2] if ":" in source else str(DEFAULT_GLYPHS)
        if not re.fullmatch(r"[0-9]{1,12}", size):
            raise InputError(f"{source} does not say how many glyphs, expected a number; use glyphs:100000")
        return _load_glyphs(int(size), root)
    return _load_folder(Path(source).expanduser())


def stratified_split(labels: np.ndarray, seed: int = 2024, fractions=(0.70, 0.10, 0.20)) -> Split:
    """Split integer labels (M,) class by class into train, val and test shares; at least one image in each.

    The same labels and seed give the same split.  Raises InputError for a class of fewer than three images.
    """
    if len(fractions) != 3 or not min(fractions) > 0 or not abs(sum(fractions) - 1) < 1e-6:
        raise InputError(f"split fractions {fractions}, expected three positive numbers; make them sum to 1")
    rng = np.random.default_rng(seed)
    parts = ([], [], [])
    by_class = np.argsort(labels, kind="stable")
    classes, counts = np.unique(labels, return_counts=True)
    for label, members in zip(classes, np.split(by_class, np.cumsum(counts)[:-1])):
        count = len(members)
        if count < 3:
            raise InputError(
                f"class {label} has {count} image(s), expected at least 3 (for train, validation and test); "
                "add images or leave the class out"
            )
        val = min(max(round(fractions[1] * count), 1), count - 2)
        test = min(max(round(fractions[2] * count), 1), count - val - 1)
        shuffled = rng.permutation(members)
        for part, chosen in zip(parts, np.split(shuffled, [count - val - test, count - test])):
            part.append(chosen)
    return Split(*(np.sort(np.concatenate(part)).astype(np.int32) for part in parts))


def _load_emnist(root: Path) -> Dataset:
    return _from_idx("emnist-bymerge", emnist.ensure(root))


def _load_glyphs(n: int, root: Path, notice: str = "") -> Dataset:
    images, labels = glyphs.load(n, root)
    return _finish(f"glyphs-{n}", "the glyph set", images, labels, BYMERGE_CLASSES, notice)


def _load_folder(folder: Path) -> Dataset:
    try:
        files = sorted(folder.iterdir())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} is not a readable folder ({getattr(error, 'strerror', error)}), expected a folder of "
            "images or one of auto, emnist, glyphs and glyphs:N; correct the name"
        ) from None
    name = printable(folder.resolve().name)
    pairs = _idx_pairs(folder, files)
    arrays = folder / "X_images.npy", folder / "y_images.npy"
    if any(path in files for path in arrays):
        if pairs:
            raise InputError(f"{folder} holds IDX and .npy images, expected one kind; move the others away")
        return _finish(name, str(arrays[1]), *read_npy(*arrays))
    if not pairs:
        raise InputError(
            f"{folder} holds no images, expected *{IMAGES}[.gz] with *{LABELS}[.gz], or X_images.npy with "
            "y_images.npy; give another folder"
        )
    return _from_idx(name, pairs)


def _idx_pairs(folder: Path, files: list[Path]) -> list[tuple[Path, Path]]:
    """The (images, labels) paths among the sorted files; of a plain and a gzipped twin the plain one."""
    found: dict[str, dict[str, Path]] = {IMAGES: {}, LABELS: {}}
    for path in reversed(files):  # "x.gz" comes before "x", which then takes its place
        for kind in found:
            stem = path.name.removesuffix(".gz")
            if stem.endswith(kind):
                found[kind][stem.removesuffix(kind)] = path
    for have, lack in ((IMAGES, LABELS), (LABELS, IMAGES)):
        for stem in sorted(found[have].keys() - found[lack].keys()):
            raise InputError(f"{found[have][stem]} is alone, expected {stem}{lack}[.gz] beside it; add that")
    sets = sorted({_emnist_name(stem) or "not EMNIST" for stem in found[IMAGES]})
    if len(sets) > 1:
        raise InputError(
            f"{folder} holds several data sets ({', '.join(sets)}), expected one; move the others away"
        )
    return [(found[IMAGES][stem], found[LABELS][stem]) for stem in sorted(found[IMAGES])]


def _emnist_name(file_name: str) -> str:
    """ "emnist-bymerge" of "emnist-bymerge-train-..."; "" for a file that is not EMNIST's."""
    return "-".join(file_name.split("-")[:2]) if file_name.startswith("emnist-") else ""


def _from_idx(name: str, pairs: list[tuple[Path, Path]]) -> Dataset:
    """Read and concatenate pairs of one data set, turning EMNIST's transposed images upright."""
    parts, labels = [], []
    for image_path, label_path in pairs:
        pixels, values = read_idx(image_path, IMAGES), read_idx(label_path, LABELS)
        if pixels.shape[1:] != (SIDE, SIDE):
            size = "x".join(map(str, pixels.shape[1:]))
            raise InputError(f"{image_path} holds {size} images, expected {SIDE}x{SIDE}; convert them")
        if len(pixels) != len(values):
            raise InputError(
                f"{label_path} holds {len(values)} labels for the {len(pixels)} images of {image_path.name}, "
                "expected as many; copy both files again"
            )
        if _emnist_name(image_path.name):
            pixels = pixels.transpose(0, 2, 1)
        parts.append(pixels)
        labels.append(values.astype(np.int32))
    files = " + ".join(str(label_path) for _, label_path in pairs)
    known = EMNIST_CLASSES.get(_emnist_name(pairs[0][0].name), ())
    # Memory in C order: concatenate would keep the transposed layout, and 800,000 images be copied twice.
    images = np.empty((sum(map(len, parts)), SIDE, SIDE), np.uint8)
    np.concatenate(parts, out=images)
    return _finish(name, files, images, np.concatenate(labels), known)


def _finish(name, file, images, labels, known=(), notice="") -> Dataset:
    """The checks that all sources share; `file` is what errors about labels name, `known` the class names."""
    if not len(images):
        raise InputError(f"{file} and its images are empty, expected at least one; give another data set")
    largest = len(known) - 1 if known else LARGEST_LABEL
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > largest:
        wrong = low if low < 0 else high
        raise InputError(f"{file} holds label {wrong}, expected 0 to {largest}; correct the labels")
    labels = np.ascontiguousarray(labels, np.int32)
    counts = np.bincount(labels, minlength=len(known))
    if not counts.all():
        raise InputError(
            f"{file} has no label {int(np.argmin(counts))}, expected every class from 0 to "
            f"{len(counts) - 1}; renumber the labels or add images"
        )
    images = np.ascontiguousarray(images.reshape(len(images), PIXELS))
    digest = hashlib.sha256(images)
    digest.update(labels)
    class_names = known or tuple(map(str, range(len(counts))))
    return Dataset(name, images, labels, class_names, digest.hexdigest(), notice)
