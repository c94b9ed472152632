"""Which matrix products a run uses: NumPy's, CuPy's, cuBLASLt's or our own kernel's, and in which precision."""

from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from kernels import host

from . import InputError
from .configs import Config
from .device import Device
from .gemm import ArrayGemm


@dataclass(frozen=True)
class Products:
    """library: the products of a library, see gemm.py. own: our kernel (kernels/gemm.py), or None; beside a library it
    is used where tuning.py has found it faster. epilogues: whether the library has fused epilogues. notice: what the
    user should know."""

    library: object
    own: object = None
    precision: str = "fp32"
    epilogues: bool = False
    notice: str = ""

    @classmethod
    def arrays(cls, xp=np, together=None) -> "Products":
        """Products by xp.matmul, in float32; together: see blas.multiply."""
        return cls(ArrayGemm(xp, together=together))

    @property
    def rounds(self) -> bool:
        """Whether the library reads bfloat16 copies of its factors."""
        return self.precision == "bf16" and self.library is not None

    @property
    def workspace_bytes(self) -> int:
        """The device memory that the library takes for two streams."""
        return 2 * getattr(self.library, "workspace_bytes", 0)

    @property
    def captures(self) -> bool:
        """Whether they can be captured into a CUDA graph."""
        return self.library is None or self.library.captures


def select(config: Config, device: Device) -> Products:
    """The products for --precision and --gemm on this device. InputError where they cannot be had."""
    precision = config.precision
    if device.kind == "cpu":
        if precision != "fp32" or config.gemm != "auto":
            flag = f"--precision {precision}" if precision != "fp32" else f"--gemm {config.gemm}"
            raise InputError(f"{flag} needs a GPU; leave it out on a CPU")
        return Products.arrays(device.xp, host.together if device.fused else None)
    if config.gemm in ("cublaslt", "own") and not device.fused:
        raise InputError(f"--gemm {config.gemm} goes with the fused kernels; give --fused with it")
    if config.gemm == "own" and (config.batch_norm or config.dropout):
        raise InputError("--gemm own fuses bias and activation to its products; leave out --batch-norm and --dropout")
    if config.gemm == "own":
        return Products(None, _own(precision), precision)
    if not device.fused or config.gemm == "cupy":
        return Products(ArrayGemm(device.xp, precision), precision=precision)
    from .cublaslt import WORKSPACE_BYTES, CublasLt

    limit = config.memory_limit
    try:
        library = CublasLt(precision, WORKSPACE_BYTES if limit is None else min(WORKSPACE_BYTES, limit // 32))
    except InputError as error:
        if config.gemm == "cublaslt" or precision == "bf16":
            raise
        notice = f"{error}; until then the products are CuPy's, and steps are launched op by op instead of as a graph"
        return Products(ArrayGemm(device.xp, precision), precision=precision, notice=notice)
    own = None
    if config.gemm == "auto" and precision != "fp32":
        with suppress(InputError):  # on a GPU without the instructions it is no candidate
            own = _own(precision)
    return Products(library, own, precision, epilogues=True)


def _own(precision: str):
    """Our kernel for this precision. InputError where there is none."""
    if precision == "fp32":
        raise InputError("--gemm own multiplies on tensor cores; give --precision tf32 or bf16 with it")
    from kernels import BackendError, cuda
    from kernels.gemm import Gemm

    try:
        return Gemm(cuda, precision)
    except BackendError as error:
        raise InputError(f"--gemm own is not possible: {error}") from None
