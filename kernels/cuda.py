"""GPU back end: the kernels compiled by NVRTC through cupy.RawModule, called on CuPy arrays.

Arguments arrive checked by ops.py. Launch shapes are pure functions of the problem and the number of
multiprocessors, so that they can be tested, and used to execute the kernels, without a GPU. Launches go to
CuPy's current stream and never synchronise. They cannot be captured into a CUDA graph, which would keep the
address of scratch memory that has gone back to CuPy's pool.
"""

import functools
import threading

import numpy as np

from . import BackendError, source

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)  # compute capabilities that the test suite compiles for
OPTIONS = ("-std=c++17",)
CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")  # what CuPy adds; the sources need the second

THREADS = 256
TILE_COLUMNS, TILE_ROWS = 128, 8  # bias_act_backward; the same numbers as in bias_act.cuh
REGISTER_ROWS = (1, 2, 4, 8, 16, 32)  # softmax_xent_<n> holds rows of up to 32 n classes in registers
_MAX_GRID_Y = 65535
_COUNTERS = 4096


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


def flat_shape(elements: int, multiprocessors: int) -> tuple[tuple, tuple]:
    """Grid and block for a grid-stride loop over `elements` in packs of 4: at most 4 waves of full occupancy."""
    blocks = _divide_up(_divide_up(elements, 4), THREADS)
    return (max(1, min(blocks, 32 * multiprocessors)),), (THREADS,)


def tile_shape(B: int, N: int, multiprocessors: int) -> tuple[tuple, tuple]:
    """Grid and block for column sums of (B, N): column tiles x row blocks, about 4 blocks per multiprocessor."""
    tiles = max(1, _divide_up(N, TILE_COLUMNS))
    row_blocks = min(_divide_up(B, TILE_ROWS), _divide_up(4 * multiprocessors, tiles), _MAX_GRID_Y)
    return (tiles, max(1, row_blocks)), (TILE_COLUMNS // 4, TILE_ROWS)


def row_shape(B: int, multiprocessors: int) -> tuple[tuple, tuple]:
    """Grid and block for one warp per row: at most one wave of full occupancy."""
    return (max(1, min(_divide_up(B, THREADS // 32), 8 * multiprocessors)),), (THREADS,)


def softmax_kernel(C: int) -> str:
    """The name of the softmax kernel whose registers hold C classes, or of the one that needs none."""
    return f"softmax_xent_{next((items for items in REGISTER_ROWS if C <= 32 * items), 0)}"


@functools.cache
def _cupy():
    try:
        import cupy
    except ImportError as error:
        raise BackendError(f"CuPy cannot be imported ({error}); run `pip install 'cupy-cuda12x[ctk]'`") from None
    return cupy


def check() -> None:
    """Raise BackendError unless CuPy is installed and sees a GPU."""
    cupy = _cupy()
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise BackendError(f"CuPy {cupy.__version__} finds no usable GPU or driver ({error})") from None
    if count == 0:
        raise BackendError(f"CuPy {cupy.__version__} finds no GPU")


def check_device(name: str, array) -> None:
    """Raise ValueError unless the array is on CuPy's current device, where the launch goes."""
    current = _cupy().cuda.runtime.getDevice()
    if array.device.id != current:
        raise ValueError(
            f"{name} must be on the current device, GPU {current}, got GPU {array.device.id}; "
            f"use `with cupy.cuda.Device({array.device.id}):`"
        )


@functools.cache
def _module():
    # CuPy loads a RawModule into each device on first use there, and keeps the binary in its disk cache.
    return _cupy().RawModule(code=source.inlined("module.cu"), options=OPTIONS)


@functools.cache
def _function(name: str):
    return _module().get_function(name)


@functools.cache
def _multiprocessors(device: int) -> int:
    return _cupy().cuda.runtime.getDeviceProperties(device)["multiProcessorCount"]


def multiprocessors() -> int:
    """The number of multiprocessors of CuPy's current device."""
    return _multiprocessors(_cupy().cuda.runtime.getDevice())


@functools.cache
def _zeros(device: int, stream: int, thread: int, count: int):
    return _cupy().zeros(count, np.uint32)


def _counters(count: int):
    """At least `count` zeros for is_last_block, which leaves them zero.

    One array per device, stream and thread: with CUDA's per-thread default stream, threads share a pointer.
    """
    cupy = _cupy()
    count = _COUNTERS * _divide_up(count, _COUNTERS)
    stream = cupy.cuda.get_current_stream().ptr
    return _zeros(cupy.cuda.runtime.getDevice(), stream, threading.get_ident(), count)


def _pointer(array):
    """A kernel argument for an array that may be None."""
    return np.uintp(0) if array is None else array


def empty(shape, dtype=np.float32):
    """An uninitialised array on the current device: what ops.py writes results into."""
    return _cupy().empty(shape, dtype)


def bias_act(z, bias, activation, y):
    grid, block = flat_shape(z.size, multiprocessors())
    _function(f"bias_act_{activation}")(grid, block, (z, bias, y, np.int64(z.shape[0]), np.int64(z.shape[1])))


def bias_act_backward(dy, saved, bias, activation, dz, dbias):
    B, N = dy.shape
    grid, block = tile_shape(B, N, multiprocessors())
    partial = empty((grid[1], N)) if grid[1] > 1 else None
    unchanged = activation == "identity" and dz is dy  # only the column sums are wanted
    _function(f"bias_act_backward_{activation}")(
        grid, block,
        (dy, saved, _pointer(bias), _pointer(None if unchanged else dz), dbias, _pointer(partial),
         _counters(grid[0]), np.int64(B), np.int64(N)),
    )  # fmt: skip


def softmax_cross_entropy(logits, labels, scale, dlogits, loss, totals):
    B, C = logits.shape
    grid, block = row_shape(B, multiprocessors())
    _function(softmax_kernel(C))(
        grid, block,
        (logits, labels, dlogits, loss, _pointer(totals), empty((grid[0], 2)), _counters(1),
         np.int64(B), np.int32(C), np.float32(scale)),
    )  # fmt: skip


def _scalar(value):
    """(value, pointer) for a scalar that is a number, or an array whose element the kernel reads."""
    if isinstance(value, _cupy().ndarray):
        return np.float32(0), value
    return np.float32(value), np.uintp(0)


def adam_step(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay, decoupled):
    grid, block = flat_shape(p.size, multiprocessors())
    _function("adam")(
        grid, block,
        (p, g, m, v, np.int64(p.size), *_scalar(step), *_scalar(lr), np.float32(1.0 - beta1),
         np.float32(1.0 - beta2), np.float32(eps), np.float32(weight_decay), np.int32(decoupled)),
    )  # fmt: skip


def sgd_step(p, g, velocity, lr, momentum, weight_decay):
    grid, block = flat_shape(p.size, multiprocessors())
    _function("sgd")(
        grid, block,
        (p, g, _pointer(velocity), np.int64(p.size), *_scalar(lr), np.float32(momentum), np.float32(weight_decay)),
    )  # fmt: skip


def gather_batch(images, labels, index, affine, out_x, out_y, side, mean, scale, noise_sigma, seed):
    grid, block = flat_shape(index.size * 4 * _divide_up(images.shape[1], 4), multiprocessors())
    _function("gather")(
        grid, block,
        (images, labels, index, _pointer(affine), out_x, out_y, np.int64(index.size), np.int64(images.shape[0]),
         np.int32(images.shape[1]), np.int32(side), np.float32(mean), np.float32(scale), np.float32(noise_sigma),
         np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32)),
    )  # fmt: skip
