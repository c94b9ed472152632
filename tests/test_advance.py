"""advance, and what it is for: launches that are the same in every step and yet go through an epoch."""

import numpy as np
import pytest

from .checks import assert_same_bits, to_numpy


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize(("begin", "by", "end"), [
    (0, 0, 0), (0, 512, 512), (-3, 5, 2), (2**31 - 1, 1, 2**31), (2**62, 2**62 - 1, 2**63 - 1),
    (2**63 - 1, 2, -(2**63) + 1), (-(2**63), 2**63 - 1, -1),
])  # fmt: skip
def test_adds_in_place(form, shape, begin, by, end):
    """64 bits, which wrap; nothing beside the two elements is written."""
    offset, intact = form.outputs(*shape, dtype=np.int64)
    step, step_intact = form.outputs(*shape)
    offset[...], step[...] = begin, 41.0
    assert form.ops.advance(offset, by) is None
    assert to_numpy(offset).ravel().tolist() == [end]
    assert form.ops.advance(offset, 0, step) is None
    assert to_numpy(offset).ravel().tolist() == [end] and to_numpy(step).ravel().tolist() == [42.0]
    intact()
    step_intact()


def test_the_same_launches_go_through_an_epoch(form, rng):
    """What a captured step repeats: its arguments never change, and its batches are the slices of the index."""
    B, D, steps = 4, 9, 5
    images, labels = rng.integers(0, 256, (30, D), np.uint8), np.arange(30, dtype=np.int32)
    order = rng.permutation(30)[: B * steps - 1].astype(np.int32)  # the last batch is one short
    data = form.array(images, np.uint8), form.array(labels, np.int32), form.array(order, np.int32)
    x, y = form.array(np.zeros((B, D))), form.array(np.zeros(B), np.int32)
    offset, step = form.array([0], np.int64), form.array([1.0])
    for k in range(steps):
        form.ops.gather_batch(*data, offset=offset, out_x=x, out_y=y)
        form.ops.advance(offset, B, step)
        expected = order[B * k : B * (k + 1)]
        n = len(expected)
        expected_x, _ = form.ops.gather_batch(*data[:2], form.array(expected, np.int32))
        assert_same_bits(to_numpy(x)[:n], expected_x)
        assert_same_bits(to_numpy(y)[:n], expected)
        assert np.isnan(to_numpy(x)[n:]).all() and (to_numpy(y)[n:] == -1).all()
    assert n == B - 1
    assert int(to_numpy(offset)[0]) == B * steps and float(to_numpy(step)[0]) == steps + 1
