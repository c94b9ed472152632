"""Counter-based random numbers and permutations in ordinary array code: what random.cuh and shuffle.cuh compute.

Shuffling uses only operators that NumPy, CuPy and torch share, on int64 arrays.
"""

import math
import sys

import numpy as np

FOR_NOISE, FOR_SHUFFLE, FOR_AUGMENT, FOR_DROPOUT = range(4)  # the last word of a counter says what its bits are for
ROUNDS, LEAST_BITS = 8, 8  # of the network that shuffles
_LOW = 0xFFFFFFFF


def array_module(array):
    """numpy or cupy, whichever `array` belongs to. CuPy is not imported for a NumPy array."""
    cupy = sys.modules.get("cupy")
    return cupy if cupy is not None and isinstance(array, cupy.ndarray) else np


def philox4x32(xp, counters, key0, key1):
    """Four uint32 arrays of random bits: Salmon et al. 2011, 10 rounds. `counters`: four uint64 arrays < 2^32."""
    low = xp.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = counters
    for _ in range(10):
        a, b = c0 * xp.uint64(0xD2511F53), c2 * xp.uint64(0xCD9E8D57)
        shift = xp.uint64(32)
        c0, c1, c2, c3 = (
            (b >> shift) ^ c1 ^ xp.uint64(key0), b & low, (a >> shift) ^ c3 ^ xp.uint64(key1), a & low,
        )  # fmt: skip
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _units(xp, bits):
    """Numbers in (0, 1) of 23 of 32 random bits: float32, exact."""
    return ((bits >> xp.uint64(9)).astype(xp.float32) + xp.float32(0.5)) * xp.float32(2.0**-23)


def _words(xp, index, blocks, use, seed, draw):
    """Philox's four words (B, blocks) of counters (block, image, draw, use). draw: an array of one element or None."""
    zero = xp.zeros((len(index), blocks), xp.uint64)
    image, block = index.astype(xp.uint64)[:, None], xp.arange(blocks, dtype=xp.uint64)
    draw = xp.uint64(0) if draw is None else draw.reshape(1).astype(xp.uint64) & xp.uint64(_LOW)
    return philox4x32(xp, (zero + block, zero + image, zero + draw, zero + xp.uint64(use)), seed & _LOW, seed >> 32)


def image_units(xp, index, seed, draw=None):
    """Eight uniform numbers of each image, (8, B) float32."""
    words = _words(xp, index, 2, FOR_AUGMENT, seed, draw)
    return _units(xp, xp.stack([word[:, block] for block in (0, 1) for word in words]))


def normals(xp, index, count, seed, draw=None):
    """Standard normal (B, count) float32 noise that depends on the seed, the image's index, the pixel and draw."""
    quads = -(-count // 4)
    units = [_units(xp, word) for word in _words(xp, index, quads, FOR_NOISE, seed, draw)]
    noise = xp.empty((len(index), quads, 4), xp.float32)
    for k in (0, 2):
        radius = xp.sqrt(-2.0 * xp.log(units[k]))
        angle = xp.float32(2.0 * math.pi) * units[k + 1]
        noise[:, :, k] = radius * xp.cos(angle)
        noise[:, :, k + 1] = radius * xp.sin(angle)
    return noise.reshape(len(index), 4 * quads)[:, :count]


def _mix32(x):
    """murmur3's finalizer fmix32 on an int64 array of numbers below 2^32; what a product loses is above that."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _LOW
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _LOW
    return x ^ (x >> 16)


def round_keys(seed, epoch):
    counters = [np.array([word], np.uint64) for word in (epoch, 0, 0, FOR_SHUFFLE)]
    words = [int(word[0]) for word in philox4x32(np, counters, seed & _LOW, seed >> 32)]
    return [(words[k % 4] + k * 0x9E3779B9) & _LOW for k in range(ROUNDS)]


def feistel(x, bits, keys):
    """A bijection of [0, 2^bits) on an int64 array: see src/shuffle.cuh."""
    low_bits, high_bits = bits // 2, bits - bits // 2
    low, high = x & (2**low_bits - 1), x >> low_bits
    for k in range(0, ROUNDS, 2):
        low = low ^ (_mix32(high ^ keys[k]) & (2**low_bits - 1))
        high = high ^ (_mix32(low ^ keys[k + 1]) & (2**high_bits - 1))
    return high * 2**low_bits + low
