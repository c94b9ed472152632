"""Picture files as arrays: any format that Pillow reads, upright, opaque, and of a size that is quick to look at."""

import warnings
from pathlib import Path

import numpy as np

from . import InputError, one_line

LARGEST = 1000  # pixels of the longer side; larger pictures are reduced, which averages their noise away, too


def read(path: Path) -> np.ndarray:
    """float32 (H, W, 3) in [0, 1]: red, green and blue. InputError, naming the file, where there is no picture in it.

    Turned as its EXIF orientation says. Transparent pixels get the colour of the paper: that of the border, or where
    the border is transparent, too, white or black, whichever is farther from what is opaque.
    """
    from PIL import Image, ImageOps

    try:
        # Warnings are of large pictures and odd metadata; what is wrong raises.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            image.draft("RGB", (LARGEST, LARGEST))  # a JPEG is decoded at about the size that is needed
            image = ImageOps.exif_transpose(image)
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                image = _eight_bits(image)
            image = image.convert("RGBA")
            image.thumbnail((LARGEST, LARGEST), Image.Resampling.BOX)
            pixels = np.asarray(image, np.float32) / 255
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give the name of a picture") from None
    except Exception as error:  # damaged bytes raise nearly anything in the decoders
        reason = one_line(error)
        raise InputError(f"{path} is not a readable picture ({reason}); give a PNG, a JPEG or the like") from None
    return _opaque(pixels[..., :3], pixels[..., 3])


def _eight_bits(image):
    """A grey picture of 16 or 32 bits, from its darkest pixel to its brightest; one larger than LARGEST is reduced."""
    from PIL import Image

    image = image.convert("F")
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.BOX)
    values = np.asarray(image, np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite(high - low):
        raise ValueError("it has NaN or infinite pixels")
    return Image.fromarray(np.round(255 * (values - low) / max(high - low, 1e-300)).astype(np.uint8))


def border(picture: np.ndarray) -> np.ndarray:
    """The pixels (N, ...) of the frame of a picture (H, W, ...), a twenty-eighth of it wide on each side."""
    H, W = picture.shape[:2]
    inner = np.zeros((H, W), bool)
    h, w = -(-H // 28), -(-W // 28)
    inner[h : H - h, w : W - w] = True
    return picture[~inner]


def _opaque(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    if alpha.min() == 1:
        return colour
    opaque = border(alpha) > 0.5
    if opaque.mean() >= 0.5:
        paper = np.median(border(colour)[opaque], axis=0)
    else:
        paper = np.float32(np.average(colour.mean(axis=2), weights=alpha + 1e-9) < 0.5)
    return colour * alpha[..., None] + paper * (1 - alpha[..., None])
