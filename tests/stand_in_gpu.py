"""A stand-in for CuPy on NumPy, so that the measuring scripts' GPU paths run without a GPU.

Array functions are NumPy's, on a subclass whose instances have `get`. A launched graph only counts; an event keeps the
host's time. It shows that the scripts call what exists, in an order that CUDA accepts; its times mean nothing.
"""

import contextlib
import inspect
import sys
import time
from types import ModuleType, SimpleNamespace

import numpy as np
import scipy.special

import kernels
from kernels import plain
from mlp.device import Device
from mlp.gemm import ArrayGemm
from mlp.products import Products


class Array(np.ndarray):
    def get(self):
        return np.array(self)

    def set(self, source, stream):
        stream.copies.append(lambda: np.copyto(self, source))

    @property
    def data(self):
        return SimpleNamespace(copy_from_device_async=lambda source, nbytes: None)


class Event:
    at = None

    def record(self, stream=None):
        self.at = time.perf_counter()

    def synchronize(self):
        assert self.at


class Graph:
    uploaded, launches = False, 0

    def upload(self, stream):
        self.uploaded = True

    def launch(self, stream):
        assert self.uploaded and not stream.capturing
        self.launches += 1


class Stream(contextlib.nullcontext):
    def __init__(self, non_blocking=False):
        super().__init__()
        self.capturing, self.graphs, self.ptr = False, [], id(self)

    def record(self):
        event = Event()
        event.record(self)
        return event

    def wait_event(self, event):
        event.synchronize()

    def begin_capture(self):
        self.capturing = True

    def end_capture(self):
        assert self.capturing
        self.capturing = False
        self.graphs.append(Graph())
        return self.graphs[-1]

    def synchronize(self):
        assert not self.capturing


class Generator:
    def __init__(self, seed):
        self._rng = np.random.default_rng(seed)

    def standard_normal(self, shape, dtype):
        return self._rng.standard_normal(shape, dtype).view(Array)

    def random(self, shape, dtype):
        return self._rng.random(shape, dtype).view(Array)


class Library:
    """Products that can be captured, with epilogues, and that compute nothing."""

    captures, workspace_bytes, version = True, 0, "12.9.3"

    @staticmethod
    def mask_shape(rows, columns):
        return rows, -(-columns // 128) * 16

    def __getattr__(self, name):
        def call(*args, **kwargs):
            pass

        call.__name__ = name
        return call


def select_products(config, device) -> Products:
    """In the place of mlp.products.select, where nvmath and a GPU are needed."""
    if not config.fused or config.gemm == "cupy":
        return Products(ArrayGemm(device.xp, config.precision), precision=config.precision)
    if config.gemm == "own":
        return Products(None, Library(), config.precision)
    return Products(Library(), None, config.precision, epilogues=True)


class Linalg(SimpleNamespace):
    """cupy._core._routines_linalg, as far as the precision of matrix products goes."""

    COMPUTE_TYPE_TF32, COMPUTE_TYPE_DEFAULT, now = "tf32", "default", "default"

    def set_compute_type(self, dtype, to):
        self.now = to

    def get_compute_type(self, dtype):
        return self.now


class CuPy(ModuleType):
    """NumPy by another name, with what CuPy has beside it. There is no ElementwiseKernel."""

    ndarray, __version__ = Array, "stand-in"

    def __init__(self):
        super().__init__("cupy")
        self.streams = []
        self.random = SimpleNamespace(default_rng=Generator)
        self.cuda = SimpleNamespace(
            Stream=self._stream, Event=Event, get_elapsed_time=lambda begin, end: (end.at - begin.at) * 1e3,
            get_current_stream=Stream, MemoryPool=lambda: SimpleNamespace(malloc=None),
            using_allocator=contextlib.nullcontext,
            runtime=SimpleNamespace(driverGetVersion=lambda: 12080, memGetInfo=lambda: (2**40, 2**40)),
            Device=lambda: SimpleNamespace(id=0, attributes={"L2CacheSize": 150_000}, synchronize=lambda: None),
        )  # fmt: skip

    def _stream(self, non_blocking=False):
        self.streams.append(Stream())
        return self.streams[-1]

    def get_default_memory_pool(self):
        return SimpleNamespace(free_all_blocks=lambda: None)

    def fuse(self):
        return lambda function: function

    def __getattr__(self, name):
        attribute = getattr(np, name)
        if inspect.isclass(attribute) or not callable(attribute) or isinstance(attribute, np.ufunc):
            return attribute

        def call(*args, **kwargs):
            result = attribute(*args, **kwargs)
            return result.view(Array) if isinstance(result, np.ndarray) else result

        return call


def install(monkeypatch) -> CuPy:
    """Put the stand-in in CuPy's place."""
    cupy = CuPy()
    modules = {
        "cupy": cupy, "cupyx": ModuleType("cupyx"), "cupyx.scipy": ModuleType("cupyx.scipy"),
        "cupyx.scipy.special": scipy.special, "cupy._core": SimpleNamespace(_routines_linalg=Linalg()),
    }  # fmt: skip
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return cupy


def device(cupy: CuPy, fused: bool) -> Device:
    return Device("cuda", "stand-in", cupy, kernels if fused else plain, chunk_rows=2048)
