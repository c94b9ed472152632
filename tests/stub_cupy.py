"""A stand-in for CuPy that records which module cuda.py loads, and a copy of the sources to edit. No GPU is needed."""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from kernels import cuda, source


class DriverError(Exception):
    pass


class StubKernel:
    """A launch returns its arguments; `limits` are the sizes of dynamic shared memory that were allowed."""

    def __init__(self, name):
        self.name, self.limits = name, []

    def __setattr__(self, name, value):
        if name == "max_dynamic_shared_size_bytes":
            self.limits.append(value)
        super().__setattr__(name, value)

    def __call__(self, *args, **keywords):
        return args, keywords


class StubCuPy:
    """What cuda.py asks of CuPy; `loaded` is what the next kernel comes from, as keywords of RawModule."""

    def __init__(self):
        self.capability, self.error, self.loaded, self.device = "90", None, None, 0
        self.cuda = SimpleNamespace(
            Device=lambda: SimpleNamespace(compute_capability=self.capability),
            driver=SimpleNamespace(CUDADriverError=DriverError),
            runtime=SimpleNamespace(getDevice=lambda: self.device),
        )

    def RawModule(self, **keywords):
        self.loaded = keywords
        return SimpleNamespace(compile=self._compile, get_function=StubKernel)

    def _compile(self):
        if self.error:
            raise self.error

    def load(self):
        """Forget all that was loaded, as a new process has, and load a kernel."""
        self.loaded = None
        forget()
        cuda.function("adam")
        return self.loaded


def forget():
    """What cuda.py has loaded."""
    for remembered in (cuda._module, cuda._kernel, cuda._kernel_with_shared):
        remembered.cache_clear()


@pytest.fixture
def cupy(monkeypatch, tmp_path):
    """A stand-in for CuPy; the sources and the fatbin lie in tmp_path."""
    shutil.copytree(source.DIRECTORY, tmp_path / "kernels" / "src")
    stub = StubCuPy()
    monkeypatch.setattr(cuda, "_cupy", lambda: stub)
    monkeypatch.setattr(cuda, "FATBIN", tmp_path / "kernels" / "module.fatbin")
    monkeypatch.setattr(source, "DIRECTORY", tmp_path / "kernels" / "src")
    yield stub
    forget()


def record() -> Path:
    return Path(f"{cuda.FATBIN}.json")


def write_fatbin(**changes):
    binary = b"machine code"
    cuda.FATBIN.write_bytes(binary)
    built = {
        "sources": source.digest(),
        "options": list(cuda.FATBIN_OPTIONS),
        "architectures": list(cuda.ARCHITECTURES),
        "binary": hashlib.sha256(binary).hexdigest(),
    }
    record().write_text(json.dumps(built | changes))


def edit_header():
    """A change that changes the machine code."""
    header = source.DIRECTORY / "bias_act.cuh"
    text = header.read_text()
    assert "slope = 0.01f" in text
    header.write_text(text.replace("slope = 0.01f", "slope = 0.03f"))


def assert_compiled_now(cupy, contains=""):
    loaded = cupy.load()
    assert cuda.module_origin() == "nvrtc"
    assert loaded == {"code": source.inlined("module.cu"), "options": cuda.OPTIONS}
    assert contains in loaded["code"]


def assert_fatbin(cupy):
    assert cupy.load() == {"path": str(cuda.FATBIN)}
    assert cuda.module_origin() == "fatbin"
