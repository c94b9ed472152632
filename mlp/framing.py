"""How each data set puts a character into 28x28 pixels: what a model has learnt to look at."""

import numpy as np

from . import glyphs
from .data import SIDE
from .ink import crop, signed_distance


def mnist(scan: np.ndarray) -> np.ndarray:
    """LeCun et al. 1998: scaled to a box of 20x20 pixels, its centre of mass at the centre of the image."""
    ink = _resize(scan, 20)
    h, w = ink.shape
    image = np.zeros((SIDE, SIDE), np.float32)
    top, left = (_place(ink.sum(axis=axis), SIDE - length) for axis, length in ((1, h), (0, w)))
    image[top : top + h, left : left + w] = ink
    return image


def _place(mass, room):
    """Where an axis of this mass profile begins, so that its centre of mass is at SIDE / 2; 0 to `room`."""
    return min(max(round(SIDE / 2 - float(mass @ np.arange(len(mass)) / mass.sum())), 0), room)


def emnist(scan: np.ndarray) -> np.ndarray:
    """Cohen et al. 2017 (arXiv:1702.05373): blurred with sigma 1, its bounding box centred in a square with a border of
    2 pixels, and that reduced by bicubic interpolation, the brightest pixel white."""
    from scipy.ndimage import gaussian_filter

    ink = crop(gaussian_filter(np.pad(scan, 4).astype(np.float32), 1.0), 0.5 / 255)
    side = max(ink.shape) + 4
    image = _reduced(ink, side)
    return image / image.max()


def glyph(scan: np.ndarray) -> np.ndarray:
    """As glyphs.py draws on average: the longer side, the width of the edge; the box, not the mass, in the centre."""
    longer = 20
    scale = max(scan.shape) / longer
    distance = signed_distance(np.pad(scan, round(2 * scale)))
    ink = np.clip(0.5 + distance / (scale * np.mean(glyphs.SOFTNESS)), 0, 1)
    return _reduced(ink.astype(np.float32), SIDE * scale)


FRAMES = {"emnist": emnist, "mnist": mnist, "glyphs": glyph}


def choose(data_name: str, class_names: tuple[str, ...]) -> str:
    """The key of FRAMES for a model trained on this data set: the one it is named after, else EMNIST's where the
    classes are more than digits and MNIST's where they are not."""
    for name in FRAMES:  # "emnist" before the "mnist" in it
        if name in data_name.lower():
            return name
    return "mnist" if len(class_names) <= 10 else "emnist"


def frame(scan: np.ndarray, kind: str) -> np.ndarray:
    """uint8 (28, 28), white on black, as Dataset.images: the scanned character (see ink.scan) in the frame `kind`."""
    return np.round(255 * np.clip(FRAMES[kind](scan), 0, 1)).astype(np.uint8)  # bicubic interpolation overshoots


def _resize(scan, longer):
    """float32: `scan` with its longer side `longer`."""
    from PIL import Image

    h, w = (max(1, round(longer * side / max(scan.shape))) for side in scan.shape)
    return np.asarray(Image.fromarray(scan.astype(np.float32)).resize((w, h), Image.Resampling.BOX))


def _reduced(ink, side):
    """float32 (28, 28): the square of `side` pixels around the centre of `ink`, by bicubic interpolation."""
    from PIL import Image

    h, w = ink.shape
    margin = int(np.ceil(side))
    left, top = margin + (w - side) / 2, margin + (h - side) / 2
    image = Image.fromarray(np.pad(ink, margin))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side)))
