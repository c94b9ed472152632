"""What cuBLASLt computes, in NumPy: products of column-major matrices in raw memory, their epilogues, and the formats
of their factors. After cublasLt.h (CUDA 12.9) and cublas_api.h."""

import ctypes
from enum import IntEnum
from types import SimpleNamespace

import numpy as np

FLOAT32, BFLOAT16 = 0, 14  # cudaDataType
Epilogue = IntEnum("Epilogue", {
    "DEFAULT": 1, "BIAS": 4, "RELU_BIAS": 6, "RELU_AUX_BIAS": 134, "DRELU_BGRAD": 152, "BGRADA": 256,
})  # fmt: skip
ComputeType = IntEnum("ComputeType", {"COMPUTE_32F": 68, "COMPUTE_32F_FAST_TF32": 77})
Operation = IntEnum("Operation", {"N": 0, "T": 1})


def memory(pointer, count, dtype) -> np.ndarray:
    """`count` elements at an address."""
    assert pointer, "a null pointer is read"
    dtype = np.dtype(dtype)
    return np.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(pointer), dtype)


def from_bfloat16(bits) -> np.ndarray:
    """float32 values of uint16 bits."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values) -> np.ndarray:
    """uint16 bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _to_tf32(values) -> np.ndarray:
    return ((np.ascontiguousarray(values, np.float32).view(np.uint32) + 0x1000) & ~np.uint32(0x1FFF)).view(np.float32)


class Layout(SimpleNamespace):
    def at(self, pointer) -> np.ndarray:
        """The column-major matrix at an address: a view of (rows, cols)."""
        dtype = np.dtype({FLOAT32: np.float32, BFLOAT16: np.uint16}[self.type])
        flat = memory(pointer, self.ld * (self.cols - 1) + self.rows, dtype)
        strides = dtype.itemsize, self.ld * dtype.itemsize
        return np.lib.stride_tricks.as_strided(flat, (self.rows, self.cols), strides)

    def of(self, operation) -> tuple[int, int]:
        return (self.cols, self.rows) if operation == Operation.T else (self.rows, self.cols)


def _factor(matrix, operation, compute_type) -> np.ndarray:
    """op(matrix) in float64, rounded as the compute type says."""
    matrix = matrix.T if operation == Operation.T else matrix
    if matrix.dtype == np.uint16:
        matrix = from_bfloat16(matrix)
    elif compute_type == ComputeType.COMPUTE_32F_FAST_TF32:
        matrix = _to_tf32(matrix)
    return matrix.astype(np.float64)


def compute(description, a, b, d) -> None:
    """D = epilogue(op(A) @ op(B)), on column-major matrices."""
    epilogue, compute_type = Epilogue(description["EPILOGUE"]).name, description["COMPUTE_TYPE"]
    a, b = (_factor(x, description[op], compute_type) for x, op in ((a, "TRANSA"), (b, "TRANSB")))
    product, (m, n) = a @ b, d.shape
    if epilogue != "DEFAULT":
        vector = memory(description["BIAS_POINTER"], m, np.float32)
    if "BIAS" in epilogue:
        product = product + vector[:, None]
    if "AUX" in epilogue or "DRELU" in epilogue:
        bytes_of_column = description["EPILOGUE_AUX_LD"] // 8
        mask = memory(description["EPILOGUE_AUX_POINTER"], n * bytes_of_column, np.uint8).reshape(n, -1)
    if "AUX" in epilogue:
        mask[:, : -(-m // 8)] = np.packbits(product.T > 0, axis=1, bitorder="little")
    if epilogue.startswith("RELU"):
        product = np.maximum(product, 0)
    if epilogue == "DRELU_BGRAD":
        product = np.where(np.unpackbits(mask, axis=1, count=m, bitorder="little").T, product, 0.0)
        vector[:] = product.sum(axis=1)
    if epilogue == "BGRADA":
        vector[:] = a.sum(axis=1)
    d[...] = product
