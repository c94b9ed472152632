"""Kernels executed on the CPU for testing: one OS thread per CUDA thread, with or without a sanitizer.

    runner = Runner("my_kernels.cu", sanitizer="thread")
    runner.launch("scale", (blocks,), (256,), (x, np.float32(2), np.int64(x.size)))

Works on any CUDA source that includes no header of CUDA's; src/host/simt.h says what is modelled and what is not.
Of a .cpp, such as src/host/fast.cpp, a launch calls one exported function: grid, block, seed and pattern mean nothing.
Launches are executed by a process of its own, which CMake builds and which a broken kernel may bring down.
Linux with g++ or clang++; from a checkout, since an installed package has no CMakeLists.txt.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

from . import BackendError, source
from .launches import Launches

SANITIZERS = ("thread", "address", "undefined")
MODULE = source.DIRECTORY / "module.cu"
_ROOT = Path(__file__).parent.parent
_ALIGNMENT = 256  # of what GPU allocators return, and of the runner's buffers
_OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=1 exitcode=66",
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=0",
}


class SimtError(RuntimeError):
    """A kernel or its launch was wrong. The message is one sentence; `report` is all that the process said."""

    def __init__(self, message: str, report: str):
        super().__init__(message)
        self.report = report


class MissingSanitizer(BackendError):
    """The C++ compiler of this machine cannot link with the sanitizer."""


def _tool(name: str) -> str | None:
    """A program of this Python environment, or else of the PATH."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def _run(command: list) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise BackendError(f"`{' '.join(map(str, command))}` failed:\n{result.stdout}{result.stderr}")


def build(cuda_source=MODULE, sanitizer: str = "") -> Path:
    """Compile the runner of a CUDA source where it or its headers have changed -> the program."""
    cmake, ninja = _tool("cmake"), _tool("ninja")
    if cmake is None or not (_ROOT / "CMakeLists.txt").exists():
        raise BackendError("building the SIMT runners needs CMake and a checkout of the project")
    cuda_source = Path(cuda_source).resolve()
    name = f"{cuda_source.stem}-{hashlib.sha256(str(cuda_source).encode()).hexdigest()[:8]}"
    folder = _ROOT / "build" / "simt" / name
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    program = folder / (f"simt-{sanitizer}" if sanitizer else "simt")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # until it is closed; tests may run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        _run([cmake, "-S", _ROOT, "-B", folder, f"-DMLP_SIMT={cuda_source}", *generator])
        _run([cmake, "--build", folder, "--target", program.name])
    if not program.exists():
        raise MissingSanitizer(f"the C++ compiler has no -fsanitize={sanitizer}; install its run-time library")
    return program


@functools.cache
def _fixed_addresses() -> tuple:
    """A command that gives a program fixed addresses: ThreadSanitizer of older compilers wants them."""
    command = ("setarch", "-R")
    if shutil.which("setarch") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
        return command
    return ()


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


class Runner:
    """A process that executes the kernels of one CUDA source: see the module's docstring."""

    def __init__(self, cuda_source=MODULE, sanitizer: str = "", timeout: float = 300.0):
        """sanitizer: "", thread, address (where it can be had with undefined) or undefined; timeout: seconds that one launch may take."""
        if sanitizer and sanitizer not in SANITIZERS:
            raise ValueError(f"sanitizer must be one of {', '.join(SANITIZERS)}, got {sanitizer!r}")
        program = build(cuda_source, sanitizer)
        self._command = [*(_fixed_addresses() if sanitizer == "thread" else ()), program]
        self._timeout = timeout
        self._process = None

    def _start(self):
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=os.environ | _OPTIONS
        )

    def close(self) -> None:
        """End the process. The next launch starts another."""
        if self._process is not None:
            self._process.kill()
            with self._process, self._errors:  # closes the pipes and waits
                self._process = None

    def launch(self, name: str, grid, block, args, *, seed: int = 0, pattern: int = 0xFF) -> None:
        """Execute one launch and return when it is done, with what it wrote in the arrays.

        grid, block: one to three sizes. args: C-contiguous NumPy arrays for pointers (the same one, or views of the
        same memory, may come twice) and NumPy scalars of the parameters' sizes. seed: the order of blocks and
        threads; 0 ascending, 1 descending, else shuffled. pattern: the byte that fills shared memory at first.
        Raises SimtError where the kernel misused CUDA, a sanitizer reported, or the time is over.
        """
        if self._process is None:
            self._start()
        arrays = [a for a in args if isinstance(a, np.ndarray)]
        buffers, place = _buffers(arrays)
        message = [struct.pack("=Q", len(name)), name.encode()]
        message.append(struct.pack("=10Q", *_triple(grid), *_triple(block), seed, pattern, len(buffers), len(args)))
        for start, size in buffers:
            message += [struct.pack("=2Q", size, start % _ALIGNMENT), ctypes.string_at(start, size)]
        message += [_argument(a, place) for a in args]
        timer = threading.Timer(self._timeout, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(b"".join(message))
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what there is to read tells
        done, *results = [self._process.stdout.read(size) for size in (8, *(size for _, size in buffers))]
        timer.cancel()
        if not done:
            self._fail(name)
        _write_back(name, arrays, place, results)

    def verify(self, name: str, grid, block, args, *, outputs=(), scratch=()) -> None:
        """Execute a launch in several orders of blocks and threads, with other contents of uninitialised memory each
        time: shared memory, and the arrays among args that `outputs` and `scratch` name. Raises SimtError unless
        all arrays but the scratch end with the same bits every time; those of the last time are left in them.
        """
        arrays = [a for a in args if isinstance(a, np.ndarray)]
        begin, ends = [a.copy() for a in arrays], []
        for seed, pattern in ((0, 0xFF), (1, 0x7F), (2, 0x00)):
            for a, before in zip(arrays, begin):
                if a.flags.writeable:
                    a[...] = before
            for a in (*outputs, *scratch):
                _fill(a, pattern)
            self.launch(name, grid, block, args, seed=seed, pattern=pattern)
            ends.append([a.tobytes() for a in arrays if all(a is not s for s in scratch)])
        if any(end != ends[0] for end in ends):
            raise SimtError(f"kernel {name}: depends on uninitialised memory or on the order of blocks or threads", "")

    def _fail(self, name: str):
        process, self._process = self._process, None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        code = process.wait()
        process.stdout.close()
        self._errors.seek(0)
        report = self._errors.read().decode(errors="replace").strip()
        self._errors.close()
        lines = [x for x in report.splitlines() if x.startswith(("simt: ", "SUMMARY: ")) or ": runtime error: " in x]
        default = f"took more than {self._timeout:g} s" if code == -9 else f"ended with status {code}"
        raise SimtError(f"kernel {name}: {lines[0].removeprefix('simt: ') if lines else default}", report)


def _fill(array: np.ndarray, pattern: int) -> None:
    ctypes.memset(_address(array), pattern, array.nbytes)


def _triple(sizes) -> tuple:
    return (*sizes, 1, 1)[:3]


def _buffers(arrays: list) -> tuple[list, dict]:
    """The (address, bytes) of the memory that the arrays cover, overlapping ones together; and for each array's
    address, size its buffer and offset."""
    spans = sorted({(_address(a), a.nbytes) for a in arrays})
    buffers, place = [], {}
    for start, size in spans:
        if buffers and start < sum(buffers[-1]):
            buffers[-1] = (buffers[-1][0], max(sum(buffers[-1]), start + size) - buffers[-1][0])
        else:
            buffers.append((start, size))
        place[start, size] = (len(buffers) - 1, start - buffers[-1][0])
    return buffers, place


def _argument(value, place: dict) -> bytes:
    if isinstance(value, np.ndarray):
        if not value.flags.c_contiguous:
            raise ValueError(f"arrays must be C-contiguous, got shape {value.shape} with strides {value.strides}")
        return struct.pack("=3Q", 1, *place[_address(value), value.nbytes])
    if not isinstance(value, np.generic):
        raise TypeError(f"arguments must be NumPy arrays or scalars like np.float32(2), got {type(value).__name__}")
    return struct.pack("=2Q", 0, value.nbytes) + value.tobytes().ljust(8, b"\0")


def _write_back(name: str, arrays: list, place: dict, results: list) -> None:
    for a in arrays:
        buffer, offset = place[_address(a), a.nbytes]
        new = results[buffer][offset : offset + a.nbytes]
        if a.flags.writeable:
            ctypes.memmove(_address(a), new, a.nbytes)
        elif new != a.tobytes():
            raise SimtError(f"kernel {name}: wrote to a read-only array of shape {a.shape}", "")


class Device:
    """What launches.py needs of a device, on NumPy arrays. Launches are executed with `seed`, and new arrays and
    shared memory are filled with the byte `pattern`; `launched` names the kernels that have run."""

    def __init__(self, runner: Runner, multiprocessors: int = 2, seed: int = 0, pattern: int = 0xFF):
        self.runner, self.seed, self.pattern = runner, seed, pattern
        self._multiprocessors = multiprocessors
        self._counters = np.zeros(4096, np.uint32)
        self.launched = set()
        self.ops = Launches(self)

    def function(self, name: str, shared_bytes: int = 0):
        def call(grid, block, args):
            self.launched.add(name)
            self.runner.launch(name, grid, block, args, seed=self.seed, pattern=self.pattern)

        return call

    def multiprocessors(self) -> int:
        return self._multiprocessors

    def room(self) -> int:
        return 8  # 2048 threads, as compute capability 8.0, 9.0 and 10.0 have

    def compute_capability(self) -> int:
        return 90

    def counters(self, count: int):
        return self._counters[:count]

    def empty(self, shape, dtype=np.float32):
        array = np.empty(shape, dtype)
        _fill(array, self.pattern)
        return array

    def is_array(self, value) -> bool:
        return isinstance(value, np.ndarray)
