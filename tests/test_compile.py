"""The GPU kernels compile, without a warning, for every architecture, and take what launches.py passes.

NVRTC needs no GPU and no driver, so all of this runs on any machine that has CuPy and NVRTC installed.
"""

import functools
import re
from pathlib import Path

import numpy as np
import pytest

from kernels import ACTIVATIONS, Augment, cuda, elementwise, source
from kernels.gemm import PRECISIONS, Gemm
from kernels.launches import Launches
from kernels.norm_ops import Dropout, Norm

from . import resources

OPTIONS = cuda.OPTIONS + cuda.CUPY_OPTIONS


@functools.cache
def nvrtc():
    """CuPy's binding of NVRTC, or a skip that says what is missing."""
    pytest.importorskip("cupy", reason="CuPy is not installed")
    from cupy_backends.cuda.libs import nvrtc as binding

    try:
        binding.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"NVRTC cannot be loaded ({error}); run `pip install nvidia-cuda-nvrtc-cu12`")
    return binding


def checked(compile, *args):
    """What `compile` returns, its log last, which must hold no warning."""
    nvrtc()
    try:
        result = compile(*args)
    except RuntimeError as error:
        pytest.fail(str(error))
    assert resources.warnings(result if isinstance(result, str) else result[-1]) == ""
    return result


def compiled(text, *options):
    """The PTX or cubin of `text`, which must compile without a warning."""
    return checked(resources.compile_nvrtc, text, *options)[0]


@functools.cache
def entry_points():
    """The module's kernels: name -> PTX types of the parameters, as u64, u32, f32."""
    ptx = compiled(source.inlined("module.cu"), *OPTIONS, "-arch=compute_90").decode()
    kernels = re.findall(r"\.entry (\w+)\(([^)]*)\)", ptx)
    return {name: re.findall(r"\.param \.([bfus]\d+)", parameters) for name, parameters in kernels}


def test_a_warning_would_be_noticed():
    warned = 'extern "C" __global__ void k() { int unused = 1; }'
    with pytest.raises(AssertionError):
        compiled(warned, *OPTIONS, "-arch=sm_90")
    with pytest.raises(pytest.fail.Exception, match="undefined"):
        compiled('extern "C" __global__ void k() { unknown(); }', *OPTIONS, "-arch=sm_90")


@functools.cache
def module_log(architecture):
    """NVRTC's log of the module, with ptxas's report and no warning; a skip where NVRTC is too old or too new."""
    if architecture not in nvrtc().getSupportedArchs():
        pytest.skip(f"NVRTC {'.'.join(map(str, nvrtc().getVersion()))} does not know sm_{architecture}")
    return checked(resources.nvrtc_log, source.inlined("module.cu"), architecture)


def test_an_unknown_architecture_is_an_error_in_words():
    with pytest.raises(pytest.fail.Exception, match="(?i)gpu-architecture|-arch"):
        compiled(source.inlined("module.cu"), *OPTIONS, "-arch=sm_999")


def test_module_text_is_complete():
    """Includes are in place, each once: CuPy's disk cache sees the text alone."""
    text = source.inlined("module.cu")
    assert not re.findall(r'^\s*#\s*include\s+".*\.cuh"', text, re.MULTILINE)
    for header in source.DIRECTORY.glob("*.cuh"):
        first = header.read_text().splitlines()[0]
        assert text.splitlines().count(first) == 1, header.name


class _Recorder:
    """A device whose kernels only record what they are launched with."""

    def __init__(self):
        self.launches = []

    def function(self, name, shared_bytes=0):
        return lambda grid, block, args: self.launches.append((name, grid, block, args))

    def multiprocessors(self):
        return 132

    def room(self):
        return 8

    def compute_capability(self):
        return 90

    def counters(self, count):
        return np.zeros(count, np.uint32)

    empty = staticmethod(np.empty)

    def is_array(self, value):
        return isinstance(value, np.ndarray)


_PTX_TYPES = {np.int64: {"u64", "s64", "b64"}, np.uintp: {"u64", "b64"}, np.int32: {"u32", "s32", "b32"},
              np.uint32: {"u32", "b32"}, np.float32: {"f32"}}  # fmt: skip


@functools.cache
def _launches():
    """Launches of every kernel, with and without the optional arguments."""

    def f(*shape):
        return np.zeros(shape, np.float32)

    device = _Recorder()
    ops = Launches(device)
    for activation in ACTIVATIONS:
        ops.bias_act(f(1000, 400), f(400), activation, f(1000, 400))
        for bias in (None, f(400)):
            ops.bias_act_backward(f(1000, 400), f(1000, 400), bias, activation, f(1000, 400), f(400))
        ops.bias_act_backward(f(2, 4), f(2, 4), None, activation, f(2, 4), f(4))
    dropout = Dropout(2**32 - 1, 2.0, 2**64 - 1, 2**24 - 1, 3, 2**32 - 1)
    for activation in ACTIVATIONS:
        without, given = Norm(None, None, None, 1e-5), Norm(f(4), f(4), f(4), 1e-5)
        for norm, settings in ((without, dropout), (given, dropout._replace(step=f()))):
            ops.norm_act(f(2, 4), f(4), activation, norm, settings, f(2, 4))
            for B in (2, 5000):
                weight_grad = None if norm.mean is None else f(4)
                ops.norm_act_backward(f(B, 4), f(B, 4), f(4), activation, norm, settings, f(B, 4), f(4), weight_grad)
    for B, running in ((2, None), (5000, f(4))):
        ops.batch_norm_stats(f(B, 4), f(4), f(4), running, running, 0.1)
    for C in (1, 32, 33, 47, 100, 200, 500, 1000, 1025):
        for totals, confusion, weights in ((None, None, None), (np.zeros(2), np.zeros((C, C), np.int64), f(C))):
            ops.softmax_cross_entropy(
                f(8, C + 1), np.zeros(8, np.int32), C, 0.1, 0.1, weights, f(8, C + 1), f(), totals, confusion
            )
    for step, lr in ((1, 0.1), (f(), f())):
        ops.average_step(f(9), f(9), 0.999, step)
        ops.adam_step(f(9), f(9), f(9), f(9), step, lr, 0.9, 0.999, 1e-8, 0.0, True)
    for velocity in (None, f(9)):
        ops.sgd_step(f(9), f(9), velocity, 0.1, 0.0, 0.0)
    images, labels = np.zeros((5, 9), np.uint8), np.zeros(5, np.int32)
    offset = np.zeros(1, np.int64)
    for numbers, where, draw, affine, augment, sigma in (
        (None, None, None, None, None, 0.0), (None, offset, None, None, None, 0.0), (None, None, None, None, None, 0.5),
        (labels, offset, offset, f(4, 2, 3), None, 0.0),
        (labels, offset, offset, None, Augment(0.5, 0.1, 0.1, 2.0), 0.5),
    ):  # fmt: skip
        ops.gather_batch(
            images, labels, numbers, labels[:4], where, draw, affine, f(4, 9), labels[:4], 0.0, 1.0, sigma, True,
            augment, 2**64 - 1,
        )  # fmt: skip
    for step in (None, f(1)):
        ops.advance(offset, 2**63 - 1, step)
    ops.shuffle(labels, labels, 2**64 - 1, 2**32 - 1)
    ops.to_bfloat16(f(9), np.zeros(9, np.uint16))
    for precision in PRECISIONS:
        gemm = Gemm(device, precision)
        for n in (9, 264 * 128):  # small tiles; large ones fill the GPU
            for bias, z in ((None, None), (f(3), f(n, 3))):
                gemm.forward(f(n, 2), f(2, 3), f(n, 3), bias=bias, z=z)
            for bias_grad in (None, f(2)):
                gemm.input_gradient(f(n, 3), f(2, 3), f(n, 2), bias_grad=bias_grad)
            gemm.weight_gradient(f(1, n), f(1, 3), f(n, 3))
        gemm.input_gradient(f(9, 900), f(2, 900), f(9, 2), saved=f(9, 2), bias=f(2), activation="relu")
    return device.launches


def test_every_launch_fits_its_kernel():
    """The number and the kinds of the arguments; a Python number would be passed as 8 bytes."""
    for name, _, _, args in _launches():
        parameters = entry_points()[name]
        assert len(args) == len(parameters), name
        for position, (argument, ptx) in enumerate(zip(args, parameters, strict=True)):
            kinds = {"u64", "b64"} if isinstance(argument, np.ndarray) else _PTX_TYPES[type(argument)]
            assert ptx in kinds, f"{name}, argument {position}: {type(argument).__name__} for .{ptx}"


def test_every_kernel_is_launched():
    """No entry point that nothing uses."""
    assert {name for name, *_ in _launches()} == set(entry_points())


@functools.cache
def _cupy_includes() -> tuple:
    """-I options for the headers that CuPy puts before an ElementwiseKernel's code."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    own = Path(cupy.__file__).parent / "_core" / "include"
    try:
        import nvidia.cuda_runtime

        runtime = Path(nvidia.cuda_runtime.__path__[0]) / "include"
    except ImportError:
        runtime = Path()
    if not (runtime / "cuda_fp16.h").exists():
        pytest.skip("CUDA's own headers are not installed; run `pip install nvidia-cuda-runtime-cu12`")
    cccl = own / "cupy" / "_cccl"
    return tuple(
        f"-I{folder}" for folder in (own, runtime, cccl / "libcudacxx", cccl / "thrust", cccl / "cub")
    )


def _elementwise_text(s: elementwise.Specification) -> str:
    """A kernel around the operation, with references for outputs, as CuPy writes it."""
    c_types = {"float32": "float", "int32": "int"}
    inputs, outputs = ([p.split() for p in part.split(",")] for part in (s.inputs, s.outputs))
    parameters = [f"const {c_types[t]}* _{n}" for t, n in inputs] + [
        f"{c_types[t]}* _{n}" for t, n in outputs
    ]
    body = "".join(f"const {c_types[t]} {n} = _{n}[i]; " for t, n in inputs)
    body += "".join(f"{c_types[t]}& {n} = _{n}[i]; " for t, n in outputs)
    headers = ("complex.cuh", "carray.cuh", "atomics.cuh", "math_constants.h")
    return "\n".join(
        [f"#include <cupy/{header}>" for header in headers]
        + [
            source.inlined(s.file),
            f'extern "C" __global__ void kernel({", ".join(parameters)}, long long n) {{',
        ]
        + [f"  const long long i = threadIdx.x;\n  if (i < n) {{ {body}{s.operation} }}\n}}\n"]
    )


@pytest.mark.parametrize("name", elementwise.SPECIFICATIONS)
def test_elementwise(name):
    """Together with CuPy's headers, whose names must not collide with the sources'."""
    compiled(_elementwise_text(elementwise.SPECIFICATIONS[name]), *OPTIONS, *_cupy_includes(), "-arch=sm_90")


def test_elementwise_has_every_pointwise_op():
    expected = {f"{op}_{a}" for op in ("bias_act", "bias_act_backward") for a in ACTIVATIONS} | {
        "adam",
        "sgd",
    }
    assert set(elementwise.SPECIFICATIONS) == expected
