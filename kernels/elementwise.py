"""The pointwise ops as cupy.ElementwiseKernel: the same device functions, CuPy's own launch and indexing.

They take broadcast and strided arrays, which the kernels of cuda.py refuse, and show what those gain by
16-byte accesses. `SPECIFICATIONS` holds the text of each, so that it can be compiled without a GPU.
"""

import functools
from dataclasses import dataclass

from . import source
from .cuda import OPTIONS

ACTIVATION_CLASS = {
    "identity": "Identity",
    "relu": "Relu",
    "leaky_relu": "LeakyRelu",
    "silu": "Silu",
    "gelu": "Gelu",
    "gelu_tanh": "GeluTanh",
}


@dataclass(frozen=True)
class Specification:
    """The arguments of cupy.ElementwiseKernel, and the source file that its operation needs."""

    inputs: str
    outputs: str
    operation: str
    file: str


SPECIFICATIONS = {
    f"bias_act_{name}": Specification(
        "float32 z, float32 bias", "float32 y", f"y = {cls}::value(z + bias);", "bias_act.cuh"
    )
    for name, cls in ACTIVATION_CLASS.items()
} | {
    f"bias_act_backward_{name}": Specification(
        "float32 dy, float32 saved, float32 bias",
        "float32 dz",
        f"dz = bias_act_backward_element<{cls}>(dy, saved, bias);",
        "bias_act.cuh",
    )
    for name, cls in ACTIVATION_CLASS.items()
}
SPECIFICATIONS["adam"] = Specification(
    "float32 g, float32 step, float32 lr, float32 complement1, float32 complement2, float32 eps, "
    "float32 weight_decay, int32 decoupled",
    "float32 p, float32 m, float32 v",
    "const AdamConstants c = adam_constants(step, lr, complement1, complement2, eps, weight_decay, decoupled);"
    " adam_element(p, g, m, v, c);",
    "adam.cuh",
)
SPECIFICATIONS["sgd"] = Specification(
    "float32 g, float32 lr, float32 momentum, float32 weight_decay",
    "float32 p, float32 velocity",
    "sgd_element(p, g, velocity, lr, momentum, weight_decay);",
    "adam.cuh",
)


@functools.cache
def _kernel(name: str):
    import cupy

    s = SPECIFICATIONS[name]
    return cupy.ElementwiseKernel(
        s.inputs, s.outputs, s.operation, f"elementwise_{name}", preamble=source.inlined(s.file), options=OPTIONS
    )


def bias_act(z, bias, activation="relu", out=None):
    """act(z + bias) for CuPy arrays that broadcast together -> float32 array of their common shape."""
    args = (z, bias) if out is None else (z, bias, out)
    return _kernel(f"bias_act_{activation}")(*args)


def bias_act_backward(dy, saved, activation="relu", bias=None, out=None):
    """dz of bias_act (see kernels.bias_act_backward; the bias gradient is a reduction and not computed here)."""
    args = (dy, saved, 0.0 if bias is None else bias) + (() if out is None else (out,))
    return _kernel(f"bias_act_backward_{activation}")(*args)


def adam_step(p, g, m, v, *, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled=False):
    """One Adam step in place on p, m and v (see kernels.adam_step); step and lr may be CuPy arrays."""
    _kernel("adam")(g, step, lr, 1.0 - beta1, 1.0 - beta2, eps, weight_decay, int(decoupled), p, m, v)


def sgd_step(p, g, velocity, *, lr, momentum=0.0, weight_decay=0.0):
    """One SGD step in place on p and velocity (see kernels.sgd_step)."""
    _kernel("sgd")(g, lr, momentum, weight_decay, p, velocity)
