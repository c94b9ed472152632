"""The ops of `kernels` executed by runner processes (kernels/simt.py) instead of in this one."""

import ctypes
import functools
from pathlib import Path
from unittest import mock

import numpy as np

import kernels
from kernels import host, simt

from .checks import FEW_SHAPES, Backend

OPS = [name for name in kernels.__all__ if callable(getattr(kernels, name)) and name != "BackendError"]
HOST_SOURCE = Path(__file__).parent / "host" / "planted.cpp"
_C_TYPES = {
    ctypes.c_void_p: lambda x: np.uintp(0) if x is None else x,
    ctypes.c_longlong: np.int64,
    ctypes.c_int: np.int32,
    ctypes.c_float: np.float32,
    ctypes.c_uint: np.uint32,
}


class SimtOps:
    """The ops, with NumPy arrays handed to a SIMT device instead of the host library."""

    def __init__(self, device: simt.Device):
        self.device = device
        for name in OPS:
            setattr(self, name, functools.partial(self._call, getattr(kernels, name)))

    def _call(self, op, *args, **settings):
        with mock.patch.object(kernels.dispatch, "_host", lambda: self.device.ops):
            return op(*args, **settings)


class HostOps:
    """The ops, with the functions of the host library called in a runner of HOST_SOURCE.

    helpers: how many threads take part beside the caller; serve_blas: whether they stay awake between ops.
    """

    def __init__(self, runner: simt.Runner, helpers: int, serve_blas: bool):
        self.runner, self.helpers, self.serve_blas = runner, helpers, serve_blas
        for name in OPS:
            setattr(self, name, functools.partial(self._call, getattr(kernels, name)))

    def _call(self, op, *args, **settings):
        with mock.patch.multiple(host, _function=self._function, _pointer=lambda array: array):
            return op(*args, **settings)

    def _function(self, name, activation=""):
        def call(*args):
            self.launch("kernels_set_helpers", np.int32(self.helpers))
            self.launch("kernels_serve_blas", np.int32(self.serve_blas), np.int32(self.helpers))
            types = host._SIGNATURES[name]
            self.launch(name + activation, *(_C_TYPES[t](a) for t, a in zip(types, args, strict=True)))

        return call

    def launch(self, name, *args):
        self.runner.launch(name, (1,), (1,), args)


@functools.cache
def simt_backend(sanitizer: str = "", seed: int = 0, pattern: int = 0xFF) -> Backend:
    """The ops executed thread by thread, on one device for the whole session."""
    device = simt.Device(simt.Runner(sanitizer=sanitizer), seed=seed, pattern=pattern)
    return Backend("simt", np, SimtOps(device), FEW_SHAPES, device)


@functools.cache
def host_runner(sanitizer: str) -> simt.Runner:
    return simt.Runner(HOST_SOURCE, sanitizer, timeout=60)


def host_runner_backend(sanitizer: str, helpers: int = 3, serve_blas: bool = True) -> Backend:
    """The ops of the fast host library, compiled with a sanitizer."""
    return Backend("host runner", np, HostOps(host_runner(sanitizer), helpers, serve_blas))
