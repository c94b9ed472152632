"""What the ops refuse, in sentences that name the argument."""

import math
import numbers

import numpy as np

FLOAT32, FLOAT64, INT32, INT64, UINT8, UINT16 = map(
    np.dtype, (np.float32, np.float64, np.int32, np.int64, np.uint8, np.uint16)
)
ACTIVATIONS = ("identity", "relu", "leaky_relu", "silu", "gelu", "gelu_tanh")


def is_cupy(x) -> bool:
    """Whether x is a CuPy array, without importing CuPy."""
    return type(x).__module__.partition(".")[0] == "cupy"


def kind(x) -> str:
    """The type of x with its module, because NumPy's and CuPy's arrays have the same name: numpy.ndarray, list, ..."""
    return f"{type(x).__module__}.{type(x).__name__}".removeprefix("builtins.")


def check(name, array, like, dtype, *shape):
    """Raise unless `array` is of the kind and on the device of `like`, C-contiguous, and has the dtype and shape
    (None: any length)."""
    if type(array) is np.ndarray is type(like) and array.dtype is dtype and array.flags.carray:
        if _matches(array.shape, shape):  # C-contiguous, aligned and writeable: the usual case, a microsecond faster
            return
    if type(array) is not type(like):
        raise TypeError(f"{name} must be a {type(like).__module__} array like the others, got {kind(array)}")
    if array.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, got {array.dtype} with shape {array.shape}")
    if not _matches(array.shape, shape):
        expected = ", ".join("any" if n is None else str(n) for n in shape) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name} must have shape ({expected}), got {array.shape}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous, got shape {array.shape} with strides {array.strides}")
    if isinstance(array, np.ndarray) and not array.flags.aligned:
        raise ValueError(f"{name} must start at a multiple of {array.itemsize} bytes; pass {name}.copy()")
    if is_cupy(array) and array.device.id != like.device.id:
        raise ValueError(f"{name} must be on GPU {like.device.id} like the others, got GPU {array.device.id}")


def _matches(shape, pattern) -> bool:
    if shape == pattern:
        return True
    if len(shape) != len(pattern):
        return False
    for got, expected in zip(shape, pattern):  # all() of a generator takes three times as long
        if expected is not None and got != expected:
            return False
    return True


def check_output(name, array, like, dtype, *shape):
    """check(), and that the array can be written."""
    check(name, array, like, dtype, *shape)
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        raise ValueError(f"{name} must be writeable, got a read-only array of shape {array.shape}")


def check_activation(activation):
    """Raise for a name that is not in ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def check_number(name, value, low=-math.inf, high=math.inf):
    """Raise unless low <= value < high (value finite)."""
    if type(value) is not float and not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        possible = low <= value < high and math.isfinite(value)
    except OverflowError:  # a whole number larger than any float
        possible = False
    if not possible:
        raise ValueError(f"{name} must be a finite number in [{low:g}, {high:g}), got {value!r}")


def check_whole(name, value, low=-math.inf, high=math.inf):
    """check_number(), and that the number is of an integer type."""
    check_number(name, value, low, high)
    if not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__}")


def one_element(array) -> tuple:
    """The shape that check() must ask for where one element is wanted: () if the array is 0-d, else (1,)."""
    return () if getattr(array, "shape", None) == () else (1,)


def check_scalar(name, value, like, low):
    """A number >= low, or a float32 array of one element beside `like`, which the kernel reads when it runs."""
    if hasattr(value, "dtype") and getattr(value, "size", 0) == 1 and type(value) is type(like):
        check(name, value, like, FLOAT32, *value.shape)
    else:
        check_number(name, value, low)
