"""The kernels' launches: which kernel, grid, block, scratch memory and arguments, on any device that executes them.

Launch shapes are pure functions of the problem, the number of multiprocessors and the `room` in each: the blocks
of 256 threads that it holds (4 on 7.5, 6 on 8.6, 8.9 and 12.0, 8 on 8.0, 9.0 and 10.0). So they are tested, and
used to execute the kernels thread by thread, without a GPU. They do not ask how many registers a compiler took:
the same GPU adds in the same order whoever compiled. Arguments arrive checked by ops.py.
"""

import math

import numpy as np

THREADS = 256
LEAST_THREADS = 64  # of a flat grid's block
ROW_PACKS, GATHER_WORDS = 2, 5  # that a thread of bias_act and of gather loads at once: common.cuh, batch.cuh
TILE_WIDTHS = (2, 4, 8, 16, 32)  # packs of 4 columns that a block of bias_act_backward has
ROWS_PER_THREAD = 8  # of bias_act_backward at most, where each block has all rows
# Blocks that a multiprocessor with room for them holds at once: module.cu keeps the registers within what they leave.
TILE_BLOCKS, ROWS_BLOCKS, GATHER_BLOCKS, NORM_BLOCKS, AVERAGE_BLOCKS = 4, 6, 6, 4, 6
ROW_BLOCKS = {1: 8, 2: 8, 4: 8, 8: 6, 16: 4, 32: 3, 0: 8}  # softmax_xent_<n>: up to 32 n classes in registers; 0: any
_MAX_GRID_Y = 65535


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


def flat_shape(elements: int, multiprocessors: int, room: int, packs: int = 1) -> tuple[tuple, tuple]:
    """Grid and block for a grid-stride loop over `elements` in packs of 4, of which a thread loads `packs` at once.

    Few elements are spread over all multiprocessors in smaller blocks. What one wave of full occupancy does not hold
    with one pack per thread is done with `packs` per thread, in at most 16 waves: blocks that end leave their place to
    others, which a loop would not, so that no multiprocessor has to wait for one that has more to do.
    """
    needed, threads = _divide_up(elements, 4), THREADS
    while threads > LEAST_THREADS and _divide_up(needed, threads) < 4 * multiprocessors:
        threads //= 2
    blocks, wave = _divide_up(needed, threads), room * multiprocessors
    return (max(1, min(blocks, max(wave, _divide_up(blocks, packs)), 16 * wave)),), (threads,)


def tile_shape(B: int, N: int, multiprocessors: int) -> tuple[tuple, tuple]:
    """Grid and block for column sums of (B, N): column tiles x row blocks; in a block packs of 4 columns x row groups.

    Where rows are few, each block has all of them, and tiles are as narrow as two per multiprocessor allow; the
    narrowest has the 32 bytes of a row that memory transfers at least. Otherwise tiles have up to 128 columns, and
    partial sums of row blocks meet in the last one, which takes as long as three loads: at most one wave, because one
    block more would double the time; but every tile has a block.
    """
    packs = max(1, _divide_up(N, 4))
    width = next((w for w in TILE_WIDTHS if _divide_up(packs, w) <= 2 * multiprocessors), TILE_WIDTHS[-1])
    if B <= ROWS_PER_THREAD * (THREADS // width):
        return (_divide_up(packs, width), 1), (width, THREADS // width)
    tiles = _divide_up(packs, TILE_WIDTHS[-1])
    width = 2 * _divide_up(packs, 2 * tiles)
    row_blocks = min(_divide_up(B, THREADS // width), TILE_BLOCKS * multiprocessors // tiles, _MAX_GRID_Y)
    return (_divide_up(packs, width), max(1, row_blocks)), (width, THREADS // width)


def softmax_items(C: int) -> int:
    """The n of the softmax_xent_<n> whose registers hold C classes, or of the one that needs none, 0."""
    return next((n for n in ROW_BLOCKS if C <= 32 * n), 0)


def row_shape(B: int, C: int, multiprocessors: int, room: int) -> tuple[tuple, tuple]:
    """Grid and block for one warp per row of C classes: at most one wave."""
    resident = min(ROW_BLOCKS[softmax_items(C)], room)
    return (max(1, min(_divide_up(B, THREADS // 32), resident * multiprocessors)),), (THREADS,)


def _pointer(array):
    """A kernel argument for an array that may be None."""
    return np.uintp(0) if array is None else array


def _halves(seed: int) -> tuple:
    """The low and the high 32 bits of a seed."""
    return np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32)


def _norm(norm) -> tuple:
    """The arguments of a normalisation, or of none."""
    return *map(_pointer, norm[:3]), np.float32(norm.eps)


class Launches:
    """The ops on a device: what `function(name, shared_bytes=0)` gives is called with grid, block and arguments,
    `multiprocessors()` is their number, `room()` the blocks of THREADS threads that one holds, `empty(shape, dtype)` an
    uninitialised array, `counters(count)` zeros that the kernels leave zero, and `is_array(value)` tells its arrays
    from numbers."""

    def __init__(self, device):
        self._device = device
        self.empty = device.empty

    def _flat_shape(self, elements, packs=1, blocks=8):
        return flat_shape(elements, self._device.multiprocessors(), min(blocks, self._device.room()), packs)

    def _tiles(self, B, N, sums):
        """Grid and block for column sums of (B, N), and scratch memory for `sums` of them per column, as arguments."""
        grid, block = tile_shape(B, N, self._device.multiprocessors())
        if grid[1] == 1:
            return grid, block, (np.uintp(0), np.uintp(0))
        return grid, block, (self.empty((sums, grid[1], N)), self._device.counters(grid[0]))

    def bias_act(self, z, bias, activation, y):
        grid, block = self._flat_shape(z.size, ROW_PACKS, ROWS_BLOCKS)
        args = z, bias, y, np.int64(z.shape[0]), np.int64(z.shape[1])
        self._device.function(f"bias_act_{activation}")(grid, block, args)

    def bias_act_backward(self, dy, saved, bias, activation, dz, dbias):
        B, N = dy.shape
        grid, block, scratch = self._tiles(B, N, 1)
        unchanged = activation == "identity" and dz is dy  # only the column sums are wanted
        self._device.function(f"bias_act_backward_{activation}")(
            grid, block,
            (dy, saved, _pointer(bias), _pointer(None if unchanged else dz), dbias, *scratch, np.int64(B), np.int64(N)),
        )  # fmt: skip

    def softmax_cross_entropy(self, logits, labels, C, scale, smoothing, weights, dlogits, loss, totals, confusion):
        B, N = logits.shape
        grid, block = row_shape(B, C, self._device.multiprocessors(), self._device.room())
        self._device.function(f"softmax_xent_{softmax_items(C)}")(
            grid, block,
            (logits, labels, dlogits, loss, _pointer(totals), _pointer(confusion), self.empty((grid[0], 2)),
             self._device.counters(1), np.int64(B), np.int32(C), np.int32(N), np.float32(scale),
             np.float32(1.0 - smoothing), np.float32(smoothing / C), _pointer(weights)),
        )  # fmt: skip

    def _scalar(self, value):
        """(value, pointer) for a scalar that is a number, or an array whose element the kernel reads."""
        if self._device.is_array(value):
            return np.float32(0), value
        return np.float32(value), np.uintp(0)

    def adam_step(self, p, g, m, v, step, lr, beta1, beta2, eps, weight_decay, decoupled):
        grid, block = self._flat_shape(p.size)
        self._device.function("adam")(
            grid, block,
            (p, g, m, v, np.int64(p.size), *self._scalar(step), *self._scalar(lr), np.float32(1.0 - beta1),
             np.float32(1.0 - beta2), np.float32(eps), np.float32(weight_decay), np.int32(decoupled)),
        )  # fmt: skip

    def sgd_step(self, p, g, velocity, lr, momentum, weight_decay):
        grid, block = self._flat_shape(p.size)
        self._device.function("sgd")(
            grid, block,
            (p, g, _pointer(velocity), np.int64(p.size), *self._scalar(lr), np.float32(momentum),
             np.float32(weight_decay)),
        )  # fmt: skip

    def average_step(self, average, p, decay, step):
        grid, block = self._flat_shape(p.size, blocks=AVERAGE_BLOCKS)
        args = average, p, np.int64(p.size), np.float32(1.0 - decay), *self._scalar(step)
        self._device.function("average")(grid, block, args)

    def gather_batch(self, images, labels, numbers, index, offset, draw, affine, x, y, mean, scale, noise_sigma,
                     noise_uniform, augment, seed):  # fmt: skip
        (M, D), B = images.shape, x.shape[0]
        as_they_are = affine is None and augment is None and noise_sigma == 0
        grid, block = self._flat_shape(B * 4 * _divide_up(D, 4), GATHER_WORDS if as_they_are else 1, GATHER_BLOCKS)
        sizes = np.int64(B), np.int64(index.size), np.int64(M), np.int32(D)
        normalisation = np.float32(mean), np.float32(scale)
        if as_they_are:
            args = images, labels, index, _pointer(offset), x, y, *sizes, *normalisation
            self._device.function("gather")(grid, block, args)
            return
        self._device.function("gather_augmented")(
            grid, block,
            (images, labels, _pointer(numbers), index, _pointer(offset), _pointer(draw), _pointer(affine), x, y, *sizes,
             np.int32(math.isqrt(D)), *normalisation, np.float32(noise_sigma), np.int32(noise_uniform),
             np.int32(augment is not None), *map(np.float32, augment or (0, 0, 0, 0)), *_halves(seed)),
        )  # fmt: skip

    def shuffle(self, index, out, seed, epoch):
        grid, block = self._flat_shape(index.size)
        args = index, out, np.int64(index.size), *_halves(seed), np.uint32(epoch)
        self._device.function("shuffle")(grid, block, args)

    def advance(self, offset, by, step):
        self._device.function("advance")((1,), (1,), (offset, np.int64(by), _pointer(step)))

    def to_bfloat16(self, x, y):
        grid, block = self._flat_shape(x.size)
        self._device.function("to_bfloat16")(grid, block, (x, y, np.int64(x.size)))

    def batch_norm_stats(self, z, mean, var, running_mean, running_var, momentum):
        B, N = z.shape
        grid, block, scratch = self._tiles(B, N, 2)
        self._device.function("batch_norm_stats")(
            grid, block,
            (z, mean, var, _pointer(running_mean), _pointer(running_var), np.float32(momentum), *scratch, np.int64(B),
             np.int64(N)),
        )  # fmt: skip

    def _dropout(self, d):
        place = *self._scalar(d.step), np.uint32(d.layer), np.uint32(d.row)
        return np.uint32(d.threshold), np.float32(d.scale), *_halves(d.seed), *place

    def norm_act(self, z, bias, activation, norm, dropout, y):
        grid, block = self._flat_shape(z.size, ROW_PACKS, NORM_BLOCKS)
        self._device.function(f"norm_act_{activation}")(
            grid, block,
            (z, bias, *_norm(norm), y, np.int64(z.shape[0]), np.int64(z.shape[1]), *self._dropout(dropout)),
        )  # fmt: skip

    def norm_act_backward(self, dy, z, bias, activation, norm, dropout, dz, bias_grad, weight_grad):
        B, N = np.int64(dy.shape[0]), np.int64(dy.shape[1])
        grid, block, scratch = self._tiles(*dy.shape, 1 if norm.mean is None else 2)
        self._device.function(f"norm_act_backward_{activation}")(
            grid, block,
            (dy, z, bias, *_norm(norm), dz, bias_grad, _pointer(weight_grad), *scratch, B, N, *self._dropout(dropout)),
        )  # fmt: skip
        if norm.mean is not None:
            grid, block = self._flat_shape(dy.size, ROW_PACKS, NORM_BLOCKS)
            args = z, *_norm(norm), bias_grad, weight_grad, dz, B, N
            self._device.function("norm_input_gradient")(grid, block, args)
