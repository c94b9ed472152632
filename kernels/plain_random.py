"""Counter-based random numbers and permutations in ordinary array code: what random.cuh and shuffle.cuh compute.

Shuffling uses only operators that NumPy, CuPy and torch share, on int64 arrays.
"""

import math

import numpy as np

FOR_NOISE, FOR_SHUFFLE = 0, 1  # the last word of a counter says what its bits are for
ROUNDS, LEAST_BITS = 8, 8  # of the network that shuffles
_LOW = 0xFFFFFFFF


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


def normals(xp, index, count, seed):
    """Standard normal (B, count) float32 noise that depends on the seed, the image's index and the pixel alone."""
    quads = -(-count // 4)
    zero = xp.zeros((len(index), quads), xp.uint64)
    image, use = index.astype(xp.uint64)[:, None], xp.uint64(FOR_NOISE)
    counters = zero + xp.arange(quads, dtype=xp.uint64), zero + image, zero, zero + use
    bits = philox4x32(xp, counters, seed & 0xFFFFFFFF, seed >> 32)
    units = [((b >> xp.uint64(9)).astype(xp.float32) + xp.float32(0.5)) * xp.float32(2.0**-23) for b in bits]
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
