"""What all public ops begin with: the back end for a kind of array, and the arrays that results go into."""

import functools

import numpy as np

from .arguments import check_output, is_cupy, kind


@functools.cache
def _host():
    from . import host

    return host


def backend_of(name, array):
    """What holds the compiled ops for this kind of array; `name` is the argument that an error names."""
    if isinstance(array, np.ndarray):
        return _host()
    if is_cupy(array):
        from . import cuda

        cuda.check_device(name, array)
        return cuda.ops
    raise TypeError(f"{name} must be a NumPy, CuPy or torch array, got {kind(array)}")


def output(backend, name, array, like, dtype, *shape):
    """The array to write a result into: the caller's, checked, or a new one."""
    if array is None:
        return backend.empty(shape, dtype)
    check_output(name, array, like, dtype, *shape)
    return array
