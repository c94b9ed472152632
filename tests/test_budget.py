"""Registers, shared memory, stack and spills of every kernel on every architecture, against budget.toml.

This is NVRTC's code; test_fatbin.py does the same for nvcc's, where there is one.
"""

import functools
import re

import pytest

from kernels import cuda, source
from kernels.launches import NORM_BLOCKS, ROW_BLOCKS, TILE_BLOCKS

from . import resources
from .test_compile import OPTIONS, checked, compiled, entry_points, module_log


def assert_within_budget(log, architectures):
    """Every kernel is reported for every architecture, and none takes more than budget.toml allows."""
    usages = resources.parse(log)
    assert {(u.kernel, u.architecture) for u in usages} == {(k, a) for k in entry_points() for a in architectures}
    budgets = resources.budgets()
    faults = [f for u in usages for f in resources.faults(u, budgets[resources.budget_name(u.kernel)])]
    assert not faults, "\n".join(faults)
    return set(entry_points())


SOME = (75, 90, 120)  # the oldest, the newest and one between; the others differ from them in little


@pytest.mark.parametrize("architecture", cuda.ARCHITECTURES)
def test_nvrtc(architecture, every_case):
    """The module compiles without a warning, and stays within the budget."""
    if architecture not in SOME and not every_case:
        pytest.skip("takes half a minute: give --every-case")
    assert_within_budget(module_log(architecture), [architecture])


_PLANTED = """
extern "C" __global__ void __launch_bounds__(256, BLOCKS) planted(float* x, int n) {
  __shared__ float shared[256];
  shared[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  float held[100];
  for (int k = 0; k < 100; ++k) held[k] = x[k * n] + shared[k];
  for (int k = 0; k < 100; ++k) x[k * n] = held[k] * held[99 - k];
}
extern "C" __global__ void indexed(float* x, int n) {
  float held[100];
  for (int k = 0; k < 100; ++k) held[k] = x[k];
  for (int k = 0; k < n; ++k) x[k] = held[99 - (n * k) % 100];
}
"""


@functools.cache
def _planted(blocks):
    """What is wrong with kernels that take too much, where 8 blocks of 256 threads and no memory are allowed."""
    log = checked(resources.nvrtc_log, _PLANTED.replace("BLOCKS", str(blocks)), 90)
    usages = resources.parse(log)
    assert {u.kernel for u in usages} == {"planted", "indexed"}
    return "\n".join(f for u in usages for f in resources.faults(u, {"blocks": 8, "shared": 0}))


@pytest.mark.parametrize("blocks, sentence", [
    (1, r"planted on sm_90 uses \d+ registers per thread, and budget.toml allows 32"),
    (8, r"planted on sm_90 uses \d+ bytes of spill stores, and budget.toml allows 0"),
    (8, r"planted on sm_90 uses \d+ bytes of spill loads, and budget.toml allows 0"),
    (8, r"planted on sm_90 uses 1024 bytes of static shared memory, and budget.toml allows 0"),
    (8, r"indexed on sm_90 uses 400 bytes of stack, and budget.toml allows 0"),
])  # fmt: skip
def test_too_much_would_be_noticed(blocks, sentence):
    assert re.search(sentence, _planted(blocks))


@pytest.mark.parametrize("architecture, registers, shared, blocks", [
    (75, 64, 0, 4), (75, 65, 0, 3), (86, 40, 0, 6), (86, 41, 0, 5), (90, 32, 0, 8), (90, 33, 0, 6), (90, 255, 0, 1),
    (86, 32, 16384, 5), (90, 32, 49152, 4), (75, 32, 16384, 4),
])  # fmt: skip
def test_resident_blocks(architecture, registers, shared, blocks):
    """Registers come in steps of 8 per thread; a block's shared memory takes 1 KiB more from 8.0 on."""
    usage = resources.Usage("k", architecture, 0, 0, 0, registers, shared)
    assert usage.resident_blocks() == blocks
    if shared == 0:
        assert resources.allowed_registers(blocks + 1) < registers <= resources.allowed_registers(blocks)
    assert not resources.faults(usage, {"blocks": blocks, "shared": shared})
    assert resources.faults(usage, {"blocks": blocks + 1, "shared": shared}) or blocks == resources.room(architecture)


def test_budget_launches_and_sources_count_on_the_same_blocks():
    ptx = compiled(source.inlined("module.cu"), *OPTIONS, "-arch=compute_90").decode()
    declared = dict(re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid 256, 1, 1\s*\.minnctapersm (\d+)", ptx))
    budgets = resources.budgets()
    assert set(declared) == set(entry_points())
    assert {resources.budget_name(kernel) for kernel in declared} == set(budgets), "a budget of no kernel"
    for kernel, blocks in declared.items():
        assert budgets[resources.budget_name(kernel)]["blocks"] == int(blocks), kernel
    rows = {n: int(declared[f"softmax_xent_{n}"]) for n in ROW_BLOCKS}
    assert rows == ROW_BLOCKS and int(declared["norm_act_relu"]) == int(declared["norm_input_gradient"]) == NORM_BLOCKS
    tiled = ("bias_act_backward_relu", "batch_norm_stats", "norm_act_backward_relu")
    assert {int(declared[kernel]) for kernel in tiled} == {TILE_BLOCKS}


@pytest.mark.parametrize("architecture", cuda.ARCHITECTURES)
def test_sources_know_how_many_threads_a_multiprocessor_holds(architecture):
    text = source.inlined("module.cu")
    room = re.search(r"#if __CUDA_ARCH__ == 750\n(#.*\n)*?#endif\n", text)[0]
    value = resources.room(architecture)
    compiled(f'{room}static_assert(ROOM == {value}, "");', *OPTIONS, f"-arch=compute_{architecture}")
