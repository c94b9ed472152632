"""Back ends for the kernel tests. Tests marked `gpu` are skipped, with the reason, where there is no GPU."""

import functools

import numpy as np
import pytest

import kernels
from kernels import cuda, host, plain, simt

from .backends import simt_backend
from .checks import Backend


@functools.cache
def _missing_gpu() -> str:
    """Why the GPU tests cannot run, or an empty string."""
    try:
        cuda.check()
    except kernels.BackendError as error:
        return str(error)
    return ""


def pytest_addoption(parser):
    parser.addoption("--every-case", action="store_true", help="all cases under the sanitizers, and nvcc (minutes)")


@pytest.fixture
def every_case(request) -> bool:
    return request.config.getoption("--every-case")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and _missing_gpu():
            item.add_marker(pytest.mark.skip(reason=_missing_gpu()))


def _skip_without_sanitizer():
    try:
        return (yield)
    except simt.MissingSanitizer as error:
        pytest.skip(str(error))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    return (yield from _skip_without_sanitizer())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from _skip_without_sanitizer())


def _backend(place: str, ops) -> Backend:
    if place == "simt":
        return simt_backend()
    if place == "host":
        return Backend(place, np, ops)
    import cupy

    return Backend(place, cupy, ops, device=cuda)


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
