"""The detectors detect: each kind of mistake, planted in a kernel of tests/cuda/planted.cu, is caught, and the same
kernel without it is not reported by any of them."""

from pathlib import Path

import numpy as np
import pytest

from kernels import simt

PLANTED = Path(__file__).parent / "cuda" / "planted.cu"
FLAVOURS = ("", *simt.SANITIZERS)


@pytest.fixture(scope="module")
def runners():
    """Flavour -> the runner of planted.cu."""
    runners = {flavour: simt.Runner(PLANTED, flavour, timeout=20) for flavour in FLAVOURS}
    yield runners
    for runner in runners.values():
        runner.close()


def _x(n=64):
    return np.arange(1, n + 1, dtype=np.float32)


def _y(n=64):
    return np.full(n, np.nan, np.float32)


def _past_a_boundary(n=256):
    return np.arange(n + 4, dtype=np.float32)[1:-3]  # 4 bytes past an address that 16 divides


ONE, BLOCK = (1,), (64,)
ARGUMENTS = {
    "missing_barrier": lambda: (_x(), _y()),
    "missing_second_barrier": lambda: (_x(), _y(128)),
    "missing_warp_sync": lambda: (_x(32),),
    "plain_add": lambda: (np.zeros(1, np.int32),),
    "off_by_one": lambda: (_x(50), _y(50), np.int32(50)),
    "reads_before": lambda: (_x(), _y()),
    "past_shared": lambda: (_x(), _y()),
    "misaligned": lambda: (_past_a_boundary(), _past_a_boundary()),
    "uninitialised_shared": lambda: (_x(), _y()),
    "uninitialised_output": lambda: (_x(), _y()),
    "left_before_barrier": lambda: (_y(),),
    "divergent_barriers": lambda: (_y(),),
    "part_of_a_warp": lambda: (_y(),),
    "wrong_mask": lambda: (_x(16),),
    "not_in_mask": lambda: (np.zeros(32, np.int32),),
    "assumes_block_order": lambda: (_x(5), _y(5), np.zeros(1, np.uint32), _y(1)),
    "endless": lambda: (np.zeros(1, np.int32),),
    "overflow": lambda: (_y(), np.int32(40_000)),
}
GRIDS = {"assumes_block_order": (5,)}
BLOCKS = {"missing_warp_sync": (32,), "wrong_mask": (32,), "not_in_mask": (32,)}


def _shape(name):
    return GRIDS.get(name, ONE), BLOCKS.get(name, BLOCK)


def _caught(runner, name, match):
    with pytest.raises(simt.SimtError, match=match) as caught:
        runner.launch(f"{name}_wrong", *_shape(name), ARGUMENTS[name]())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_right_kernels_pass_everywhere(runners, name, flavour):
    args = ARGUMENTS[name]()
    if name == "endless":
        args[0][0] = 1
    scratch = (args[1],) if name == "assumes_block_order" else ()
    outputs = (args[1],) if name.startswith("uninitialised") else ()
    runners[flavour].verify(f"{name}_right", *_shape(name), args, outputs=outputs, scratch=scratch)


@pytest.mark.parametrize("name", ["missing_barrier", "missing_second_barrier", "missing_warp_sync", "plain_add"])
def test_races(runners, name):
    _caught(runners["thread"], name, "data race")


@pytest.mark.parametrize("name", ["missing_barrier", "missing_second_barrier"])
def test_a_missing_barrier_gives_wrong_results_every_time(runners, name):
    """One thread runs at a time, so no luck makes up for the barrier."""
    right, wrong = ARGUMENTS[name](), ARGUMENTS[name]()
    runners[""].launch(f"{name}_right", *_shape(name), right)
    for seed in range(4):
        wrong = ARGUMENTS[name]()
        runners[""].launch(f"{name}_wrong", *_shape(name), wrong, seed=seed)
        assert not np.array_equal(right[-1], wrong[-1], equal_nan=True)


@pytest.mark.parametrize("name", ["off_by_one", "reads_before", "past_shared"])
def test_out_of_bounds(runners, name):
    _caught(runners["address"], name, "AddressSanitizer|runtime error: index .* out of bounds")  # UBSan is there, too


def test_a_store_out_of_bounds_is_noticed_without_a_sanitizer(runners):
    _caught(runners[""], "off_by_one", "wrote outside argument 1, at byte 200 of 200")


@pytest.mark.parametrize("flavour", ["", "undefined"])
def test_misaligned_vector_access(runners, flavour):
    _caught(runners[flavour], "misaligned", "runtime error: .*misaligned address")


def test_overflow(runners):
    _caught(runners["undefined"], "overflow", "signed integer overflow")


@pytest.mark.parametrize("name", ["uninitialised_shared", "uninitialised_output", "assumes_block_order"])
def test_uninitialised_memory_and_block_order(runners, name):
    args = ARGUMENTS[name]()
    scratch = (args[1],) if name == "assumes_block_order" else ()
    with pytest.raises(simt.SimtError, match="uninitialised memory or on the order"):
        runners[""].verify(f"{name}_wrong", *_shape(name), args, outputs=(args[-1],), scratch=scratch)


def test_barriers_that_some_threads_do_not_reach(runners):
    waiting = r"32 threads wait at __syncthreads \(line \d+\)"
    _caught(runners[""], "left_before_barrier", f"{waiting}, 32 threads have returned")
    _caught(runners[""], "divergent_barriers", f"{waiting}, {waiting}")


def test_a_barrier_that_part_of_a_warp_passes_by(runners):
    _caught(runners[""], "part_of_a_warp", r"48 threads wait at __syncthreads.*, 16 threads wait at __syncthreads")


def test_masks(runners):
    _caught(runners[""], "wrong_mask", r"__shfl_xor_sync \(line \d+\): lane 0 reads lane 16, which does not take part")
    _caught(runners[""], "not_in_mask", r"__any_sync \(line \d+\): lane 16 is not in its own mask 0000ffff")


def test_a_kernel_that_never_ends(runners):
    runner = simt.Runner(PLANTED, timeout=1)
    _caught(runner, "endless", "took more than 1 s")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("off_by_one_right", (_x(), _y())), "takes 3 arguments, got 2"),
        (("off_by_one_right", (_x(), _y(), np.int64(64))), "argument 2 has 4 bytes, got 8"),
        (("off_by_one_right", (_x(), _y(), _x())), "argument 2 is a value, got an array"),
        (("absent", ()), "kernel absent: the source has no such kernel"),
    ],
)
def test_wrong_launches(runners, args, message):
    with pytest.raises(simt.SimtError, match=message):
        runners[""].launch(args[0], ONE, BLOCK, args[1])


def test_arguments_that_cannot_be_passed(runners):
    with pytest.raises(TypeError, match="NumPy arrays or scalars like np.float32"):
        runners[""].launch("off_by_one_right", ONE, BLOCK, (_x(), _y(), 64))
    with pytest.raises(ValueError, match="C-contiguous"):
        runners[""].launch("off_by_one_right", ONE, BLOCK, (_x(128)[::2], _y(), np.int32(64)))
    with pytest.raises(ValueError, match="sanitizer must be one of thread, address, undefined, got 'memory'"):
        simt.Runner(PLANTED, "memory")


def test_a_write_to_a_read_only_array_is_noticed(runners):
    x = _x(16)
    x.setflags(write=False)
    with pytest.raises(simt.SimtError, match="read-only"):
        runners[""].launch("wrong_mask_right", ONE, (32,), (x,))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_vocabulary(runners, flavour):
    """Shuffles, votes and indices give what the CUDA C++ Programming Guide says."""
    y = np.full((2, 11, 32), -7, np.int32)
    runners[flavour].launch("vocabulary", (1, 3), (64,), (y,), seed=5)
    lane = np.arange(32)
    half = np.where(lane < 16, 0xFFFF, 0xFFFF0000)
    expected = {
        0: np.where(lane < 16, 3, 19),
        1: np.where(lane < 2, lane, lane - 2),
        2: np.where(lane >= 30, lane, lane + 2),
        3: lane ^ 5,
        4: sum(1 << k for k in range(0, 32, 3)) & half,
        5: lane < 16,
        6: lane >= 16,
        8: lane ^ 1,
        9: lane,
        10: lane % 16,  # a lane reads earlier segments, and for later ones itself
    }
    for warp in y:
        for row, values in expected.items():
            assert np.array_equal(warp[row].astype(np.uint32), values.astype(np.uint32)), row
        assert len(set(warp[7])) == 1 and 0 <= warp[7][0] - 64 * 3 < 3, "written by the lanes of one block"


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_atomics(runners, flavour):
    arrays = [np.zeros(1, t) for t in (np.int32, np.uint32, np.int32, np.float32, np.uint32)]
    runners[flavour].launch("atomics", (3,), (64,), arrays, seed=9)
    total, largest, smallest, halves, winner = (a[0] for a in arrays)
    assert (total, largest, smallest, halves) == (191 * 96, 191, -191, 96.0) and 1 <= winner <= 192


def test_the_order_of_blocks_and_threads_follows_the_seed(runners):
    """Which thread comes first decides atomicCAS."""

    def winner(seed):
        arrays = [np.zeros(1, t) for t in (np.int32, np.uint32, np.int32, np.float32, np.uint32)]
        runners[""].launch("atomics", (3,), (64,), arrays, seed=seed)
        return int(arrays[-1][0])

    assert winner(0) == 1 and winner(1) == 192
    winners = [winner(seed) for seed in range(2, 8)]
    assert len(set(winners)) > 2 and winners == [winner(seed) for seed in range(2, 8)]
