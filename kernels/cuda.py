"""The GPU: the kernels as a cupy.RawModule, launched on CuPy arrays by launches.py.

They come from the fatbin beside this file where CMake built one (MLP_CUDA=ON) from the sources that lie here now,
for this GPU; otherwise NVRTC compiles them on first use, and CuPy keeps the result on disk under a hash of the text.

Launches go to CuPy's current stream and never synchronise. A CUDA graph keeps the addresses of what they are given and
of the scratch memory that they take from CuPy's pool: capture them after a first call on the same stream, under a pool
of the graph's own that lives as long as it does, as mlp/step_graph.py does.
"""

import functools
import hashlib
import json
import sys
import threading
from pathlib import Path

import numpy as np

from . import BackendError, source
from .launches import THREADS, Launches

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)  # compute capabilities that the test suite compiles for
OPTIONS = ("-std=c++17",)
CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")  # what CuPy adds; the sources need the second

FATBIN = Path(__file__).with_name("module.fatbin")  # kernels/src/fatbin.cmake makes it, and FATBIN.json about it
FATBIN_OPTIONS = (*OPTIONS, "-ftz=true")  # nvcc's
_REBUILD = "delete it, and run `make cuda` if you want it built again"

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


def _fatbin_architectures() -> list[int]:
    """What the fatbin has code for: nothing where there is none, or one of other sources or options.

    That is no error: sources change, and NVRTC compiles what they are now. A binary that is not what was built is one.
    """
    if not FATBIN.exists():
        return []
    record = Path(f"{FATBIN}.json")
    try:
        built = json.loads(record.read_text())
        current = built["sources"] == source.digest() and built["options"] == list(FATBIN_OPTIONS)
        intact = built["binary"] == hashlib.sha256(FATBIN.read_bytes()).hexdigest()
        architectures = [int(a) for a in built["architectures"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackendError(f"{FATBIN} has no readable {record.name} ({error!r}); {_REBUILD}") from None
    if current and not intact:
        raise BackendError(f"{FATBIN} is damaged: not the file that was built; {_REBUILD}")
    return architectures if current else []


def module_origin() -> str:
    """Where the kernels for CuPy's current device come from: "fatbin" or "nvrtc"."""
    capability = int(_cupy().cuda.Device().compute_capability)
    architectures = _fatbin_architectures()
    # Machine code runs on its own major version from its minor version on; the newest is there as PTX, too.
    same_major = any(a // 10 == capability // 10 and a <= capability for a in architectures)
    return "fatbin" if architectures and (same_major or capability > max(architectures)) else "nvrtc"


@functools.cache
def _module():
    # CuPy loads a RawModule into each device on first use there.
    cupy = _cupy()
    if module_origin() == "nvrtc":
        return cupy.RawModule(code=source.inlined("module.cu"), options=OPTIONS)
    module = cupy.RawModule(path=str(FATBIN))
    try:
        module.compile()  # load it, because only here it is known what to do about an error
    except cupy.cuda.driver.CUDADriverError as error:
        raise BackendError(f"the driver cannot load {FATBIN} ({error}); {_REBUILD}") from None
    return module


@functools.cache
def _kernel(name: str):
    return _module().get_function(name)


@functools.cache
def _kernel_with_shared(name: str, shared_bytes: int, device: int):
    kernel = _kernel(name)
    kernel.max_dynamic_shared_size_bytes = shared_bytes  # on the current device, `device`
    return functools.partial(kernel, shared_mem=shared_bytes)


def function(name: str, shared_bytes: int = 0):
    """The kernel `name`, to be called with grid, block and arguments; its blocks get so much dynamic shared memory."""
    if not shared_bytes:
        return _kernel(name)
    return _kernel_with_shared(name, shared_bytes, _cupy().cuda.runtime.getDevice())


@functools.cache
def _properties(device: int) -> dict:
    return _cupy().cuda.runtime.getDeviceProperties(device)


def multiprocessors() -> int:
    """The number of multiprocessors of CuPy's current device."""
    return _properties(_cupy().cuda.runtime.getDevice())["multiProcessorCount"]


def room() -> int:
    """The blocks of THREADS threads that one multiprocessor of CuPy's current device holds."""
    return _properties(_cupy().cuda.runtime.getDevice())["maxThreadsPerMultiProcessor"] // THREADS


def compute_capability() -> int:
    """That of CuPy's current device, as in ARCHITECTURES: 90 for 9.0."""
    properties = _properties(_cupy().cuda.runtime.getDevice())
    return 10 * properties["major"] + properties["minor"]


@functools.cache
def _zeros(device: int, stream: int, thread: int, count: int):
    cupy = _cupy()
    if cupy.cuda.get_current_stream().is_capturing():
        raise RuntimeError(
            "the current stream is being captured, and this op has not run on it before, expected its scratch memory "
            "to be there; run the op once on this stream before capturing"
        )
    return cupy.zeros(count, np.uint32)


def counters(count: int):
    """At least `count` zeros for is_last_block, which leaves them zero.

    One array per device, stream and thread: with CUDA's per-thread default stream, threads share a pointer.
    RuntimeError where they would be made while the stream is being captured: only the graph would zero them.
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
