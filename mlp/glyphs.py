"""A built-in stand-in for EMNIST ByMerge: 47 classes of characters drawn from the fonts inside matplotlib.

Each character of each font is turned once into a signed distance field d (positive inside the ink, in grid
cells).  An image is then a resampling of one field: pixel (x, y) looks up d at a point that went through a
random affine map and a smooth random displacement, and the ink is

    ink = clip(1/2 + (d / scale + offset) / softness, 0, 1)

where `scale` is the number of grid cells per pixel, `offset` sets the stroke width and `softness` the blur,
both in pixels.  Distances, unlike grey levels, can be thickened and blurred by one addition and one division,
so 100,000 images take seconds.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import string
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mlp import InputError

# The order of EMNIST ByMerge (Cohen et al. 2017, arXiv:1702.05373): 15 lower-case letters whose shape repeats
# the capital share its class, the other 11 have their own.
MERGED = "cijklmopsuvwxyz"
CLASSES = string.digits + string.ascii_uppercase + "abdefghnqrt"
CHARACTERS = string.digits + string.ascii_letters

# Relative class sizes, rounded by hand to resemble ByMerge: the ten digits are about half of all images and
# of one size; letters follow English usage, so the rarest are some 14 times rarer than a digit.
WEIGHTS = dict.fromkeys(string.digits, 100) | {
    "A": 18, "B": 11, "C": 34, "D": 13, "E": 15, "F": 25, "G": 7, "H": 9, "I": 40, "J": 14, "K": 8, "L": 44,
    "M": 27, "N": 25, "O": 84, "P": 28, "Q": 7, "R": 15, "S": 70, "T": 29, "U": 42, "V": 14, "W": 15, "X": 9,
    "Y": 14, "Z": 8, "a": 29, "b": 15, "d": 30, "e": 72, "f": 7, "g": 11, "h": 26, "n": 33, "q": 9, "r": 42,
    "t": 53}  # fmt: skip

# The fonts of matplotlib that hold plain letters and digits; the others hold symbols.
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
    "cmr10", "cmb10", "cmss10", "cmtt10", "cmti10")  # fmt: skip

SMALLEST, LARGEST = 1_000, 5_000_000
PER_CLASS = 10  # the least that a 70/10/20 split divides without rounding
SIDE = 28  # pixels per image side
GRID, FONT_SIZE = 80, 52  # cells per field; at this size the widest glyph leaves a margin for thick strokes
CHUNK = 500  # images per task: large enough to amortise Python, small enough for the arrays to stay in cache
KNOTS = 4  # displacement knots per axis

# Spread of the random draws.  Tuned so that people still read nearly every image while, on 100,000 of them,
# a linear classifier is clearly worse than an MLP (about 70 % against 91 % of the test images).
SIZE = (17.0, 22.0)  # longer side of the character, px
ROTATION, SHEAR, ASPECT, SHIFT = 0.12, 0.20, 0.12, 0.6  # sd: radians, ratio, log ratio, px
WOBBLE = 1.05  # sd of the displacement at a knot, px
STROKE = (0.9, 1.9)  # half the stroke width, px
OFFSET = (-0.5, 1.4)  # limits of the thinning and thickening on the way there, px
SOFTNESS = (1.2, 3.0)  # width of the edge between ink and paper, px
NOISE = (0.0, 0.06)  # sd of the pixel noise, of full scale


def class_counts(n: int) -> np.ndarray:
    """int64 (47,) images per class, summing to n: ten each, the rest shared out by WEIGHTS."""
    weights = np.array([WEIGHTS[name] for name in CLASSES], dtype=np.float64)
    share = weights / weights.sum() * (n - PER_CLASS * len(CLASSES))
    counts = np.floor(share).astype(np.int64)
    leftover = int(n - PER_CLASS * len(CLASSES) - counts.sum())
    counts[np.argsort(counts - share, kind="stable")[:leftover]] += 1
    return counts + PER_CLASS


def _fonts() -> list:
    """FONTS as Pillow fonts of FONT_SIZE; InputError when they cannot be read."""
    import matplotlib
    from PIL import ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    basic = ImageFont.Layout.BASIC  # always there; Pillow's default engine depends on how it was built
    paths = [str(folder / f"{name}.ttf") for name in FONTS]
    try:
        return [ImageFont.truetype(path, FONT_SIZE, layout_engine=basic) for path in paths]
    except OSError as error:
        raise InputError(
            f"the glyph set needs the fonts that ship with matplotlib, but those in {folder} cannot be read "
            f"({error}); reinstall matplotlib or use another data source"
        ) from None


@functools.cache
def _bank() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fields float32 (62, 21, GRID, GRID), longer sides and half strokes (62, 21), per character and font."""
    fonts = _fonts()
    shape = (len(CHARACTERS), len(fonts))
    fields = np.empty(shape + (GRID, GRID), np.float32)
    sides, strokes = np.empty(shape, np.float32), np.empty(shape, np.float32)
    for c, character in enumerate(CHARACTERS):
        for f, font in enumerate(fonts):
            fields[c, f], sides[c, f], strokes[c, f] = _field(font, character)
    return fields, sides, strokes


def _field(font, character: str) -> tuple[np.ndarray, float, float]:
    """Distance field (GRID, GRID) of one centred character, its longer side and half its stroke, in cells."""
    from PIL import Image, ImageDraw
    from scipy.ndimage import distance_transform_edt

    left, top, right, bottom = font.getbbox(character)
    canvas = Image.new("L", (GRID, GRID))
    corner = ((GRID - right - left) // 2, (GRID - bottom - top) // 2)
    ImageDraw.Draw(canvas).text(corner, character, fill=255, font=font)
    ink = np.asarray(canvas) >= 128
    inside = distance_transform_edt(ink)
    field = np.where(ink, inside - 0.5, 0.5 - distance_transform_edt(~ink))
    # Distances inside a stroke of half width r spread evenly over 0..r, so r is twice their mean.
    return field, max(right - left, bottom - top), 2.0 * float(field[ink].mean())


@functools.cache
def _knot_basis() -> np.ndarray:
    """float32 (SIDE, KNOTS): how much each knot moves each pixel along one axis (Gaussian bumps)."""
    knots = np.linspace(2, SIDE - 3, KNOTS)
    width = knots[1] - knots[0]
    return np.exp(-0.5 * ((np.arange(SIDE)[:, None] - knots) / (0.6 * width)) ** 2).astype(np.float32)


def _source_points(rng: np.random.Generator, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Grid positions x, y float32 (B, SIDE, SIDE) that the pixels show; scale (B, 1, 1): cells per pixel."""
    shape = scale.shape
    rotation, shear, aspect, shift_x, shift_y = (
        rng.standard_normal(shape, np.float32) * np.float32(spread)
        for spread in (ROTATION, SHEAR, ASPECT, SHIFT, SHIFT)
    )
    knots = rng.standard_normal((2, len(scale), KNOTS, KNOTS), np.float32) * np.float32(WOBBLE)
    basis = _knot_basis()
    # einsum, not matmul: the bytes must not depend on how a BLAS shares its sums between threads.
    wobble = np.einsum("dbiy,xi->dbyx", np.einsum("dbij,yj->dbiy", knots, basis), basis)
    pixel = np.arange(SIDE, dtype=np.float32) - np.float32((SIDE - 1) / 2)
    x = wobble[0] + (pixel - shift_x)
    y = wobble[1] + (pixel[:, None] - shift_y)
    cos, sin, stretch = np.cos(rotation), np.sin(rotation), np.exp(aspect / 2)
    centre = np.float32((GRID - 1) / 2)
    source_x = scale / stretch * (cos + shear * sin) * x + scale / stretch * (sin - shear * cos) * y + centre
    source_y = scale * stretch * cos * y - scale * stretch * sin * x + centre
    return source_x, source_y


def _sample(fields: np.ndarray, start: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear look-up at x, y (B, SIDE, SIDE), overwritten, in the field that begins at start (B, 1, 1)."""
    last_cell = np.float32(GRID - 1.001)
    np.clip(x, 0, last_cell, out=x)
    np.clip(y, 0, last_cell, out=y)
    column, row = x.astype(np.int64), y.astype(np.int64)
    x -= column
    y -= row
    at = row * GRID + column + start
    top = fields[at]
    top += (fields[at + 1] - top) * x
    at += GRID
    bottom = fields[at]
    bottom += (fields[at + 1] - bottom) * x
    return top + (bottom - top) * y


@functools.cache
def _cases() -> np.ndarray:
    """int64 (47, 2): the two CHARACTERS that a class is drawn as, the same one twice unless it is merged."""
    merged = [name.lower() if name.isupper() and name.lower() in MERGED else name for name in CLASSES]
    return np.array([[CHARACTERS.index(c) for c in pair] for pair in zip(CLASSES, merged)])


def _draw(labels: np.ndarray, seed: np.random.SeedSequence) -> np.ndarray:
    """Images uint8 (B, SIDE * SIDE) of labels int32 (B,), from this seed alone."""
    rng = np.random.default_rng(seed)
    fields, sides, strokes = _bank()
    b = len(labels)

    def uniform(limits):
        return rng.uniform(*limits, size=(b, 1, 1)).astype(np.float32)

    glyph = _cases()[labels, rng.integers(2, size=b)] * len(FONTS) + rng.integers(len(FONTS), size=b)
    glyph = glyph.reshape(b, 1, 1)
    scale = sides.reshape(-1)[glyph] / uniform(SIZE)
    offset = np.clip(uniform(STROKE) - strokes.reshape(-1)[glyph] / scale, *OFFSET)
    softness = uniform(SOFTNESS)
    ink = _sample(fields.reshape(-1), glyph * (GRID * GRID), *_source_points(rng, scale))
    ink *= 1 / (scale * softness)
    ink += 0.5 + offset / softness
    np.clip(ink, 0, 1, out=ink)
    ink += rng.standard_normal(ink.shape, np.float32) * uniform(NOISE)
    np.clip(ink, 0, 1, out=ink)
    ink *= 255
    ink += 0.5
    return ink.astype(np.uint8).reshape(b, SIDE * SIDE)


def generate(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw n character images.

    Returns uint8 (n, 784) upright images, white ink on black, and int32 (n,) labels into CLASSES, in random
    order.  The same (n, seed) gives the same bytes whatever the number of threads.  Raises InputError for an
    n outside [SMALLEST, LARGEST] or when matplotlib's fonts cannot be read.
    """
    if not SMALLEST <= n <= LARGEST:
        raise InputError(
            f"a glyph set of {n} images cannot be made, expected {SMALLEST} to {LARGEST}; "
            "use for example glyphs:100000"
        )
    order, *seeds = np.random.SeedSequence(seed).spawn(1 + -(-n // CHUNK))
    labels = np.repeat(np.arange(len(CLASSES), dtype=np.int32), class_counts(n))
    np.random.default_rng(order).shuffle(labels)
    images = np.empty((n, SIDE * SIDE), np.uint8)
    _bank()  # built here, once, so that the threads below only read it

    def fill(task: int) -> None:
        part = slice(task * CHUNK, (task + 1) * CHUNK)
        images[part] = _draw(labels[part], seeds[task])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, range(len(seeds))))
    return images, labels


def load(n: int, root: Path, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """generate(n, seed), kept in root/glyphs-<n>-<seed>.npz; a cache that cannot be used is made again.

    A cache counts only if it was made by this very source text, for this n and seed, and still has the digest
    that it states.  A root that cannot be written costs the caching, not the run.
    """
    path = Path(root) / f"glyphs-{n}-{seed}.npz"
    # Whatever is wrong with a cache, making it again is the answer.
    with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
        sound = images.shape == (n, SIDE * SIDE) and (images.dtype, labels.dtype) == (np.uint8, np.int32)
        if sound and str(file["digest"]) == _digest(n, seed, images, labels):
            return images, labels
    images, labels = generate(n, seed)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".glyphs-", dir=path.parent) as scratch:
            whole = Path(scratch) / path.name
            np.savez(whole, images=images, labels=labels, digest=_digest(n, seed, images, labels))
            os.replace(whole, path)
    return images, labels


def _digest(n: int, seed: int, images: np.ndarray, labels: np.ndarray) -> str:
    """sha256 hex over this file's text, the request and the bytes that answer it."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + f"{n} {seed}".encode())
    digest.update(images)
    digest.update(labels)
    return digest.hexdigest()
