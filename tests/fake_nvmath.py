"""A stand-in for nvmath.bindings.cublasLt and cublas on NumPy's memory, beside the one for CuPy in stand_in_gpu.py.

It does what cublasLt.h says of the descriptors that it is given, and nothing else: matmul reads column-major matrices
through raw addresses with their leading dimensions, applies ops and epilogue, and writes D. What the real library
would refuse, read out of bounds or silently get wrong is an AssertionError or its own error. Work on a stream that
captures is recorded with the addresses of that moment, and done by each launch of the graph.
"""

import sys
from collections import Counter
from enum import IntEnum
from types import ModuleType, SimpleNamespace

import numpy as np

from . import stand_in_gpu
from .column_major import BFLOAT16, FLOAT32, ComputeType, Epilogue, Layout, Operation, compute, memory

INVALID_VALUE, NOT_SUPPORTED, ALLOC_FAILED = 7, 15, 3
_ALIGNED = 256  # what cublasLt.h asks of a workspace

MatmulDescAttribute = IntEnum("MatmulDescAttribute", {
    "COMPUTE_TYPE": 0, "SCALE_TYPE": 1, "TRANSA": 3, "TRANSB": 4, "EPILOGUE": 7, "BIAS_POINTER": 8,
    "EPILOGUE_AUX_POINTER": 11, "EPILOGUE_AUX_LD": 12,
})  # fmt: skip
MatmulPreferenceAttribute = IntEnum("MatmulPreferenceAttribute", {
    "MAX_WORKSPACE_BYTES": 1, "REDUCTION_SCHEME_MASK": 3, "MIN_ALIGNMENT_A_BYTES": 5, "MIN_ALIGNMENT_B_BYTES": 6,
    "MIN_ALIGNMENT_C_BYTES": 7, "MIN_ALIGNMENT_D_BYTES": 8,
})  # fmt: skip
ReductionScheme = IntEnum("ReductionScheme", {"NONE": 0, "INPLACE": 1, "COMPUTE_TYPE": 2, "OUTPUT_TYPE": 4})
_DESC_DTYPES = {name: np.int32 for name in ("COMPUTE_TYPE", "SCALE_TYPE", "TRANSA", "TRANSB")} | {
    "EPILOGUE": np.uint32, "BIAS_POINTER": np.int64, "EPILOGUE_AUX_POINTER": np.int64, "EPILOGUE_AUX_LD": np.int64,
}  # fmt: skip
_PREFERENCE_DTYPES = {"MAX_WORKSPACE_BYTES": np.uint64, "REDUCTION_SCHEME_MASK": np.uint32} | {
    f"MIN_ALIGNMENT_{matrix}_BYTES": np.uint32 for matrix in "ABCD"
}
_POINTERS = ("BIAS_POINTER", "EPILOGUE_AUX_POINTER")


class cuBLASLtError(Exception):  # noqa: N801  (the library's own name)
    def __init__(self, status):
        super().__init__(f"the library says ({status})")
        self.status = status


class Library:
    """The module cublasLt. `calls` counts; `launches` holds what ran, with the `number` of its algorithm and how many
    were `asked` for; all compute the same. `refused` maps an epilogue to a status, or to 0 for a heuristic that
    succeeds and finds nothing.
    `answers`: how many algorithms it finds; `failed`: the numbers of those with a state that is an error; `broken` maps
    those that matmul refuses to a status."""

    MatmulDescAttribute, MatmulPreferenceAttribute = MatmulDescAttribute, MatmulPreferenceAttribute
    Epilogue, ReductionScheme, cuBLASLtError = Epilogue, ReductionScheme, cuBLASLtError
    matmul_heuristic_result_dtype = np.dtype([
        ("algo", [("data_", "<u8", (8,))]), ("workspace_size", "<u8"), ("state", "<i4"), ("waves_count", "<f4"),
        ("reserved", "<i4", (4,)),
    ])  # fmt: skip

    def __init__(self, cupy):
        self._cupy, self._objects, self._algorithms = cupy, {}, {}
        self.calls, self.launches, self.refused, self.create_error = Counter(), [], {}, None
        self.answers, self.failed, self.broken, self.version = 8, set(), {}, 120903

    @property
    def alive(self) -> int:
        """How many objects are not destroyed."""
        return len(self._objects)

    def _new(self, thing) -> int:
        self._assert_not_capturing()
        pointer = 0x10000 + 16 * sum(self.calls.values())
        self.calls[type(thing).__name__] += 1
        self._objects[pointer] = thing
        return pointer

    def _assert_not_capturing(self):
        assert not self._cupy.cuda.get_current_stream().is_capturing(), "made while a stream captures"

    def _destroy(self, pointer):
        del self._objects[pointer]

    def create(self):
        if self.create_error:
            raise self.create_error
        return self._new(SimpleNamespace())

    def destroy(self, light_handle):
        assert type(self._objects[light_handle]) is SimpleNamespace
        self._destroy(light_handle)

    def get_version(self):
        return self.version

    def matmul_desc_create(self, compute_type, scale_type):
        assert compute_type in list(ComputeType) and scale_type == FLOAT32
        attributes = {name: 0 for name in _DESC_DTYPES} | {"COMPUTE_TYPE": compute_type, "EPILOGUE": Epilogue.DEFAULT}
        return self._new(attributes)

    def matmul_desc_destroy(self, matmul_desc):
        self._destroy(matmul_desc)

    def get_matmul_desc_attribute_dtype(self, attr):
        return _DESC_DTYPES[MatmulDescAttribute(attr).name]

    def matmul_desc_set_attribute(self, matmul_desc, attr, buf, size_in_bytes):
        self._set(self._objects[matmul_desc], MatmulDescAttribute(attr).name, _DESC_DTYPES, buf, size_in_bytes)

    @staticmethod
    def _set(attributes, name, dtypes, buf, size_in_bytes):
        if size_in_bytes != np.dtype(dtypes[name]).itemsize:
            raise cuBLASLtError(INVALID_VALUE)
        attributes[name] = int(memory(buf, 1, dtypes[name])[0])

    def matrix_layout_create(self, type, rows, cols, ld):
        assert type in (FLOAT32, BFLOAT16) and rows > 0 and cols > 0 and ld >= rows, (type, rows, cols, ld)
        return self._new(Layout(type=type, rows=rows, cols=cols, ld=ld))

    def matrix_layout_destroy(self, mat_layout):
        self._destroy(mat_layout)

    def matmul_preference_create(self):
        everything = {"MAX_WORKSPACE_BYTES": 0, "REDUCTION_SCHEME_MASK": 7}
        return self._new(everything | {name: 256 for name in _PREFERENCE_DTYPES if "ALIGNMENT" in name})

    def matmul_preference_destroy(self, pref):
        self._destroy(pref)

    def get_matmul_preference_attribute_dtype(self, attr):
        return _PREFERENCE_DTYPES[MatmulPreferenceAttribute(attr).name]

    def matmul_preference_set_attribute(self, pref, attr, buf, size_in_bytes):
        name = MatmulPreferenceAttribute(attr).name
        self._set(self._objects[pref], name, _PREFERENCE_DTYPES, buf, size_in_bytes)

    def matmul_algo_get_heuristic(
        self, light_handle, operation_desc, adesc, bdesc, cdesc, ddesc, preference, requested_algo_count,
        heuristic_results_array, return_algo_count,
    ):  # fmt: skip
        self._assert_not_capturing()
        self.calls["heuristic"] += 1
        assert light_handle in self._objects and requested_algo_count > 0
        description, layouts = self._objects[operation_desc], (adesc, bdesc, cdesc, ddesc)
        self._assert_consistent(description, *(self._objects[layout] for layout in layouts))
        epilogue = Epilogue(description["EPILOGUE"]).name
        if self.refused.get(epilogue):
            raise cuBLASLtError(self.refused[epilogue])
        found = memory(heuristic_results_array, requested_algo_count, self.matmul_heuristic_result_dtype)
        count = 0 if epilogue in self.refused else min(self.answers, requested_algo_count)
        for number in range(count):
            key = len(self._algorithms) + 1
            self._algorithms[key] = SimpleNamespace(
                description=dict(description), layouts=layouts, preference=dict(self._objects[preference]),
                number=number, asked=requested_algo_count,
            )  # fmt: skip
            found["algo"]["data_"][number, 0] = key
            found["state"][number] = NOT_SUPPORTED if number in self.failed else 0
        memory(return_algo_count, 1, np.int32)[0] = count

    @staticmethod
    def _assert_consistent(description, a, b, c, d):
        """What the header asks of shapes, types and the epilogue's operands."""
        (m, k), (also_k, n) = a.of(description["TRANSA"]), b.of(description["TRANSB"])
        assert k == also_k and (d.rows, d.cols) == (m, n) and c == d, "shapes"
        assert a.type == b.type and d.type == FLOAT32, "types"
        epilogue = Epilogue(description["EPILOGUE"]).name
        assert (epilogue == "DEFAULT") == (description["BIAS_POINTER"] == 0), "a bias pointer where there is a bias"
        if epilogue in ("RELU_AUX_BIAS", "DRELU_BGRAD"):
            ld = description["EPILOGUE_AUX_LD"]
            assert description["EPILOGUE_AUX_POINTER"] and ld >= m and ld % 128 == 0, "the mask"

    def matmul(
        self, light_handle, compute_desc, alpha, a, adesc, b, bdesc, beta, c, cdesc, d, ddesc, algo, workspace,
        workspace_size_in_bytes, stream,
    ):  # fmt: skip
        assert light_handle in self._objects
        description = dict(self._objects[compute_desc])  # the addresses of this moment
        found = self._algorithms[int(memory(algo, 8, np.uint64)[0])]
        assert found.layouts == (adesc, bdesc, cdesc, ddesc), "an algorithm of other layouts"
        assert found.number not in self.failed, "an answer that failed"
        if found.number in self.broken:
            raise cuBLASLtError(self.broken[found.number])
        self._assert_within(found, description, {"A": a, "B": b, "C": c, "D": d})
        assert workspace % _ALIGNED == 0 and workspace_size_in_bytes > found.preference["MAX_WORKSPACE_BYTES"]
        assert (memory(alpha, 1, np.float32)[0], memory(beta, 1, np.float32)[0]) == (1, 0) and c == d
        layouts = [self._objects[layout] for layout in (adesc, bdesc, ddesc)]
        current = self._cupy.cuda.get_current_stream()
        assert stream == current.ptr, "not on the current stream"
        self.launches.append(SimpleNamespace(
            epilogue=Epilogue(description["EPILOGUE"]).name, workspace=workspace, stream=stream,
            preference=found.preference, number=found.number, asked=found.asked,
        ))  # fmt: skip
        current.do(lambda: compute(description, *(layout.at(p) for layout, p in zip(layouts, (a, b, d)))))

    @staticmethod
    def _assert_within(found, description, pointers):
        """The problem is the one that the algorithm was found for, and the addresses as aligned as was promised."""
        for matrix, pointer in pointers.items():
            assert pointer % found.preference[f"MIN_ALIGNMENT_{matrix}_BYTES"] == 0, f"{matrix} is not aligned"
        for name, value in found.description.items():
            if name in _POINTERS:
                assert description[name] % min(value & -value or 1, 256) == 0, f"{name} is not aligned"
            else:
                assert description[name] == value, f"{name} is not the algorithm's"


class Stream(stand_in_gpu.Stream):
    """The CuPy stand-in's, with an address, and with graphs that do what was recorded."""

    def __init__(self, cupy, ptr):
        super().__init__()
        self._cupy, self.ptr, self._work = cupy, ptr, []

    def is_capturing(self):
        return self.capturing

    def do(self, work):
        self._work.append(work) if self.capturing else work()

    def end_capture(self):
        graph, work = super().end_capture(), self._work
        launch, self._work = graph.launch, []
        graph.launch = lambda stream: (launch(stream), [step() for step in work])
        return graph

    def __enter__(self):
        self._cupy.current.append(self)
        return self

    def __exit__(self, *error):
        self._cupy.current.pop()


def install(monkeypatch, cupy, capability="90") -> Library:
    """Put the stand-in in nvmath's place, for a stand-in of CuPy, whose streams and arrays get addresses."""
    cupy.current = [Stream(cupy, 0)]
    pointer = property(lambda self: SimpleNamespace(
        ptr=self.ctypes.data, copy_from_device_async=lambda source, nbytes: None
    ))  # fmt: skip
    monkeypatch.setattr(stand_in_gpu.Array, "data", pointer)

    def stream(non_blocking=False):
        cupy.streams.append(Stream(cupy, 0x100 * (len(cupy.streams) + 1)))
        return cupy.streams[-1]

    def empty(shape, dtype=np.float32):
        """On an aligned address, as CuPy allocates."""
        assert not cupy.current[-1].capturing, "allocated while a stream captures"
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = np.empty(count + _ALIGNED, np.uint8)
        start = -raw.ctypes.data % _ALIGNED
        return raw[start : start + count].view(dtype).reshape(shape).view(stand_in_gpu.Array)

    def ones(shape, dtype=np.float64):
        array = empty(shape, dtype)
        array[...] = 1
        return array

    cupy.ones, device = ones, cupy.cuda.Device
    cupy.empty, cupy.cuda.Stream, cupy.cuda.get_current_stream = empty, stream, lambda: cupy.current[-1]
    cupy.cuda.Device = lambda: SimpleNamespace(**vars(device()), compute_capability=capability)
    library = Library(cupy)
    modules = {
        "nvmath": ModuleType("nvmath"), "nvmath.bindings.cublasLt": library,
        "nvmath.bindings.cublas": SimpleNamespace(ComputeType=ComputeType, Operation=Operation),
    }  # fmt: skip
    modules["nvmath.bindings"] = SimpleNamespace(cublasLt=library, cublas=modules["nvmath.bindings.cublas"])
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return library
