"""Launch shapes as pure functions: within CUDA's limits, covering everything, no thread without a reason."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels import launches, source

MULTIPROCESSORS, ROOM = st.integers(1, 200), st.sampled_from((4, 6, 8))
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
    assert threads <= launches.THREADS, "the kernels have __launch_bounds__(256) and count on it"


def _ceil(a, b):
    return -(-a // b)


@moderate
@given(SIZES, MULTIPROCESSORS, ROOM, st.integers(1, 8))
@example(2**62, 1, 8, 1)
@example(2**21, 132, 8, 2)
def test_flat(elements, multiprocessors, room, packs):
    grid, block = launches.flat_shape(elements, multiprocessors, room, packs)
    _assert_within_limits(grid, block)
    assert block in ((64,), (128,), (256,))
    blocks, wave = _ceil(elements, 4 * block[0]), room * multiprocessors
    assert grid[0] <= max(1, blocks), "a block without work"
    assert min(blocks, wave) <= grid[0], "fewer blocks than fill the GPU"
    if grid[0] > wave:
        assert grid[0] == min(_ceil(blocks, packs), 16 * wave), "a thread with fewer packs than it loads at once"
    if block[0] < 256:
        assert _ceil(elements, 8 * block[0]) < 4 * multiprocessors, "small blocks without need"
    else:
        assert _ceil(elements, 4 * 128) >= 4 * multiprocessors, "large blocks on a part of the GPU"
        assert grid[0] == max(1, blocks) or grid[0] >= wave


@moderate
@given(SIZES, st.one_of(st.integers(0, 2000), st.integers(0, 2**31 - 1)), MULTIPROCESSORS)
@example(2**40, 1, 200)
@example(1, 2**31 - 1, 200)
@example(512, 400, 132)
@example(3495, 400, 132)
def test_tiles(B, N, multiprocessors):
    """Blocks (x, y) have 4 block x columns, and ceil(B / grid y) rows each, of which a thread has every block y-th."""
    (tiles, row_blocks), (width, groups) = launches.tile_shape(B, N, multiprocessors)
    _assert_within_limits((tiles, row_blocks), (width, groups))
    assert width % 2 == 0 and width <= 32 and width * (groups + 1) > launches.THREADS
    assert tiles * 4 * width >= N and (tiles - 1) * 4 * width < max(1, N)
    rows = _ceil(B, row_blocks)
    assert row_blocks * rows >= B
    assert row_blocks <= max(1, _ceil(B, groups)), "a block without a row for each of its row groups"
    slots = launches.TILE_BLOCKS * multiprocessors
    assert row_blocks == 1 or tiles * row_blocks <= slots, "a second wave"
    if _ceil(B, groups) > launches.ROWS_PER_THREAD and B >= groups * slots:
        assert (tiles + _ceil(tiles, 8)) * (row_blocks + 1) > slots, "fewer blocks than fill the GPU"


@pytest.mark.parametrize(
    "N, width", [(1, 2), (47, 2), (400, 2), (2112, 2), (2113, 4), (4096, 4), (8448, 8), (20_000, 32)]
)
def test_few_rows_take_one_phase(N, width):
    """Up to 8 rows per thread leave no partial sums, in at most two blocks per multiprocessor if possible."""
    most = launches.ROWS_PER_THREAD * (launches.THREADS // width)
    assert launches.tile_shape(most, N, 132) == ((_ceil(N, 4 * width), 1), (width, launches.THREADS // width))
    assert launches.tile_shape(most + 1, N, 132)[0][1] > 1


@moderate
@given(SIZES, st.integers(1, 2000), MULTIPROCESSORS, ROOM)
@example(2**40, 47, 200, 8)
def test_rows(B, C, multiprocessors, room):
    grid, block = launches.row_shape(B, C, multiprocessors, room)
    _assert_within_limits(grid, block)
    resident = min(room, launches.ROW_BLOCKS[launches.softmax_items(C)])
    assert grid[0] == max(1, min(_ceil(B, block[0] // 32), resident * multiprocessors))


def test_a_small_batch_still_spreads_over_the_gpu():
    """A batch of 512 in one block per 128 rows would use 4 of the 132 multiprocessors of an H100."""
    assert launches.row_shape(512, 47, 132, 8)[0][0] >= 64
    for elements in (512 * 400, 40_000):
        assert launches.flat_shape(elements, 132, 8)[0][0] >= 132


@pytest.mark.parametrize("C", [*range(1, 70), *range(1000, 1030), 2**31 - 1])
def test_softmax_kernel_holds_the_row(C):
    items = launches.softmax_items(C)
    smaller = [n for n in launches.ROW_BLOCKS if 0 < n < items]
    if items == 0:
        assert C > 32 * max(launches.ROW_BLOCKS)
    else:
        assert 32 * items >= C and all(32 * n < C for n in smaller)


def test_the_numbers_shared_with_the_sources_agree():
    text = source.inlined("module.cu")
    assert f"TILE_THREADS = {launches.THREADS}, " in text
    assert f"WORDS_AT_ONCE = {launches.GATHER_WORDS};" in text
    assert f"q < packed; q += {launches.ROW_PACKS} * threads" in text
    assert f"KERNEL({launches.AVERAGE_BLOCKS}) average(" in text
    assert f"KERNEL({launches.GATHER_BLOCKS}) gather(" in text
    assert f"KERNEL({launches.GATHER_BLOCKS}) gather_augmented(" in text
    assert f"XENT_THREADS = {launches.THREADS};" in text
    assert f"__launch_bounds__({launches.THREADS}, " in text
    assert f"KERNEL({launches.TILE_BLOCKS}) bias_act_backward_" in text
    assert f"KERNEL({launches.ROWS_BLOCKS}) bias_act_##name" in text
    for kernel in ("batch_norm_stats", "norm_act_backward_"):
        assert f"KERNEL({launches.TILE_BLOCKS}) {kernel}" in text
    for kernel in ("norm_act_##name", "norm_input_gradient"):
        assert f"KERNEL({launches.NORM_BLOCKS}) {kernel}" in text
    rows = re.findall(r"^SOFTMAX_XENT\((\d+), (\d+)\)", text, re.MULTILINE)
    assert {int(items): int(blocks) for items, blocks in rows} == launches.ROW_BLOCKS
