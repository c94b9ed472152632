"""NumPy's matrix products, the same bits whatever the number of threads.

OpenBLAS divides a product among as many threads as there are, and with the division the order of the sums changes. So
here a product is divided into tiles of rows, always the same ones, and BLAS computes each with one thread.
"""

import itertools
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, partial

import numpy as np
from threadpoolctl import ThreadpoolController

from kernels.host import cores

TILE_ROWS = 128  # fewer feed more cores, but each tile reads the other factor anew
SMALLEST = 2**22  # multiplications; what has fewer is one tile


def multiply(a, b, out, together=None) -> None:
    """out (M, N) = a (M, K) @ b (K, N). May be called by several threads at once.

    together(function, count): calls a function so many times at once; default: on threads of Python's. Where others
    wait for work beside them, as those of the kernels do, it should be these.
    """
    if out.size * len(b) < SMALLEST or len(out) <= TILE_ROWS:
        tiles = [(a, b, out)]
    else:
        tiles = [(a[row : row + TILE_ROWS], b, out[row : row + TILE_ROWS]) for row in range(0, len(out), TILE_ROWS)]
    with _one_thread as had:
        following, errors = itertools.count(), np.geterr()  # which a thread does not inherit
        threads = min(had, len(tiles), cores())
        work = partial(_multiply, tiles, following, errors)
        if threads == 1:
            work()
        else:
            (together or _together)(work, threads)


def _together(function, count) -> None:
    helpers = [_pool().submit(function) for _ in range(count - 1)]
    try:
        function()
    finally:
        wait(helpers)  # none of them writes any more
    for helper in helpers:
        helper.result()


def _multiply(tiles, following, errors) -> None:
    """Compute tiles until there are no more; `following` counts those that someone has taken."""
    with np.errstate(**errors):
        while (number := next(following)) < len(tiles):
            a, b, out = tiles[number]
            np.matmul(a, b, out=out)


class _OneThread:
    """BLAS has one thread while anybody is inside; who enters is told how many it has otherwise."""

    def __init__(self):
        self._lock, self._inside, self._had = threading.Lock(), 0, []

    def __enter__(self) -> int:
        with self._lock:
            if not self._inside:
                self._had = [(library, library.get_num_threads()) for library in _libraries()]
                self._set(lambda had: 1)
            self._inside += 1
            return max((had for _, had in self._had), default=1)

    def __exit__(self, *_):
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._set(lambda had: had)

    def _set(self, number):
        for library, had in self._had:
            if had != 1:
                library.set_num_threads(number(had))


_one_thread = _OneThread()


class Held:
    """BLAS has one thread as long as this object lives, not only within each product: OpenBLAS's own threads look for
    work for milliseconds whenever it is given them back, and take the cores from those that have some."""

    def __init__(self):
        _one_thread.__enter__()
        weakref.finalize(self, _one_thread.__exit__)


@cache
def _libraries() -> list:
    """The BLAS libraries of this process whose threads can be told."""
    return ThreadpoolController().select(user_api="blas").lib_controllers


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, cores() - 1), "tiles")


if hasattr(os, "register_at_fork"):  # a child has none of the threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
