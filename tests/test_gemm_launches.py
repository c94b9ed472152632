"""The launches of the products of a layer: their shapes, what is refused, and the instructions of the compiled code."""

import functools
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels import ACTIVATIONS, BackendError, simt, source
from kernels.gemm import COLUMNS, DEPTH, LARGE, MEETING, PART, PRECISIONS, SHARED_BYTES, SMALL, Gemm, gemm_shape
from kernels.launches import THREADS

from . import resources
from .backends import simt_backend
from .checks import assert_same_bits
from .gemm_cases import LAYERS
from .test_compile import OPTIONS, nvrtc

SIZES = st.one_of(st.integers(0, 3000), st.integers(0, 2**24))


@settings(deadline=None, max_examples=200)
@given(SIZES, SIZES, SIZES, st.integers(0, 200))
@example(512, 400, 784, 132)
@example(120, 47, 16384, 132)
def test_launch_shapes(M, N, K, multiprocessors):
    s = gemm_shape(M, N, K, multiprocessors)
    assert s.rows in (SMALL, LARGE) and s.depth % DEPTH == 0
    assert (s.row_tiles - 1) * s.rows < max(1, M) <= s.row_tiles * s.rows or M == 0
    assert (s.column_tiles - 1) * COLUMNS < max(1, N) <= s.column_tiles * COLUMNS
    assert (s.splits - 1) * s.depth < max(1, K) <= s.splits * s.depth, "a block without work, or work without a block"
    assert (s.rows == LARGE) == (max(1, -(-M // LARGE)) * s.column_tiles >= 2 * multiprocessors)
    assert s.splits == 1 or s.rows == SMALL and s.tiles * s.splits <= multiprocessors, "a block that has to wait"
    if s.rows == SMALL:
        def time(depth, splits):
            return depth + (splits > 1) * (MEETING + PART * splits)

        fits = range(1, max(1, multiprocessors // s.tiles) + 1)
        steps = max(1, -(-K // DEPTH))
        best = min(time(-(-steps // n), n) for n in fits)
        assert time(s.depth // DEPTH, s.splits) <= best, "more or fewer blocks would be faster"


@pytest.mark.parametrize("multiprocessors", [20, 132])
def test_the_layers_at_batch_512_fill_the_gpu(multiprocessors):
    """Blocks for at least two thirds of the multiprocessors, or none with more than 8 * DEPTH of K."""
    for K, N in LAYERS:
        for shape in ((512, N, K), (512, K, N), (K, N, 512)):
            s = gemm_shape(*shape, multiprocessors)
            assert 3 * s.tiles * s.splits >= 2 * multiprocessors or s.depth <= 8 * DEPTH, shape


def test_the_numbers_shared_with_the_sources_agree():
    text = source.inlined("module.cu")
    assert f"GEMM_THREADS = {THREADS};" in text and f"GEMM_COLUMNS = {COLUMNS};" in text
    assert f"SHARED_FLOATS = {SHARED_BYTES // 4096} * 1024;" in text
    assert {int(n) for n in re.findall(r"^GEMM\(\w+, \w+, (\d+)\)", text, re.MULTILINE)} == {SMALL, LARGE}
    cases_of = re.findall(r"case (\d): return f\((\w+)\{\}\)|default: return f\((\w+)\{\}\)", text)
    names = [(a or b).lower() for _, a, b in cases_of]
    assert names == [a.replace("_", "") for a in ACTIVATIONS] and [n for n, *_ in cases_of[:-1]] == list("01234")


# ---- what is refused


def _arguments():
    f = functools.partial(np.zeros, dtype=np.float32)
    return {
        "forward": dict(x=f((4, 3)), w=f((3, 5)), out=f((4, 5)), bias=f(5), z=f((4, 5))),
        "input_gradient": dict(dz=f((4, 5)), w=f((3, 5)), out=f((4, 3)), saved=f((4, 3)), bias=f(3), bias_grad=f(3)),
        "weight_gradient": dict(x=f((4, 3)), dz=f((4, 5)), out=f((3, 5))),
    }


REFUSED = [(form, name) for form, arrays in _arguments().items() for name in arrays]


@pytest.mark.parametrize("form, name", REFUSED)
def test_wrong_arrays(form, name):
    call = getattr(Gemm(simt_backend().device, "tf32"), form)
    right = _arguments()[form]
    array = right[name]
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), np.float32)
    wrong = [
        (TypeError, array.tolist()), (TypeError, array.astype(np.float64)), (ValueError, array[None]),
        (ValueError, wide[..., ::2]), (ValueError, np.zeros((7,) * array.ndim, np.float32)),
    ]  # fmt: skip
    names = list(right)
    for error, value in wrong:
        # The first array may have any shape: the second one does not fit it, then.
        named = names[1] if value is wrong[-1][1] and name == names[0] else name
        with pytest.raises(error, match=rf"\b{named}\b"):
            call(**(right | {name: value}))
    if name in ("out", "z", "bias_grad"):
        array.setflags(write=False)
        with pytest.raises(ValueError, match=rf"{name} must be writeable"):
            call(**right)


@pytest.mark.parametrize("form, name", [(f, n) for f, n in REFUSED if n in ("out", "z", "bias_grad")])
def test_outputs_that_share_memory(form, name):
    right = _arguments()[form]
    call = getattr(Gemm(simt_backend().device, "bf16"), form)
    for other, array in right.items():
        if other == name:
            continue
        memory = np.zeros(array.size + right[name].size, np.float32)
        first, second = memory[: array.size], memory[array.size - 1 :][: right[name].size]
        with pytest.raises(ValueError, match=f"({name}|{other}) must not share memory with ({name}|{other})"):
            call(**(right | {other: first.reshape(array.shape), name: second.reshape(right[name].shape)}))


def test_wrong_settings():
    device = simt_backend().device
    with pytest.raises(ValueError, match="precision must be one of tf32, bf16, got 'float32'"):
        Gemm(device, "float32")
    forward, backward, _ = _arguments().values()
    with pytest.raises(ValueError, match="activation must be one of identity"):
        Gemm(device, "tf32").forward(**forward, activation="tanh")
    with pytest.raises(ValueError, match=r"saved must be an array of shape \(4, 3\) where activation is relu, got"):
        Gemm(device, "tf32").input_gradient(**(backward | {"saved": None}), activation="relu")


def test_a_gpu_without_the_instructions_is_an_error(monkeypatch):
    device = simt_backend().device
    monkeypatch.setattr(device, "compute_capability", lambda: 75)
    for form, arguments in _arguments().items():
        with pytest.raises(BackendError, match="need compute capability 8.0 or newer, and this GPU has 7.5; use"):
            getattr(Gemm(device, "tf32"), form)(**arguments)


# ---- the instructions


def test_mistakes_with_asynchronous_copies_show():
    """Each is a wrong result or a sentence without a sanitizer, and the kernel beside it is right."""
    runner = simt.Runner(Path(__file__).parent / "cuda" / "planted_copies.cu", timeout=20)
    x = np.arange(1, 65, dtype=np.float32)
    sentences = {
        "misaligned_copy": "16 does not divide the address",
        "never_waited": "without waiting for its cp.async",
        "part_of_an_mma": "lanes of the warp have returned",
    }
    for name in ("missing_wait", "missing_commit", "early_copy", *sentences):
        expected = x[::-1] if name != "misaligned_copy" else np.append(x[3::-1], np.zeros(60, np.float32))
        right, wrong = (np.full(64, np.nan, np.float32) for _ in range(2))
        runner.launch(f"{name}_right", (1,), (64,), (x, right))
        assert_same_bits(right, expected)
        if name in sentences:
            with pytest.raises(simt.SimtError, match=sentences[name]):
                runner.launch(f"{name}_wrong", (1,), (64,), (x, wrong))
        else:
            runner.launch(f"{name}_wrong", (1,), (64,), (x, wrong))
            assert np.isnan(wrong).any(), name
    runner.close()


_ENTRIES = """
KERNEL(2) tf32(const float* a, const float* b, float* c, unsigned* n, index_t M) {
  ON_TENSOR_CORES(gemm_forward<Tf32, 64>(a, b, a, c, c, c, n, M, M, M, M, 0));
}
KERNEL(2) bf16(const float* a, const float* b, float* c, unsigned* n, index_t M) {
  ON_TENSOR_CORES(gemm_weight_gradient<Bf16, 128>(a, b, c, c, n, M, M, M, M));
}
"""


@pytest.mark.parametrize("architecture", [75, 80, 120])
def test_instructions(architecture):
    """Of one kernel of each precision, because all of them take long to compile."""
    nvrtc()
    text = re.sub(r"^(BIAS_ACT|SOFTMAX_XENT|GEMM)\(.*\n", "", source.inlined("module.cu"), flags=re.MULTILINE)
    ptx = resources.compile_nvrtc(text + _ENTRIES, *OPTIONS, f"-arch=compute_{architecture}")[0].decode()
    bodies = {name: re.search(rf"\.entry {name}\(.*?\n\}}", ptx, re.DOTALL)[0] for name in PRECISIONS}
    matrix = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
    expected = {
        "tf32": ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", "cvt.rna.tf32.f32", matrix),
        "bf16": ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "cvt.rn.bf16x2.f32"),
    }
    copies = ("cp.async.cg.shared.global", "cp.async.ca.shared.global", "cp.async.commit_group", "cp.async.wait_group")
    for precision, body in bodies.items():
        if architecture < 80:
            assert "trap;" in body and "bar.sync" not in body
        else:
            assert [x for x in (*expected[precision], *copies) if x not in body] == [] and "trap;" not in body
