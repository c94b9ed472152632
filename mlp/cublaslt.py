"""The products of gemm.py by cuBLASLt, for CUDA graphs: CuPy's matmul refuses to be captured. Some with an epilogue.

How a product of row-major arrays becomes one of cuBLASLt's is in cublaslt_plans.py.
"""

from typing import NamedTuple

import numpy as np

from . import InputError
from .cublaslt_plans import SLACK, Library, Problem, mask_shape
from .gemm import check_precision

WORKSPACE_BYTES = 32 * 2**20  # the documentation of cublasSetWorkspace recommends it for compute capability 9.0
_UNPREPARED = (
    "cuBLASLt has no plan or no workspace for this product on this stream, and making them would allocate during the "
    "capture; run the step once on this stream, with the same arrays, before capturing it"
)


class Unsupported(InputError):
    """cuBLASLt has no algorithm for a product, or no such epilogue; the message says which."""


class _Factor(NamedTuple):
    name: str
    array: object
    transposed: bool = False

    def shape(self) -> tuple[int, int]:
        """As it is multiplied."""
        return self.array.shape[::-1] if self.transposed else self.array.shape


class CublasLt:
    """The products on CuPy's current stream, on the GPU that was current when this was made; for one thread at a time.

    precision: "fp32" (COMPUTE_32F), "tf32" (COMPUTE_32F_FAST_TF32) or "bf16" (COMPUTE_32F of CUDA_R_16BF), where the
    factors are uint16 arrays that hold the bits of bfloat16; out, bias and bias_grad are float32 in all three.
    InputError where nvmath-python or cuBLASLt is missing, or the GPU does not have the precision.

    The first call for a stream makes its workspace, and the first for shapes and alignments their plan: RuntimeError
    in a capture, so run everything once before. Both are kept; keep this object as long as a graph of its calls.
    A wrong shape, dtype or layout, and a dimension of 0, raise ValueError; Unsupported: see there.

    algorithm: which of cuBLASLt's a product takes, counted from 0 in the order of the times that it expects; not every
    product has every number. What is measured may be in another order: see tuning.py.
    """

    captures = True

    def __init__(self, precision, workspace_bytes=WORKSPACE_BYTES):
        check_precision(precision)
        self._library = Library(precision, workspace_bytes)
        import cupy

        capability = cupy.cuda.Device().compute_capability
        if precision != "fp32" and int(capability) < 80:
            raise InputError(f"{precision} products need compute capability 8.0, the GPU has {capability}; take fp32")
        self.precision, self.version = precision, self._library.version()
        self._cupy, self.workspace_bytes = cupy, workspace_bytes
        self._dtype = np.dtype(np.uint16 if precision == "bf16" else np.float32)
        self._plans, self._workspaces = {}, {}

    def close(self) -> None:
        """Free everything, as also happens when this is collected or the interpreter exits. Graphs of its calls must
        not be launched afterwards."""
        self._plans.clear()
        self._workspaces.clear()
        self._library.close()

    def forward(self, x, weight, out, algorithm=0):
        """out (B, N) = x (B, K) @ weight (K, N)."""
        self._multiply(_Factor("x", x), _Factor("weight", weight), out, algorithm)

    def input_gradient(self, dz, weight, out, algorithm=0):
        """out (B, K) = dz (B, N) @ weight.T, weight (K, N)."""
        self._multiply(_Factor("dz", dz), _Factor("weight", weight, transposed=True), out, algorithm)

    def weight_gradient(self, x, dz, out, algorithm=0):
        """out (K, N) = x.T @ dz, x (B, K), dz (B, N)."""
        self._multiply(_Factor("x", x, transposed=True), _Factor("dz", dz), out, algorithm)

    def forward_act(self, x, weight, bias, activation, out, mask=None, algorithm=0):
        """out (B, N) = activation(x (B, K) @ weight (K, N) + bias (N,)); activation: relu or identity.

        mask: uint8 of mask_shape(B, N), for relu only; receives what input_gradient_relu needs. cuBLASLt does not say
        what its relu makes of NaN, which kernels.bias_act lets through.
        """
        if activation not in ("relu", "identity"):
            raise Unsupported(f"activation must be relu or identity to be an epilogue, got {activation}")
        if activation == "identity" and mask is not None:
            raise ValueError("mask must be None where activation is identity, which has none")
        epilogue = "BIAS" if activation == "identity" else "RELU_BIAS" if mask is None else "RELU_AUX_BIAS"
        self._multiply(_Factor("x", x), _Factor("weight", weight), out, algorithm, epilogue, ("bias", bias), mask)

    def input_gradient_relu(self, dz, weight, mask, out, bias_grad, algorithm=0):
        """out (B, K) = dz (B, N) @ weight.T where the forward output was positive, else 0; bias_grad (K,) = out.sum(0).

        weight (K, N); mask: what forward_act wrote for the output (B, K) of the layer before.
        """
        left, right = _Factor("dz", dz), _Factor("weight", weight, transposed=True)
        self._multiply(left, right, out, algorithm, "DRELU_BGRAD", ("bias_grad", bias_grad), mask)

    def weight_gradient_bias(self, x, dz, out, bias_grad, algorithm=0):
        """out (K, N) = x.T @ dz, x (B, K), dz (B, N); bias_grad (N,) = dz.sum(0)."""
        left, right = _Factor("x", x, transposed=True), _Factor("dz", dz)
        self._multiply(left, right, out, algorithm, "BGRADA", ("bias_grad", bias_grad))

    mask_shape = staticmethod(mask_shape)

    def _multiply(self, left, right, out, algorithm, epilogue="DEFAULT", vector=None, mask=None):
        """out = left @ right; the epilogue's `vector` is (name, array)."""
        self._check(left, right, out, epilogue, vector, mask)
        arrays = right.array, left.array, out, vector and vector[1], mask
        pointers = [0 if array is None else _address(array) for array in arrays]
        problem = Problem.of(left.array.shape, right.array.shape, left.transposed, right.transposed, epilogue, pointers)
        key, stream = (problem, algorithm), self._cupy.cuda.get_current_stream()
        if key not in self._plans or stream.ptr not in self._workspaces:
            self._prepare(key, pointers, stream)
        plan, workspace = self._plans[key], self._workspaces[stream.ptr]
        refusal = plan
        if not isinstance(plan, str):
            refusal = self._library.run(plan, pointers, _address(workspace), workspace.size, stream.ptr)
        if refusal:
            raise Unsupported(f"{refusal}; give --gemm cupy")

    def _check(self, left, right, out, epilogue, vector, mask):
        for factor in left, right:
            _check(factor.name, factor.array, self._dtype, None, None)
        (rows, inner), (inner_right, columns) = left.shape(), right.shape()
        if inner != inner_right:
            shapes = f"{left.name} {left.array.shape} and {right.name} {right.array.shape}"
            raise ValueError(f"{shapes} cannot be multiplied: {inner} must be {inner_right}")
        _check("out", out, np.float32, rows, columns)
        if vector:
            _check(*vector, np.float32, columns)
        if mask is not None or epilogue == "DRELU_BGRAD":
            _check("mask", mask, np.uint8, *mask_shape(rows, columns))

    def _prepare(self, key, pointers, stream):
        """Make the plan and the workspace that are missing; RuntimeError where nothing can be made now."""
        if not self._library.close.alive:
            raise RuntimeError("this CublasLt is closed; make a new one")
        if stream.is_capturing():
            raise RuntimeError(_UNPREPARED)
        if stream.ptr not in self._workspaces:  # because products on two streams may run at the same time
            self._workspaces[stream.ptr] = self._cupy.empty(self.workspace_bytes + SLACK, np.uint8)
        if key not in self._plans:
            self._plans[key] = self._library.plan(*key, *pointers[3:])


def _address(array) -> int:
    """Of the first element on the GPU."""
    try:
        return array.data.ptr
    except AttributeError:
        raise ValueError(f"all arrays must be CuPy arrays, got {type(array).__name__}") from None


def _check(name, array, dtype, *shape):
    """Raise ValueError unless the array is C-contiguous and has the dtype and shape (None: any length); 0 is none."""
    if array is not None and array.dtype == dtype and array.ndim == len(shape) and array.flags.c_contiguous:
        if all(got > 0 and expected in (None, got) for got, expected in zip(array.shape, shape)):
            return
    expected = ", ".join("any" if n is None else str(n) for n in shape) + ("," if len(shape) == 1 else "")
    got = "None" if array is None else f"{array.dtype} {array.shape} with strides {array.strides}"
    raise ValueError(f"{name} must be C-contiguous {np.dtype(dtype)} of shape ({expected}), none of it 0, got {got}")
