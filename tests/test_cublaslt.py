"""cuBLASLt's plans, workspaces and objects, what CublasLt refuses, and that its stand-in is like the real bindings."""

import gc
import inspect
import sys

import numpy as np
import pytest

from mlp import InputError
from mlp.cublaslt import CublasLt, Unsupported

from . import fake_nvmath, stand_in_gpu
from .checks import Backend
from .column_major import ComputeType, Epilogue, Operation
from .products import SMALL_WORKSPACE, Data, check_products, every_precision, library_fixture  # noqa: F401  (used)


# ---------------------------------------------------------------------------------------- plans and workspaces


def forward(library, lt, B=5, K=33, N=47, offset=0):
    xp = library.gpu.xp
    x, weight = library.gpu.array(np.ones((B, K)), offset=offset), xp.ones((K, N), np.float32)
    out = xp.empty((B, N))
    lt.forward(x, weight, out)
    return out


def test_a_plan_is_made_once(library):
    lt = CublasLt("fp32", SMALL_WORKSPACE)
    for _ in range(3):
        forward(library, lt)
        assert (forward(library, lt, B=6) == 33).all()
    assert library.calls["heuristic"] == 2
    forward(library, lt, offset=1)
    assert library.calls["heuristic"] == 3, "an array on another alignment needs another algorithm"


def test_a_plan_reads_and_writes_where_each_call_says(library):
    lt, xp = CublasLt("fp32", SMALL_WORKSPACE), library.gpu.xp
    x, weight = (library.gpu.array(np.ones(shape)) for shape in ((5, 33), (33, 47)))
    called = []
    for bias in (7.0, -40.0):
        out, mask = xp.empty((5, 47)), xp.empty(lt.mask_shape(5, 47), np.uint8)
        mask[...] = 0
        lt.forward_act(x, weight, library.gpu.array(np.full(47, bias)), "relu", out, mask)
        called.append((out, mask))
    assert library.calls["heuristic"] == 1
    for (out, mask), value, bits in zip(called, (40.0, 0.0), (47, 0)):
        assert (out == value).all() and (np.unpackbits(mask, axis=1).sum(axis=1) == bits).all()


def test_a_workspace_for_each_stream(library):
    lt, xp = CublasLt("fp32", SMALL_WORKSPACE), library.gpu.xp
    streams = [xp.cuda.Stream(non_blocking=True) for _ in range(2)]
    for stream in (*streams, *streams):
        with stream:
            forward(library, lt)
    used = [(launch.stream, launch.workspace) for launch in library.launches]
    assert used[:2] == used[2:] and len(set(used)) == 2 and used[0][1] != used[1][1]
    assert library.calls["heuristic"] == 1


def test_sums_are_added_in_a_fixed_order(library):
    forward(library, CublasLt("fp32", SMALL_WORKSPACE))
    scheme = fake_nvmath.ReductionScheme
    preference = library.launches[0].preference
    assert preference["REDUCTION_SCHEME_MASK"] & ~(scheme.COMPUTE_TYPE | scheme.NONE) == 0
    assert preference["MAX_WORKSPACE_BYTES"] == SMALL_WORKSPACE


@pytest.mark.parametrize("missing", ["plan", "workspace"])
def test_a_capture_before_everything_is_made(library, missing):
    lt, stream = CublasLt("fp32", SMALL_WORKSPACE), library.gpu.xp.cuda.Stream(non_blocking=True)
    x, weight, out = (library.gpu.xp.ones(shape, np.float32) for shape in ((5, 33), (33, 47), (5, 47)))
    if missing == "workspace":
        lt.forward(x, weight, out)
    else:
        with stream:
            lt.weight_gradient(x, out, weight)
    before = library.alive
    with stream:
        stream.begin_capture()
        with pytest.raises(RuntimeError, match="run the step once on this stream.*before capturing"):
            lt.forward(x, weight, out)
        stream.end_capture()
        assert library.alive == before
        lt.forward(x, weight, out)


@pytest.mark.parametrize("status", [0, fake_nvmath.NOT_SUPPORTED, fake_nvmath.INVALID_VALUE])
def test_no_algorithm(library, status, rng):
    library.refused["RELU_BIAS"] = status
    lt, data = CublasLt("bf16", SMALL_WORKSPACE), Data(library.gpu, "bf16", rng)
    args = data.factor(5, 33)[0], data.factor(33, 47)[0], data.vector(47)[0]
    out = library.gpu.xp.empty((5, 47))
    for _ in range(2):
        with pytest.raises(Unsupported, match="12.9.3 has no algorithm for RELU_BIAS of bf16, m 47, n 5, k 33"):
            lt.forward_act(*args, "relu", out)
    assert library.calls["heuristic"] == 1, "the answer is kept, too"
    lt.forward_act(*args, "identity", out)


def numbered(library, lt, number):
    ones = library.gpu.xp.ones((4, 4), np.float32)
    lt.forward(ones, ones, library.gpu.xp.empty((4, 4)), algorithm=number)


def test_the_algorithm_that_is_asked_for(library):
    lt = CublasLt("fp32", SMALL_WORKSPACE)
    for number in (2, 0, 7, 2):
        numbered(library, lt, number)
    forward(library, lt)
    assert [launch.number for launch in library.launches] == [2, 0, 7, 2, 0]
    assert [launch.asked for launch in library.launches] == [3, 1, 8, 3, 1], "the first alone, where it is the first"
    assert library.calls["heuristic"] == 4, "the answers are kept"


@pytest.mark.parametrize("what", [{"answers": 2}, {"failed": {2}}, {"broken": {2: fake_nvmath.NOT_SUPPORTED}}])
def test_an_algorithm_that_is_missing(library, what):
    vars(library).update(what)
    lt = CublasLt("fp32", SMALL_WORKSPACE)
    with pytest.raises(Unsupported, match="12.9.3 (refuses an algorithm that it found|has no .* none of number 2)"):
        numbered(library, lt, 2)
    numbered(library, lt, 1)
    assert [launch.number for launch in library.launches] == [1]


def test_another_error_of_a_product_is_not_hidden(library):
    library.broken[0] = fake_nvmath.ALLOC_FAILED
    with pytest.raises(fake_nvmath.cuBLASLtError):
        forward(library, CublasLt("fp32", SMALL_WORKSPACE))


def test_another_error_of_the_heuristic_is_not_hidden(library):
    library.refused["DEFAULT"] = fake_nvmath.ALLOC_FAILED
    with pytest.raises(fake_nvmath.cuBLASLtError):
        forward(library, CublasLt("fp32", SMALL_WORKSPACE))


def test_gradients_of_one_term(library):
    lt, (one, vector) = CublasLt("fp32"), (library.gpu.xp.ones(shape, np.float32) for shape in ((1, 1), 1))
    mask = library.gpu.xp.zeros(lt.mask_shape(1, 1), np.uint8)
    with pytest.raises(Unsupported, match="BGRADA of fp32, m 1, n 1, k 1"):
        lt.weight_gradient_bias(one, one, one, vector)
    with pytest.raises(Unsupported, match="DRELU_BGRAD of fp32, m 1, n 1, k 1"):
        lt.input_gradient_relu(one, one, mask, one, vector)


def test_other_activations(library):
    with pytest.raises(Unsupported, match="relu or identity.*got silu"):
        CublasLt("fp32").forward_act(None, None, None, "silu", None)


def test_everything_is_destroyed(library):
    lt, other = CublasLt("fp32", SMALL_WORKSPACE), CublasLt("fp32", SMALL_WORKSPACE)
    forward(library, lt)
    assert library.alive > 2
    lt.close()
    lt.close()
    assert library.alive == 1
    with pytest.raises(RuntimeError, match="closed; make a new one"):
        forward(library, lt)
    del other
    gc.collect()
    assert library.alive == 0


# ---------------------------------------------------------------------------------------- what is refused

NEEDED = {"x": (5, 33), "weight": (33, 47), "out": (5, 47), "bias": (47,), "mask": (5, 16)}


@pytest.mark.parametrize("name, wrong, match", [
    ("weight", lambda xp: xp.ones((34, 47), np.float32), r"x \(5, 33\) and weight \(34, 47\) cannot be multiplied: 33"),
    ("x", lambda xp: xp.ones(33, np.float32), r"x must be C-contiguous float32 of shape \(any, any\)"),
    ("x", lambda xp: xp.ones((0, 33), np.float32), "x must be .* none of it 0"),
    ("x", lambda xp: xp.ones((33, 5), np.float32).T, r"x must be C-contiguous .* strides \(4, 20\)"),
    ("x", lambda xp: xp.ones((5, 33)), r"x must be C-contiguous float32 .*, got float64 \(5, 33\)"),
    ("weight", lambda xp: xp.ones((33, 47), np.uint16), "weight must be C-contiguous float32 .*, got uint16"),
    ("out", lambda xp: xp.ones((5, 46), np.float32), r"out must be .* of shape \(5, 47\)"),
    ("out", lambda xp: xp.ones((5, 94), np.float32)[:, ::2], "out must be C-contiguous"),
    ("bias", lambda xp: None, r"bias must be .* of shape \(47,\), none of it 0, got None"),
    ("bias", lambda xp: xp.ones((1, 47), np.float32), r"bias must be .* of shape \(47,\)"),
    ("mask", lambda xp: xp.ones((5, 6), np.uint8), r"mask must be C-contiguous uint8 of shape \(5, 16\)"),
    ("mask", lambda xp: xp.ones((5, 16), bool), "mask must be C-contiguous uint8"),
    ("x", lambda xp: np.ones((5, 33), np.float32), "all arrays must be CuPy arrays, got ndarray"),
])  # fmt: skip
def test_wrong_arguments(library, name, wrong, match):
    xp = library.gpu.xp
    arrays = {key: xp.ones(shape, np.uint8 if key == "mask" else np.float32) for key, shape in NEEDED.items()}
    lt = CublasLt("fp32", SMALL_WORKSPACE)
    lt.forward_act(activation="relu", **arrays)
    arrays[name] = wrong(xp)
    with pytest.raises(ValueError, match=match):
        lt.forward_act(activation="relu", **arrays)
    assert len(library.launches) == 1


def test_a_mask_where_it_does_not_belong_or_is_missing(library):
    arrays = [library.gpu.xp.ones(shape, np.float32) for shape in ((5, 47), (33, 47), (5, 33), 33)]
    lt, (dz, weight, out, vector) = CublasLt("fp32"), arrays
    with pytest.raises(ValueError, match="mask must be None where activation is identity"):
        lt.forward_act(out, weight, vector, "identity", dz, mask=dz)
    with pytest.raises(ValueError, match="mask must be .* got None"):
        lt.input_gradient_relu(dz, weight, None, out, vector)


def test_without_nvmath(library, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvmath", None)
    for name in ("nvmath.bindings", "nvmath.bindings.cublas", "nvmath.bindings.cublasLt"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(InputError, match="nvmath-python .*; run `pip install nvmath-python`"):
        CublasLt("fp32")


def test_without_cublaslt(library):
    library.create_error = RuntimeError("no driver\n is found")
    with pytest.raises(InputError, match=r"cuBLASLt cannot be used \(no driver is found\)"):
        CublasLt("fp32")


@every_precision
def test_on_an_old_gpu(monkeypatch, precision, rng):
    cupy = stand_in_gpu.install(monkeypatch)
    library = fake_nvmath.install(monkeypatch, cupy, capability="75")
    if precision == "fp32":
        check_products(
            Backend("stand-in", cupy, None), CublasLt(precision, SMALL_WORKSPACE), precision, (5, 33, 47), rng
        )
        return
    with pytest.raises(InputError, match=f"{precision} products need compute capability 8.0, the GPU has 75"):
        CublasLt(precision)
    gc.collect()
    assert library.alive == 0


def test_an_unknown_precision(library):
    with pytest.raises(ValueError, match="one of fp32, tf32, bf16, got 'fp16'"):
        CublasLt("fp16")


# ---------------------------------------------------------------------------------------- the stand-in


def test_the_stand_in_is_like_the_real_bindings():
    """Names, parameters, values and dtypes of all that the stand-in has: what cublaslt.py uses."""
    real, blas = pytest.importorskip("nvmath.bindings.cublasLt"), pytest.importorskip("nvmath.bindings.cublas")
    for name, function in vars(fake_nvmath.Library).items():
        if inspect.isfunction(function) and not name.startswith("_"):
            parameters = list(inspect.signature(function).parameters)[1:]
            assert list(inspect.signature(getattr(real, name)).parameters) == parameters, name
    attributes = fake_nvmath.MatmulDescAttribute, fake_nvmath.MatmulPreferenceAttribute
    enums = ((real, (*attributes, Epilogue, fake_nvmath.ReductionScheme)), (blas, (ComputeType, Operation)))
    for module, ours in enums:
        for enum in ours:
            theirs = {member.name: member.value for member in getattr(module, enum.__name__)}
            assert {member.name: member.value for member in enum}.items() <= theirs.items()
    library = fake_nvmath.Library(None)
    for attribute in attributes[0]:
        assert real.get_matmul_desc_attribute_dtype(attribute) == library.get_matmul_desc_attribute_dtype(attribute)
    for attribute in attributes[1]:
        ours = library.get_matmul_preference_attribute_dtype(attribute)
        assert real.get_matmul_preference_attribute_dtype(attribute) == ours
    theirs, ours = real.matmul_heuristic_result_dtype, library.matmul_heuristic_result_dtype
    assert theirs.itemsize == ours.itemsize
    assert {n: theirs.fields[n][1] for n in theirs.names} == {n: ours.fields[n][1] for n in ours.names}
    assert issubclass(real.cuBLASLtError, Exception)
