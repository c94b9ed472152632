"""A character on a picture as if NIST had scanned it: its ink in black and white, cut out, of one size.

NIST's scans (Special Database 19) are what MNIST and EMNIST were made from.
"""

import numpy as np

from . import InputError
from .pictures import border

SCAN = 64  # pixels of a scanned character's longer side
CONTRAST, NOISE = 0.06, 0.2  # least difference of ink and paper in [0, 1]; most noise on the paper, of that difference
SMALLEST = 0.03  # parts of less than this share of the largest part are dirt; the dot of an i is three times as large
HALF_STROKE = 1 / 20  # least half stroke width over the longer side; of MNIST's digits nine in ten have more


def scan(picture: np.ndarray, name="the picture") -> np.ndarray:
    """bool (h, w), the longer one SCAN or, with thickened strokes, a little more: where a picture (H, W, 3) has ink.

    Light on dark or dark on light, of any colours. InputError, naming the picture, where nothing is on it.
    """
    while True:
        ink = _coverage(picture - _paper(picture))
        if ink is None:  # ink all along the border, perhaps
            paper = _flat_paper(picture)
            ink = None if paper is None else _coverage(picture - paper)
        if ink is None:
            raise InputError(f"{name} is blank, expected a character that stands out from its background; give another")
        kept = _parts(ink > 0.5)
        window = _window(kept)
        if max(picture[window].shape) > 0.7 * max(picture.shape):
            return _thicken(_resize(np.where(_near(kept), ink, 0), kept))
        picture = picture[window]  # a closer look, smoothed less, at a character that is small


def _coverage(difference):
    """float32 (H, W): how far each pixel's colour is on the way from the paper's, 0, to the ink's, 1; None where there
    is no ink. difference (H, W, 3): from the paper's colour."""
    from scipy.ndimage import gaussian_filter

    sigma = max(difference.shape) / 300
    difference = gaussian_filter(difference, (sigma, sigma, 0))
    strength = np.linalg.norm(difference, axis=2)
    direction = difference[strength >= 0.5 * np.quantile(strength, 0.999)].mean(axis=0)
    contrast = float(np.linalg.norm(direction))
    if not contrast >= CONTRAST:
        return None
    ink = difference @ (direction / contrast**2)
    paper = ink[ink < 0.5]
    if not (paper.size and 1.4826 * np.median(np.abs(paper - np.median(paper))) <= NOISE):
        return None
    return ink / np.median(ink[ink > 0.5])


def _paper(picture):
    """The colour of the paper, float32 (H, W, 3): a polynomial of degree 2, for light that is not the same everywhere.

    Fitted to the border by least absolute deviations, which the minority of its pixels that are ink do not bend, and
    then to all that it explains; of a large picture, to a hundred rows and columns.
    """
    terms = _terms(*picture.shape[:2])
    step = -(-max(picture.shape) // 100)
    some_terms, some = terms[::step, ::step], picture[::step, ::step]
    design, colours = border(some_terms), border(some)
    weights = np.ones(len(design), np.float32)
    for _ in range(20):  # iteratively reweighted least squares
        fit = _solve(design, colours, weights)
        errors = np.linalg.norm(colours - design @ fit, axis=1)
        weights = 1 / np.maximum(errors, 1e-3)
    spread = max(3 * 1.4826 * float(np.median(errors)), 0.02)
    for _ in range(2):
        explained = np.linalg.norm(some - some_terms @ fit, axis=2) <= spread
        if explained.mean() >= 0.2:
            fit = _solve(some_terms[explained], some[explained], np.float32(1))
    return terms @ fit


def _flat_paper(picture):
    """The colour of the paper, float32 (3,), where it has but one: of two, that of most of the outermost pixels. None
    where the picture has many colours."""
    pixels = picture.reshape(-1, 3) - picture.mean(axis=(0, 1))
    axis = np.linalg.eigh(pixels.T @ pixels)[1][:, -1]  # along which the colours differ most
    places = pixels @ axis
    threshold = 0.0
    for _ in range(20):  # two means
        upper = places > threshold
        if upper.all() or not upper.any():
            break
        threshold = (places[upper].mean() + places[~upper].mean()) / 2
    upper = places > threshold
    within = sum(float(side.var()) * side.size for side in (places[upper], places[~upper]) if side.size)
    if not within < 0.15 * places.size * float(places.var()):  # normally distributed places have 0.36, even ones 0.25
        return None
    upper = upper.reshape(picture.shape[:2])
    outermost = np.concatenate([upper[0], upper[-1], upper[:, 0], upper[:, -1]])
    return np.median(picture[upper == (outermost.mean() > 0.5)], axis=0)


def _terms(H, W):
    """float32 (H, W, 6): 1, x, y, x^2, xy, y^2 of pixels from -1 to 1."""
    y, x = np.meshgrid(np.linspace(-1, 1, H, dtype=np.float32), np.linspace(-1, 1, W, dtype=np.float32), indexing="ij")
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=2)


def _solve(design, values, weights):
    """Coefficients (terms, 3) of the weighted least squares; a little ridge, for pictures of a pixel or two."""
    weighted = (design.T * weights).astype(np.float64)
    normal = weighted @ design
    return np.linalg.solve(normal + 1e-6 * np.trace(normal) * np.eye(len(normal)), weighted @ values).astype(np.float32)


def _parts(mask):
    """`mask` without its dirt, and without what reaches in from the edge, unless all that stands inside is small."""
    from scipy.ndimage import label

    numbers, count = label(mask, np.ones((3, 3)))
    sizes = np.bincount(numbers.ravel(), minlength=count + 1)
    sizes[0] = 0
    edge = np.unique(np.concatenate([numbers[0], numbers[-1], numbers[:, 0], numbers[:, -1]]))
    inside = sizes.copy()
    inside[edge] = 0
    keep = sizes >= SMALLEST * sizes.max()
    keep[edge] &= sizes[edge] > 4 * inside.max()  # more than a dot, whose i is cut off at the edge
    keep[0] = False
    return keep[numbers]


def _window(mask):
    """Slices of the bounding box of `mask` and half its longer side around it."""
    spans = [np.flatnonzero(mask.any(axis=axis))[[0, -1]] for axis in (1, 0)]
    margin = 2 + max(last - first for first, last in spans) // 2
    return tuple(slice(max(0, first - margin), last + 1 + margin) for first, last in spans)


def _near(mask):
    """The mask and the soft edge around it."""
    from scipy.ndimage import binary_dilation

    return binary_dilation(mask, np.ones((3, 3)), iterations=1 + max(mask.shape) // 150)


def _resize(ink, mask):
    """bool (h, w), the longer one SCAN: the part of `ink` that `mask` covers."""
    from PIL import Image

    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    margin = 2  # of paper, so that interpolation sees the edge
    cut = np.pad(ink, margin)[rows[0] : rows[-1] + 1 + 2 * margin, columns[0] : columns[-1] + 1 + 2 * margin]
    h, w = cut.shape
    scale = SCAN / (max(h, w) - 2 * margin)
    image = Image.fromarray(cut.astype(np.float32))
    image = image.resize((max(1, round(w * scale)), max(1, round(h * scale))), Image.Resampling.BICUBIC)
    return crop(np.asarray(image) > 0.5)


def crop(array: np.ndarray, threshold=0) -> np.ndarray:
    """The part of a 2-d array within the bounding box of what exceeds the threshold."""
    rows, columns = (np.flatnonzero((array > threshold).any(axis=axis)) for axis in (1, 0))
    return array[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def signed_distance(mask: np.ndarray) -> np.ndarray:
    """float64, of `mask`'s shape: pixels to the edge of the ink, positive inside."""
    from scipy.ndimage import distance_transform_edt

    return np.where(mask, distance_transform_edt(mask) - 0.5, 0.5 - distance_transform_edt(~mask))


def _thicken(mask):
    """Strokes of a fine pen as wide as those of the pens that people had."""
    margin = SCAN // 8
    distance = signed_distance(np.pad(mask, margin))
    half_stroke = 2 * distance[distance > 0].mean()  # distances spread evenly over 0 to half the width
    return crop(distance > min(0.0, half_stroke - HALF_STROKE * SCAN))
