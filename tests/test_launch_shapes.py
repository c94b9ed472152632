"""Launch shapes as pure functions: within CUDA's limits, covering everything, no thread without a reason."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels import launches, source

MULTIPROCESSORS = st.integers(1, 200)
SIZES = st.one_of(st.integers(0, 5000), st.integers(0, 2**40))
LIMITS_GRID, LIMITS_BLOCK = (2**31 - 1, 65535, 65535), (1024, 1024, 64)
moderate = settings(deadline=None, max_examples=100)


def _assert_within_limits(grid, block):
    for shape, limits in ((grid, LIMITS_GRID), (block, LIMITS_BLOCK)):
        assert 1 <= len(shape) <= 3
        assert all(type(n) is int and 1 <= n <= limit for n, limit in zip(shape, limits, strict=False))
    threads = 1
    for n in block:
        threads *= n
    assert threads == launches.THREADS, "the kernels have __launch_bounds__(256) and count on it"


def _ceil(a, b):
    return -(-a // b)


@moderate
@given(SIZES, MULTIPROCESSORS)
@example(2**62, 1)
def test_flat(elements, multiprocessors):
    grid, block = launches.flat_shape(elements, multiprocessors)
    _assert_within_limits(grid, block)
    blocks = _ceil(elements, 4 * block[0])
    assert grid[0] <= max(1, blocks), "a block without work"
    assert grid[0] >= min(blocks, 8 * multiprocessors), "8 blocks of 256 threads fill a multiprocessor"


@moderate
@given(SIZES, st.one_of(st.integers(0, 2000), st.integers(0, 2**31 - 1)), MULTIPROCESSORS)
@example(2**40, 1, 200)
@example(1, 2**31 - 1, 200)
@example(512, 400, 132)
def test_tiles(B, N, multiprocessors):
    """Blocks (x, y) have columns [128 x, 128 x + 128) and ceil(B / grid y) rows each: see bias_act.cuh."""
    (tiles, row_blocks), block = launches.tile_shape(B, N, multiprocessors)
    _assert_within_limits((tiles, row_blocks), block)
    assert block[0] * 4 == launches.TILE_COLUMNS and block[1] == launches.TILE_ROWS
    assert tiles * launches.TILE_COLUMNS >= N and (tiles - 1) * launches.TILE_COLUMNS < max(1, N)
    rows = _ceil(B, row_blocks)
    assert row_blocks * rows >= B
    assert row_blocks <= max(1, _ceil(B, launches.TILE_ROWS)), "a block without a row for each of its row groups"
    # The last block adds row_blocks partial sums, so there may be no more of them than fill the GPU.
    assert (row_blocks - 1) * tiles < max(1, 4 * multiprocessors)
    if B >= 8 * launches.TILE_ROWS * multiprocessors:
        assert tiles * row_blocks >= 4 * multiprocessors, "fewer blocks than fill the GPU"


@moderate
@given(SIZES, MULTIPROCESSORS)
@example(2**40, 200)
def test_rows(B, multiprocessors):
    grid, block = launches.row_shape(B, multiprocessors)
    _assert_within_limits(grid, block)
    blocks = _ceil(B, block[0] // 32)
    assert min(blocks, 2 * multiprocessors) <= grid[0] <= max(1, min(blocks, 8 * multiprocessors))


def test_a_small_batch_still_spreads_over_the_gpu():
    """A batch of 512 in one block per 128 rows would use 4 of the 132 multiprocessors of an H100."""
    assert launches.row_shape(512, 132)[0][0] >= 64
    for N in (47, 120, 240, 400):
        tiles, row_blocks = launches.tile_shape(512, N, 132)[0]
        assert tiles * row_blocks >= 64


@pytest.mark.parametrize("C", [*range(1, 70), *range(1000, 1030), 2**31 - 1])
def test_softmax_kernel_holds_the_row(C):
    items = int(launches.softmax_kernel(C).removeprefix("softmax_xent_"))
    smaller = [n for n in launches.REGISTER_ROWS if n < items]
    if items == 0:
        assert C > 32 * max(launches.REGISTER_ROWS)
    else:
        assert 32 * items >= C and all(32 * n < C for n in smaller)


def test_the_numbers_shared_with_the_sources_agree():
    text = source.inlined("module.cu")
    assert f"TILE_COLUMNS = {launches.TILE_COLUMNS}, TILE_ROWS = {launches.TILE_ROWS};" in text
    assert f"XENT_THREADS = {launches.THREADS};" in text
    assert set(re.findall(r"KERNEL\((\w+)\)", text)) == {"threads", str(launches.THREADS), "XENT_THREADS"}
    register_rows = {int(n) for n in re.findall(r"^SOFTMAX_XENT\((\d+)\)", text, re.MULTILINE)}
    assert register_rows == {0, *launches.REGISTER_ROWS}
