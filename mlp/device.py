"""Where a run computes: the array module, the ops, and what is particular to a CPU or a GPU."""

import platform
from dataclasses import dataclass
from types import ModuleType

import numpy as np

import kernels
from kernels import BackendError, plain

from . import InputError, one_line
from .distributed import is_job, own_gpu


@dataclass(frozen=True)
class Device:
    kind: str  # "cpu" or "cuda"
    name: str
    xp: ModuleType  # numpy or cupy
    ops: ModuleType  # kernels or kernels.plain
    chunk_rows: int  # larger batches are accumulated in chunks of this many rows

    def synchronize(self) -> None:
        """Wait for all streams of the GPU; nothing on a CPU."""
        if self.kind == "cuda":
            self.xp.cuda.Device().synchronize()

    @property
    def fused(self) -> bool:
        """Whether the ops are the compiled kernels."""
        return self.ops is kernels

    def free_bytes(self) -> int | None:
        """The memory that is free on the GPU now; None on a CPU."""
        return self.xp.cuda.runtime.memGetInfo()[0] if self.kind == "cuda" else None

    def release_memory(self) -> None:
        """Give back what CuPy keeps of memory that nobody uses any more."""
        if self.kind == "cuda":
            self.xp.get_default_memory_pool().free_all_blocks()
            self.xp.get_default_pinned_memory_pool().free_all_blocks()

    def numpy(self, array) -> np.ndarray:
        """A host copy of a device array; on a CPU the array itself."""
        return array.get() if self.kind == "cuda" else array


def select(kind: str, fused: bool) -> Device:
    """The device for `--device` and `--fused`. auto: the GPU where there is one. InputError where it cannot be had."""
    if kind in ("auto", "cuda"):
        from kernels import cuda

        try:
            cuda.check()
            return _gpu(fused)
        except BackendError as error:
            if kind == "cuda":
                raise InputError(f"--device cuda is not possible: {error}") from None
    if fused:
        check_kernels("cpu")
    return Device("cpu", cpu_name(), np, kernels if fused else plain, chunk_rows=2048)


def check_kernels(kind: str) -> None:
    """InputError unless our kernels can be used on a device of this kind."""
    from kernels import cuda, host

    try:
        (cuda if kind == "cuda" else host).check()
    except BackendError as error:
        raise InputError(f"--fused is not possible: {error}") from None


def _gpu(fused: bool) -> Device:
    import cupy

    if is_job():
        cupy.cuda.Device(own_gpu(cupy.cuda.runtime.getDeviceCount())).use()
    try:
        one = cupy.ones((1, 1))
        (one @ one).sum().item()  # a kernel and a matrix product: finds CUDA libraries that are missing or do not fit
    except Exception as error:
        reason = one_line(error)
        raise InputError(
            f"the GPU cannot be used ({reason}); try `pip install 'cupy-cuda12x[ctk]'`, or give --device cpu"
        ) from None
    name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())["name"].decode()
    return Device("cuda", name, cupy, kernels if fused else plain, chunk_rows=16384)


def cpu_name() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
