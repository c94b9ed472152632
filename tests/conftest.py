"""Back ends for the kernel tests. Tests marked `gpu` are skipped, with the reason, where there is no GPU."""

import functools
from unittest import mock

import numpy as np
import pytest

import kernels
from kernels import cuda, host, plain, simt

from .checks import FEW_SHAPES, Backend


@functools.cache
def _missing_gpu() -> str:
    """Why the GPU tests cannot run, or an empty string."""
    try:
        cuda.check()
    except kernels.BackendError as error:
        return str(error)
    return ""


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and _missing_gpu():
            item.add_marker(pytest.mark.skip(reason=_missing_gpu()))


class SimtOps:
    """The ops of `kernels`, with NumPy arrays handed to a SIMT device instead of the host library."""

    def __init__(self, device: simt.Device):
        self.device = device
        for name in kernels.__all__:
            if callable(getattr(kernels, name)):
                setattr(self, name, functools.partial(self._call, getattr(kernels, name)))

    def _call(self, op, *args, **settings):
        with mock.patch.object(kernels.ops, "_host", lambda: self.device.ops):
            return op(*args, **settings)


@functools.cache
def simt_ops(sanitizer: str = "") -> SimtOps:
    """The ops on a SIMT device, one for the whole session."""
    return SimtOps(simt.Device(simt.Runner(sanitizer=sanitizer)))


def _backend(place: str, ops) -> Backend:
    if place == "simt":
        return Backend(place, np, simt_ops(), FEW_SHAPES)
    if place == "host":
        return Backend(place, np, ops)
    import cupy

    return Backend(place, cupy, ops)


_PLACES = (pytest.param("host", id="host"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu))
_FORMS = (
    pytest.param(("host", kernels), id="fused-host"),
    pytest.param(("simt", kernels), id="fused-simt"),
    pytest.param(("host", plain), id="plain-host"),
    pytest.param(("cuda", kernels), id="fused-cuda", marks=pytest.mark.gpu),
    pytest.param(("cuda", plain), id="plain-cuda", marks=pytest.mark.gpu),
)


@pytest.fixture(params=_PLACES)
def backend(request) -> Backend:
    """The compiled ops, on NumPy arrays and on CuPy arrays."""
    return _backend(request.param, kernels)


@pytest.fixture
def host_backend() -> Backend:
    """The compiled ops on NumPy arrays, for what concerns the CPU alone."""
    return _backend("host", kernels)


@pytest.fixture(params=_FORMS)
def form(request) -> Backend:
    """The compiled ops, on NumPy arrays by the host library and thread by thread, on CuPy arrays; and the plain ops."""
    return _backend(*request.param)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(2024)


@pytest.fixture
def set_threads():
    """kernels.host.set_threads; afterwards the number of threads is what a fresh process would use."""
    yield host.set_threads
    host.set_threads(host._default_threads())
