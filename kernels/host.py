"""CPU back end: the kernels compiled by CMake for the host, called through ctypes on NumPy arrays.

Arguments arrive checked by ops.py. The library lies beside this file; it must have been built from the
sources that lie here now.
"""

import ctypes
import functools
import math
import os
from pathlib import Path

import numpy as np

from . import BackendError, source

LIBRARY = Path(__file__).parent / "libkernels_host.so"

_P, _L, _I, _F, _U = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int, ctypes.c_float, ctypes.c_uint
_SIGNATURES = {
    "bias_act_": [_P, _P, _P, _L, _L],
    "bias_act_backward_": [_P, _P, _P, _P, _P, _L, _L],
    "softmax_xent": [_P, _P, _P, _P, _P, _P, _L, _I, _I, _F, _F, _F, _P],
    "adam": [_P, _P, _P, _P, _L, _F, _F, _F, _F, _F, _F, _I],
    "sgd": [_P, _P, _P, _L, _F, _F, _F],
    "average": [_P, _P, _L, _F, _F],
    "gather": [*[_P] * 9, _L, _L, _L, _I, _I, _F, _F, _F, _I, _I, _F, _F, _F, _F, _U, _U],
    "shuffle": [_P, _P, _L, _U, _U, _U],
    "advance": [_P, _L, _P],
    "to_bfloat16": [_P, _P, _L],
    "kernels_run_blas": [_I, _P, _I, ctypes.c_size_t, _P, _I],
    "batch_norm_stats": [_P, _P, _P, _P, _P, _F, _L, _L],
    "norm_act_": [_P, _P, _P, _P, _P, _F, _P, _L, _L, _U, _F, _U, _U, _F, _U, _U],
    "norm_act_backward_": [_P, _P, _P, _P, _P, _P, _F, _P, _P, _P, _L, _L, _U, _F, _U, _U, _F, _U, _U],
}


@functools.cache
def _library() -> ctypes.CDLL:
    """Load the library once; BackendError where it is missing, unloadable or built from other sources."""
    if not LIBRARY.exists():
        raise BackendError(f"the fused CPU kernels are not built: {LIBRARY} is missing; run `make build`")
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise BackendError(f"{LIBRARY} cannot be loaded ({error}); run `make build`") from None
    source_hash = getattr(library, "kernels_source_hash", None)
    if source_hash is not None:
        source_hash.restype = ctypes.c_char_p
    if source_hash is None or source_hash().decode() != source.digest():
        raise BackendError(f"{LIBRARY} was built from other sources than {source.DIRECTORY}; run `make build`")
    set_threads(_default_threads(), library)
    if os.environ.get("KERNELS_SHARE_BLAS", "1") != "0":
        share_blas_threads(True, library)
    return library


# The setter's name in NumPy's own wheels (64-bit integers, prefixed), in other 64-bit builds, and in plain ones.
_OPENBLAS_NAMES = ("scipy_openblas_{}64_", "openblas_{}64_", "openblas_{}")


def share_blas_threads(yes: bool, library: ctypes.CDLL | None = None) -> bool:
    """Let NumPy's OpenBLAS run its jobs on this library's threads, or give it back its own.

    Two pools in one process take the cores from each other. Returns whether they are shared now: False where
    NumPy uses another BLAS. The environment variable KERNELS_SHARE_BLAS=0 keeps them apart from the start.
    """
    library = library or _library()
    core = np._core if hasattr(np, "_core") else np.core  # NumPy 2, NumPy 1
    numpy_library = ctypes.CDLL(core._multiarray_umath.__file__)  # a symbol search reaches what it links
    for name in _OPENBLAS_NAMES:
        setter = getattr(numpy_library, name.format("set_threads_callback_function"), None)
        threads = getattr(numpy_library, name.format("get_num_threads"), None)
        if setter is None or threads is None:
            continue
        setter.argtypes, setter.restype = [_P], None
        if yes:
            library.kernels_serve_blas(1, threads() - 1)
        setter(ctypes.cast(library.kernels_run_blas, _P) if yes else None)
        if not yes:
            library.kernels_serve_blas(0, 0)
        return yes
    return False


_JOB = ctypes.CFUNCTYPE(None, ctypes.c_int, _P, ctypes.c_int)


def together(function, count: int) -> None:
    """Call function() `count` times at once: one time here, the others on this library's threads. An exception is
    raised here, after all have come to an end."""
    problems = []

    @_JOB
    def job(*_):
        try:
            function()
        except BaseException as problem:  # which must not pass through C++
            problems.append(problem)

    _function("kernels_run_blas")(1, job, count, 0, None, 0)
    if problems:
        raise problems[0]


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _default_threads() -> int:
    """KERNELS_NUM_THREADS, else the number of cores."""
    value = os.environ.get("KERNELS_NUM_THREADS", str(cores()))
    if not value.isdecimal() or int(value) < 1:
        raise BackendError(f"KERNELS_NUM_THREADS={value!r} is not a positive whole number")
    return int(value)


def set_threads(threads: int, library: ctypes.CDLL | None = None) -> None:
    """Let large ops use up to `threads` threads, the caller's among them. Results do not depend on it."""
    (library or _library()).kernels_set_helpers(ctypes.c_int(threads - 1))


@functools.cache
def _function(name: str, activation: str = ""):
    function = getattr(_library(), name + activation)
    function.argtypes = _SIGNATURES[name]
    function.restype = None
    return function


def _number(value) -> float:
    """A number, also from an array of one element."""
    return float(value.item() if isinstance(value, np.ndarray) else value)


def _pointer(array):
    """The address of an array's first element; of None, null."""
    if array is None:
        return None
    if array.flags.writeable and array.size:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # three times as fast as the line below
    return array.__array_interface__["data"][0]


def check() -> None:
    """Raise BackendError unless the library is there, loads and matches the sources."""
    _library()


def bias_act(z, bias, activation, y):
    _function("bias_act_", activation)(_pointer(z), _pointer(bias), _pointer(y), *z.shape)


def bias_act_backward(dy, saved, bias, activation, dz, dbias):
    _function("bias_act_backward_", activation)(
        _pointer(dy), _pointer(saved), _pointer(bias), _pointer(dz), _pointer(dbias), *dy.shape
    )


def softmax_cross_entropy(logits, labels, C, scale, smoothing, weights, dlogits, loss, totals, confusion):
    B, N = logits.shape
    _function("softmax_xent")(
        _pointer(logits), _pointer(labels), _pointer(dlogits), _pointer(loss), _pointer(totals), _pointer(confusion),
        B, C, N, scale, 1.0 - smoothing, smoothing / C, _pointer(weights),
    )  # fmt: skip


def adam_step(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay, decoupled):
    _function("adam")(
        _pointer(p), _pointer(g), _pointer(m), _pointer(v), p.size,
        _number(step), _number(lr), 1.0 - beta1, 1.0 - beta2, eps, weight_decay, int(decoupled),
    )  # fmt: skip


def sgd_step(p, g, velocity, lr, momentum, weight_decay):
    _function("sgd")(_pointer(p), _pointer(g), _pointer(velocity), p.size, _number(lr), momentum, weight_decay)


def average_step(average, p, decay, step):
    _function("average")(_pointer(average), _pointer(p), p.size, 1.0 - decay, _number(step))


def gather_batch(
    images, labels, numbers, index, offset, draw, affine, x, y, mean, scale, noise_sigma, noise_uniform, augment, seed
):
    _function("gather")(
        _pointer(images), _pointer(labels), _pointer(numbers), _pointer(index), _pointer(offset), _pointer(draw),
        _pointer(affine), _pointer(x), _pointer(y), x.shape[0], index.size, *images.shape, math.isqrt(images.shape[1]),
        mean, scale, noise_sigma, noise_uniform, augment is not None, *(augment or (0.0, 0.0, 0.0, 0.0)),
        seed & 0xFFFFFFFF, seed >> 32,
    )  # fmt: skip


def shuffle(index, out, seed, epoch):
    _function("shuffle")(_pointer(index), _pointer(out), index.size, seed & 0xFFFFFFFF, seed >> 32, epoch)


def advance(offset, by, step):
    _function("advance")(_pointer(offset), by, _pointer(step))


def to_bfloat16(x, y):
    _function("to_bfloat16")(_pointer(x), _pointer(y), x.size)


def batch_norm_stats(z, mean, var, running_mean, running_var, momentum):
    _function("batch_norm_stats")(*map(_pointer, (z, mean, var, running_mean, running_var)), momentum, *z.shape)


def _dropout(d):
    return d.threshold, d.scale, d.seed & 0xFFFFFFFF, d.seed >> 32, _number(d.step), d.layer, d.row


def norm_act(z, bias, activation, norm, dropout, y):
    arrays = z, bias, norm.mean, norm.var, norm.weight
    _function("norm_act_", activation)(*map(_pointer, arrays), norm.eps, _pointer(y), *z.shape, *_dropout(dropout))


def norm_act_backward(dy, z, bias, activation, norm, dropout, dz, bias_grad, weight_grad):
    arrays, results = (dy, z, bias, norm.mean, norm.var, norm.weight), (dz, bias_grad, weight_grad)
    _function("norm_act_backward_", activation)(
        *map(_pointer, arrays), norm.eps, *map(_pointer, results), *dy.shape, *_dropout(dropout)
    )


def empty(shape, dtype=np.float32):
    """An uninitialised array: what ops.py writes results into."""
    return np.empty(shape, dtype)
