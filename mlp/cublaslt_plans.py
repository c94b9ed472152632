"""cuBLASLt through nvmath-python's low-level bindings: what is made before a product is called, and the call.

cuBLASLt computes D (m, n) = op(A) (m, k) @ op(B) (k, n) of column-major matrices, and a row-major array is, byte for
byte, its own transpose in column-major order, with its number of columns as leading dimension. So each product is
computed transposed: the right factor is A and the left one is B, each with the op (N, or T: transposed) that it has
in the row-major product.

                     D = out.T   A       op  lda    B    op  ldb    m  n  k  ldd
    forward          (N, B)      weight  N   N      x    N   K      N  B  K  N
    input_gradient   (K, B)      weight  T   N      dz   N   N      K  B  N  K
    weight_gradient  (N, K)      dz      N   N      x    T   K      N  K  B  N

The rows of D are the columns of `out`, so cuBLASLt's vectors of m elements are those of a layer: a bias added to all
columns of D (BIAS, RELU_BIAS), the row sums of D (DRELU_BGRAD: out.sum(0)) and of op(A) (BGRADA: dz.sum(0)).
RELU_AUX_BIAS also writes a bit per element of D, which DRELU_BGRAD reads.

Deterministic: a problem always gets the same algorithm, the heuristic's first or the one whose number is given; each
stream has its own workspace, as the cuBLAS documentation asks in 2.1.4, Results Reproducibility; and where k is split,
the partial sums go to the workspace and are added in a separate step (cublasLtReductionScheme_t), never in the output
by whoever comes first. A number means something for one problem, GPU, version of cuBLASLt and limit of workspace.

Sources: cublasLt.h of CUDA 12.9, the documentation of CUDA 13, and nvmath-python 0.5 to 1.0, whose bindings have the
same names, arguments and dtypes for all that is used here.
"""

import weakref
from typing import NamedTuple

import numpy as np

from . import InputError, one_line

SLACK = 256  # bytes of workspace: nvmath-python gives algorithms with an epilogue 16 more than they ask for
_WIDEST = 256  # bytes: cuBLASLt tells no wider alignments apart
_CUDA_R_32F, _CUDA_R_16BF = 0, 14  # cudaDataType, library_types.h
_INVALID_VALUE, _NOT_SUPPORTED = 7, 15  # cublasStatus_t


def mask_shape(rows: int, columns: int) -> tuple[int, int]:
    """The shape of the uint8 mask of an output (rows, columns): a bit per element, rows of whole 128 bits."""
    return rows, -(-columns // 128) * 16


class Problem(NamedTuple):
    """A product of two row-major factors, and all else that its algorithm depends on."""

    left: tuple  # the shapes in memory
    right: tuple
    left_transposed: bool
    right_transposed: bool
    epilogue: str
    alignments: tuple  # in bytes: of A, B, D, the epilogue's vector and its mask; 0 where there is none

    @classmethod
    def of(cls, left, right, left_transposed, right_transposed, epilogue, pointers):
        alignments = tuple(min(pointer & -pointer, _WIDEST) for pointer in pointers)
        return cls(left, right, left_transposed, right_transposed, epilogue, alignments)

    def sizes(self) -> tuple[int, int, int]:
        """m, n and k."""
        n, k = self.left[::-1] if self.left_transposed else self.left
        return self.right[0 if self.right_transposed else 1], n, k


class Plan(NamedTuple):
    """Addresses of cuBLASLt's objects, and an answer of the heuristic."""

    descriptor: int
    a: int
    b: int
    d: int
    algorithm: np.ndarray


class Library:
    """A cuBLASLt handle on CuPy's current device, and what its plans are made of; all freed by `close`, or when this
    is collected, or the interpreter exits.

    workspace_bytes: what algorithms may use; give `run` SLACK more. InputError where nvmath-python or cuBLASLt is
    missing.
    """

    def __init__(self, precision, workspace_bytes):
        blas, self._lt = _bindings()
        self._precision, self._workspace_bytes = precision, workspace_bytes
        types = blas.ComputeType
        self._compute_type = types.COMPUTE_32F_FAST_TF32 if precision == "tf32" else types.COMPUTE_32F
        self._factor_type = _CUDA_R_16BF if precision == "bf16" else _CUDA_R_32F
        self._operation = blas.Operation.N, blas.Operation.T
        self._scalars = np.array([1.0, 0.0], np.float32)  # alpha and beta, on the host
        self._made = []
        self.close = weakref.finalize(self, _destroy, self._made)
        try:
            self._handle = self._keep(self._lt.create(), self._lt.destroy)
        except (RuntimeError, self._lt.cuBLASLtError) as error:
            reason = one_line(error)
            raise InputError(f"cuBLASLt cannot be used ({reason}); try `pip install 'cupy-cuda12x[ctk]'`") from None

    def version(self) -> str:
        """major.minor.patch."""
        number = self._lt.get_version()
        return f"{number // 10000}.{number // 100 % 100}.{number % 100}"

    def plan(self, problem, number, vector, mask) -> Plan | str:
        """For a problem, by the algorithm of this number, counted from 0; or why there is none. vector, mask: addresses
        for the epilogue, or 0."""
        lt, attribute, (m, n, k) = self._lt, self._lt.MatmulDescAttribute, problem.sizes()
        epilogue = problem.epilogue
        what = f"cuBLASLt {self.version()} has no algorithm for {epilogue} of {self._precision}, m {m}, n {n}, k {k}"
        if k == 1 and "GRAD" in epilogue:  # nvmath-python refuses it, because some versions do not
            return what
        descriptor = self._keep(lt.matmul_desc_create(self._compute_type, _CUDA_R_32F), lt.matmul_desc_destroy)
        self._set(descriptor, attribute.TRANSA, self._operation[problem.right_transposed])
        self._set(descriptor, attribute.TRANSB, self._operation[problem.left_transposed])
        self._set(descriptor, attribute.EPILOGUE, lt.Epilogue[epilogue])
        if mask:
            self._set(descriptor, attribute.EPILOGUE_AUX_LD, 8 * mask_shape(n, m)[1])  # in bits
        self._point(descriptor, vector, mask)  # the heuristic takes the alignments from these
        a, b = (self._layout(shape, self._factor_type) for shape in (problem.right, problem.left))
        d = self._layout((n, m), _CUDA_R_32F)
        algorithm = self._heuristic((descriptor, a, b, d, d), problem.alignments, number)
        return f"{what}: {algorithm}" if isinstance(algorithm, str) else Plan(descriptor, a, b, d, algorithm)

    def run(self, plan, pointers, workspace, workspace_bytes, stream) -> str | None:
        """Launch a product, or return why its algorithm cannot be had; all are addresses, `pointers` those of A, B, D,
        the epilogue's vector and its mask."""
        a, b, d, vector, mask = pointers
        self._point(plan.descriptor, vector, mask)  # a captured call keeps what is set now
        alpha = self._scalars.ctypes.data
        beta = alpha + self._scalars.itemsize  # 0: D is not read, and C may be D
        try:
            self._lt.matmul(
                self._handle, plan.descriptor, alpha, a, plan.a, b, plan.b, beta, d, plan.d, d, plan.d,
                plan.algorithm.ctypes.data, workspace, workspace_bytes, stream,
            )  # fmt: skip
        except self._lt.cuBLASLtError as error:
            return f"cuBLASLt {self.version()} refuses an algorithm that it found: {self._refusal(error)}"

    def _layout(self, shape, dtype):
        """Of the column-major matrix that is the transpose of a row-major array of this shape."""
        rows, columns = shape
        return self._keep(self._lt.matrix_layout_create(dtype, columns, rows, columns), self._lt.matrix_layout_destroy)

    def _heuristic(self, objects, alignments, number):
        """The algorithm of this number in the order of the times that are expected, or why there is none. As many are
        asked for as this takes, because nothing says that more answers begin with the same ones."""
        lt, asked = self._lt, number + 1
        found, count = np.zeros(asked, lt.matmul_heuristic_result_dtype), np.zeros(1, np.int32)
        addresses = found.ctypes.data, count.ctypes.data
        try:
            lt.matmul_algo_get_heuristic(self._handle, *objects, self._preference(*alignments[:3]), asked, *addresses)
        except lt.cuBLASLtError as error:
            return self._refusal(error)
        if count[0] < asked or found["state"][number]:
            return "its heuristic finds none" + f" of number {number}" * (number > 0)
        return found["algo"][number:]

    def _refusal(self, error) -> str:
        """What an error says that is about one algorithm or problem; any other is raised."""
        if error.status not in (_INVALID_VALUE, _NOT_SUPPORTED):
            raise error
        return one_line(error)

    def _preference(self, a, b, d):
        """What an algorithm must keep to; a, b, d: the alignments of the matrices."""
        lt, attribute = self._lt, self._lt.MatmulPreferenceAttribute
        preference = self._keep(lt.matmul_preference_create(), lt.matmul_preference_destroy)
        for name, number in (
            (attribute.MAX_WORKSPACE_BYTES, self._workspace_bytes),
            (attribute.REDUCTION_SCHEME_MASK, lt.ReductionScheme.NONE | lt.ReductionScheme.COMPUTE_TYPE),
            (attribute.MIN_ALIGNMENT_A_BYTES, a),
            (attribute.MIN_ALIGNMENT_B_BYTES, b),
            (attribute.MIN_ALIGNMENT_C_BYTES, d),
            (attribute.MIN_ALIGNMENT_D_BYTES, d),
        ):
            value = np.array([number], lt.get_matmul_preference_attribute_dtype(name))
            lt.matmul_preference_set_attribute(preference, name, value.ctypes.data, value.nbytes)
        return preference

    def _set(self, descriptor, attribute, number):
        value = np.array([number], self._lt.get_matmul_desc_attribute_dtype(attribute))
        self._lt.matmul_desc_set_attribute(descriptor, attribute, value.ctypes.data, value.nbytes)

    def _point(self, descriptor, vector, mask):
        attribute = self._lt.MatmulDescAttribute
        if vector:
            self._set(descriptor, attribute.BIAS_POINTER, vector)
        if mask:
            self._set(descriptor, attribute.EPILOGUE_AUX_POINTER, mask)

    def _keep(self, made, destroy):
        self._made.append((destroy, made))
        return made


def _bindings():
    try:
        from nvmath.bindings import cublas, cublasLt
    except ImportError as error:
        reason = one_line(error)
        raise InputError(
            f"products by cuBLASLt need nvmath-python ({reason}); run `pip install nvmath-python`"
        ) from None
    return cublas, cublasLt


def _destroy(made):
    while made:
        destroy, pointer = made.pop()
        destroy(pointer)
