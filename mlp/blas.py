"""NumPy's matrix products, the same bits whatever the number of threads.

OpenBLAS divides a product among as many threads as there are, and with the division the order of the sums changes. So
here a product is divided into tiles of rows, always the same ones, and BLAS computes each with one thread.
"""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
from threadpoolctl import ThreadpoolController

TILE_ROWS = 128  # fewer feed more cores, but each tile reads the other factor anew
SMALLEST = 2**22  # multiplications; what has fewer is one tile


def multiply(a, b, out) -> None:
    """out (M, N) = a (M, K) @ b (K, N)."""
    if out.size * len(b) < SMALLEST or len(out) <= TILE_ROWS:
        tiles = [(a, b, out)]
    else:
        tiles = [(a[row : row + TILE_ROWS], b, out[row : row + TILE_ROWS]) for row in range(0, len(out), TILE_ROWS)]
    libraries = [(library, library.get_num_threads()) for library in _libraries()]
    threads = min(max((number for _, number in libraries), default=1), len(tiles), _cores())
    for library, number in libraries:
        if number != 1:
            library.set_num_threads(1)
    try:
        following = itertools.count()
        helpers = [_pool().submit(_multiply, tiles, following) for _ in range(threads - 1)]
        _multiply(tiles, following)
        for helper in helpers:
            helper.result()
    finally:
        for library, number in libraries:
            if number != 1:
                library.set_num_threads(number)


def _multiply(tiles, following) -> None:
    """Compute tiles until there are no more; `following` counts those that someone has taken."""
    while (number := next(following)) < len(tiles):
        a, b, out = tiles[number]
        np.matmul(a, b, out=out)


@cache
def _libraries() -> list:
    """The BLAS libraries of this process whose threads can be told."""
    return ThreadpoolController().select(user_api="blas").lib_controllers


@cache
def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, _cores() - 1), "tiles")
