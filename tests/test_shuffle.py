"""shuffle: a permutation, the same by every form."""

import numpy as np
import pytest

from kernels import plain

from .checks import assert_same_bits

SEED = 0xFEDC_BA98_7654_3210


@pytest.mark.parametrize("N", [*range(40), 255, 256, 257, 1000])
def test_a_permutation_the_same_by_every_form(form, N):
    index = 3 * np.arange(N, dtype=np.int32) - 7
    out, intact = form.outputs(N, dtype=np.int32)
    assert form.ops.shuffle(form.array(index, np.int32), seed=SEED, epoch=5, out=out) is out
    intact()
    assert_same_bits(np.sort(out), index)
    assert_same_bits(out, plain.shuffle(index, seed=SEED, epoch=5))
