"""The GPU: the kernels compiled by NVRTC through cupy.RawModule, launched on CuPy arrays by launches.py.

Launches go to CuPy's current stream and never synchronise. They cannot be captured into a CUDA graph, which
would keep the address of scratch memory that has gone back to CuPy's pool.
"""

import functools
import sys
import threading

import numpy as np

from . import BackendError, source
from .launches import Launches

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)  # compute capabilities that the test suite compiles for
OPTIONS = ("-std=c++17",)
CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")  # what CuPy adds; the sources need the second

_COUNTERS = 4096


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
def function(name: str):
    """The kernel `name`, to be called with grid, block and arguments."""
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


def counters(count: int):
    """At least `count` zeros for is_last_block, which leaves them zero.

    One array per device, stream and thread: with CUDA's per-thread default stream, threads share a pointer.
    """
    cupy = _cupy()
    count = -(-count // _COUNTERS) * _COUNTERS
    stream = cupy.cuda.get_current_stream().ptr
    return _zeros(cupy.cuda.runtime.getDevice(), stream, threading.get_ident(), count)


def empty(shape, dtype=np.float32):
    """An uninitialised array on the current device: what ops.py writes results into."""
    return _cupy().empty(shape, dtype)


def is_array(value) -> bool:
    """Whether `value` is a CuPy array."""
    return isinstance(value, _cupy().ndarray)


ops = Launches(sys.modules[__name__])
