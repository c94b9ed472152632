"""The ops of batch_ops.py in ordinary NumPy/CuPy array code: see plain.py, of which they are a part."""

import math
import sys

import numpy as np

from .plain_random import LEAST_BITS, array_module, feistel, image_units, normals, round_keys


def _warp(xp, images, affine):
    """Bilinear samples of (B, D) square images at affine (B, 2, 3) of the output positions; 0 outside."""
    side = math.isqrt(images.shape[1])
    centre = 0.5 * (side - 1)
    row, column = xp.divmod(xp.arange(side * side), side)
    grid = xp.stack([column - centre, row - centre, xp.ones(side * side)]).astype(xp.float32)
    source = affine.reshape(-1, 2, 3).astype(xp.float32) @ grid + xp.float32(centre)
    source = xp.clip(source, -2.0, side + 1.0)
    corner = xp.floor(source)
    fraction = source - corner
    corner = corner.astype(xp.int64)
    rows = xp.arange(len(images))[:, None]
    result = xp.zeros(source[:, 0].shape, xp.float32)
    for down in (0, 1):
        for right in (0, 1):
            c, r = corner[:, 0] + right, corner[:, 1] + down
            inside = (c >= 0) & (c < side) & (r >= 0) & (r < side)
            pixel = xp.where(inside, images[rows, xp.where(inside, r * side + c, 0)], 0)
            weight_c = fraction[:, 0] if right else 1.0 - fraction[:, 0]
            weight_r = fraction[:, 1] if down else 1.0 - fraction[:, 1]
            result += pixel * weight_c * weight_r
    return result


def _maps(xp, augment, units):
    """Random maps (B, 2, 3) of an Augment, from 7 or more uniform numbers of each image: see src/augment.cuh."""
    turn, shear, zoom_u, zoom_v, shift_u, shift_v = (2 * u - 1 for u in units[:6])
    angle, shear = math.radians(augment.rotation) * turn, augment.shear * shear
    zoom_u, zoom_v = 1 + augment.scale * zoom_u, 1 + augment.scale * zoom_v
    cosine, sine = xp.cos(angle), xp.sin(angle)
    return xp.stack([
        cosine * zoom_u, (cosine * shear - sine) * zoom_v, augment.shift * shift_u,
        sine * zoom_u, (sine * shear + cosine) * zoom_v, augment.shift * shift_v,
    ], axis=1).reshape(-1, 2, 3)  # fmt: skip


def gather_batch(
    images, labels, index, *, offset=None, out_x=None, out_y=None, mean=0.0, scale=1.0, noise_sigma=0.0, seed=0,
    numbers=None, affine=None, draw=None, noise_uniform=False, augment=None,
):  # fmt: skip
    xp = array_module(images)
    if offset is not None:
        index = _slice(xp, index, offset, len(out_x))
    out_x = xp.empty((len(index), images.shape[1]), xp.float32) if out_x is None else out_x
    out_y = xp.empty(len(index), xp.int32) if out_y is None else out_y
    valid = (index >= 0) & (index < len(images))
    safe = xp.where(valid, index, 0)
    counted = safe if numbers is None else numbers[safe]
    if augment is not None:
        affine = _maps(xp, augment, image_units(xp, counted, seed, draw))
    pixels = images[safe] if affine is None else _warp(xp, images[safe], affine)
    unit, nan = xp.float32(1.0 / 255.0), xp.float32(math.nan)
    if xp is np:
        xp.multiply(pixels, unit, out=out_x)
        out_x[~valid] = nan
    else:  # where such a mask makes the host wait for the GPU
        xp.multiply(pixels, xp.where(valid, unit, nan)[:, None], out=out_x)
    if noise_sigma:
        noise = normals(xp, counted, images.shape[1], seed, draw)
        if noise_uniform:
            noise *= image_units(xp, counted, seed, draw)[6][:, None]
        out_x += xp.float32(noise_sigma) * noise
    if mean:
        out_x -= mean
    if scale != 1.0:
        out_x *= scale
    out_y[...] = xp.where(valid, labels[safe], -1)
    return out_x, out_y


def _slice(xp, index, offset, count):
    """index[offset : offset + count], -1 at positions outside; the offset is an array, and stays on its device."""
    if not len(index):
        return xp.full(count, -1, index.dtype)
    positions = offset.ravel() + xp.arange(count, dtype=xp.int64)  # what wraps is outside, too
    inside = (positions >= 0) & (positions < len(index))
    return xp.where(inside, index[xp.where(inside, positions, 0)], -1)


def advance(offset, by, step=None):
    offset += by
    if step is not None:
        step += 1


def _arange(like, count):
    """0, 1, ..., count - 1 in int64, of the kind and on the device of `like`: NumPy, CuPy or torch."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.arange(count, device=like.device)
    return array_module(like).arange(count, dtype=np.int64)


def shuffle(index, *, seed=0, epoch=0, out=None):
    """Also of torch tensors, on any device."""
    N, keys = len(index), round_keys(seed, epoch)
    bits = max(LEAST_BITS, (N - 1).bit_length())
    x = feistel(_arange(index, N), bits, keys)
    outside = x >= N
    while outside.any():
        x[outside] = feistel(x[outside], bits, keys)
        outside = x >= N
    if out is None:
        return index[x]
    out[...] = index[x]
    return out
