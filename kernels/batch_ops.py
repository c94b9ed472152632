"""The ops that make batches of a data set, by the rules of ops.py.

Letters: M images, D pixels, B images of a batch.
"""

import math
from typing import NamedTuple

from .arguments import (
    FLOAT32,
    INT32,
    INT64,
    UINT8,
    check,
    check_number,
    check_output,
    check_whole,
    one_element,
)
from .dispatch import backend_of, output
from .interop import accepts_torch


class Augment(NamedTuple):
    """The ranges from which gather_batch draws an affine map for each image, uniformly.

    rotation: degrees, from -rotation to rotation, which is at most 45. scale: two factors from 1 - scale to 1 + scale,
    one along the columns and one along the rows; below 1. shear: pixels per pixel, from -shear to shear; below 1.
    shift: pixels, from -shift to shift, one number along the columns and one along the rows. From an output pixel's
    position to its source's, the map scales, shears along the columns, rotates, and shifts: see src/augment.cuh.
    """

    rotation: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    shift: float = 0.0


def _check_augment(augment):
    if not isinstance(augment, Augment):
        raise TypeError(f"augment must be a kernels.Augment or None, got {type(augment).__name__}")
    for name, value in augment._asdict().items():
        check_number(f"augment.{name}", value, 0.0, 1.0 if name in ("scale", "shear") else math.inf)
    if augment.rotation > 45.0:
        raise ValueError(f"augment.rotation must be at most 45 degrees, got {augment.rotation!r}")


@accepts_torch
def gather_batch(
    images, labels, index, *, offset=None, out_x=None, out_y=None, mean=0.0, scale=1.0, noise_sigma=0.0, seed=0,
    numbers=None, affine=None, draw=None, noise_uniform=False, augment=None,
):  # fmt: skip
    """A batch from a uint8 dataset: images (M, D) uint8, labels (M,) int32, index (B,) int32
    -> x (B, D) float32 = (pixel / 255 + sigma * normal - mean) * scale, y (B,) int32.

    An index outside [0, M) gives a NaN row and label -1.
    offset: int64 array of one element, which is read when the kernel runs: the batch is then
    index[offset : offset + B] of an index of any length, where B is the number of rows of `out_x`, which must
    be given; a position outside the index gives a NaN row and label -1, too.
    affine: float32 (B, 2, 3), for square images: the matrix that takes an output pixel's (column, row, 1) from the
    centre to the source pixel's, sampled bilinearly, 0 outside. augment: an Augment, for square images: such a matrix
    is drawn for each image, the same to the bit on every device that has a fused multiply-add. Not both.
    sigma is noise_sigma, or with noise_uniform noise_sigma times a number drawn uniformly from (0, 1) for each image.
    All that is drawn depends on `seed` (64 bits), the image's index, the pixel and `draw` alone, so it is the same for
    any batch size and order (Philox4x32-10, Salmon et al. 2011). draw: int64 array of one element, read when the kernel
    runs, of which the low 32 bits count; None is 0. numbers: int32 (M,), what counts as the images' indices then,
    where they are a part of a data set.
    """
    backend = backend_of("images", images)
    check("images", images, images, UINT8, None, None)
    M, D = images.shape
    if D < 1:
        raise ValueError(f"images must have at least one pixel, got shape {images.shape}")
    check("labels", labels, images, INT32, M)
    check("index", index, images, INT32, None)
    B = index.size
    if offset is not None:
        check("offset", offset, images, INT64, *one_element(offset))
        if out_x is None:
            raise ValueError("out_x must be given where offset is: its rows say how many images the batch has")
        check_output("out_x", out_x, images, FLOAT32, None, D)
        B = out_x.shape[0]
    _check_variations(images, B, numbers, affine, draw, augment)
    check_number("mean", mean)
    check_number("scale", scale)
    check_number("noise_sigma", noise_sigma, 0.0)
    check_whole("seed", seed, 0, 2**64)
    out_x = output(backend, "out_x", out_x, images, FLOAT32, B, D)
    out_y = output(backend, "out_y", out_y, images, INT32, B)
    if augment is not None:
        augment = augment._replace(rotation=math.radians(augment.rotation))
    backend.gather_batch(
        images, labels, numbers, index, offset, draw, affine, out_x, out_y, mean, scale, noise_sigma,
        bool(noise_uniform), augment, int(seed),
    )  # fmt: skip
    return out_x, out_y


def _check_variations(images, B, numbers, affine, draw, augment):
    """What says how the images are changed on their way into a batch of B."""
    M, D = images.shape
    if numbers is not None:
        check("numbers", numbers, images, INT32, M)
    if draw is not None:
        check("draw", draw, images, INT64, *one_element(draw))
    if affine is not None:
        check("affine", affine, images, FLOAT32, B, 2, 3)
    if augment is not None:
        _check_augment(augment)
        if affine is not None:
            raise ValueError("augment must be None where affine is given: an image is mapped once")
    for name, maps in (("affine", affine), ("augment", augment)):
        if maps is not None and math.isqrt(D) ** 2 != D:
            raise ValueError(f"{name} needs square images, got {D} pixels")


@accepts_torch
def advance(offset, by, step=None):
    """offset (int64, one element) += by, a whole number from 0 on, and step (float32, one element) += 1, in place.

    In one launch, so that a captured training step moves on by itself: the offset is gather_batch's and the step
    adam_step's, which counts exactly up to 2^24. Returns None.
    """
    backend = backend_of("offset", offset)
    check_output("offset", offset, offset, INT64, *one_element(offset))
    check_whole("by", by, 0, 2**63)
    if step is not None:
        check_output("step", step, offset, FLOAT32, *one_element(step))
    backend.advance(offset, int(by), step)


@accepts_torch
def shuffle(index, *, seed=0, epoch=0, out=None):
    """The elements of index, int32 (N,), in a random order -> int32 (N,); N is at most 2^31.

    The order depends on `seed` (64 bits), `epoch` (32 bits) and N alone: it is the same on every device. `out`
    must not share memory with index. A Feistel network with cycle walking permutes the positions (see
    src/shuffle.cuh; after Mitchell et al., "Bandwidth-optimal random shuffling for GPUs", 2021).
    """
    backend = backend_of("index", index)
    check("index", index, index, INT32, None)
    if index.size > 2**31:
        raise ValueError(f"index must have at most 2^31 elements, got {index.size}")
    check_whole("seed", seed, 0, 2**64)
    check_whole("epoch", epoch, 0, 2**32)
    if out is index:
        raise ValueError("out must not be index, which is read in another order; pass another array")
    out = output(backend, "out", out, index, INT32, index.size)
    backend.shuffle(index, out, int(seed), int(epoch))
    return out
