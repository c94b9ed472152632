"""The masks of norm_act's dropout: which bits decide, the same everywhere, and as many as the probability says."""

import numpy as np
import pytest

from kernels import plain_norm, plain_random

from .checks import FEW_SHAPES, OFFSETS, assert_same_bits, to_numpy
from .norm_references import keep

COUNTED = dict(seed=0xFEDC_BA98_7654_3210, layer=3, step=9, row=5)


def _kept(form, B, N, p, offset=0, **counted):
    """The mask, from ones through the identity."""
    out, intact = form.outputs(B, N, offset=offset)
    ones, zeros = form.array(np.ones((B, N)), offset=offset), form.array(np.zeros(N))
    y = form.ops.norm_act(ones, zeros, "identity", dropout=p, out=out, **counted)
    intact()
    values = to_numpy(y)
    kept = values != 0.0
    assert_same_bits(values, np.where(kept, np.float32(1.0 / (1.0 - p)), np.float32(0.0)))
    return kept


def test_the_mask_is_that_of_the_reference(form):
    for B, N in FEW_SHAPES:
        for offset in OFFSETS:
            assert_same_bits(_kept(form, B, N, 0.3, offset, **COUNTED), keep(B, N, 0.3, **COUNTED))


@pytest.mark.parametrize("p", [1e-9, 0.5, 0.999, 1.0 - 2**-53])
def test_probabilities(form, p):
    assert_same_bits(_kept(form, 40, 37, p, **COUNTED), keep(40, 37, p, **COUNTED))


@pytest.mark.parametrize("counted", [
    {}, dict(seed=1), dict(seed=2**64 - 1), dict(seed=2**32), dict(layer=1), dict(layer=2**24 - 1), dict(step=1),
    dict(step=2**24), dict(row=1), dict(row=2**32 - 30),
])  # fmt: skip
def test_every_part_of_the_counter(form, counted):
    assert_same_bits(_kept(form, 30, 9, 0.5, **counted), keep(30, 9, 0.5, **counted))
    if counted:
        assert (keep(30, 9, 0.5, **counted) != keep(30, 9, 0.5)).mean() > 0.3


def test_the_step_is_read_when_the_kernel_runs(form):
    for shape in ((), (1,)):
        step = form.array(np.full(shape, 9.0))
        device = COUNTED | {"step": step}
        assert_same_bits(_kept(form, 9, 12, 0.5, **device), keep(9, 12, 0.5, **COUNTED))
        step += 1
        assert_same_bits(_kept(form, 9, 12, 0.5, **device), keep(9, 12, 0.5, **(COUNTED | {"step": 10})))


@pytest.mark.parametrize("step, word", [(2.75, 2), (-1.0, 0), (np.nan, 0), (4e9, 4_000_000_000), (1e20, 2**32 - 256)])
def test_steps_on_the_device_that_are_no_words(form, step, word):
    with np.errstate(invalid="ignore"):
        kept = _kept(form, 9, 12, 0.5, step=form.array(step))
    assert_same_bits(kept, keep(9, 12, 0.5, step=word))


def test_chunks_have_the_masks_of_the_whole_batch(form, rng):
    """`row` tells a chunk where it begins: forward and backward."""
    z, dy = (rng.normal(0, 1, (50, 24)).astype(np.float32) for _ in range(2))
    bias, settings = form.array(np.zeros(24)), dict(dropout=0.4, seed=3, layer=1, step=2)
    whole = form.ops.norm_act(form.array(z), bias, "silu", **settings)
    dz = form.ops.norm_act_backward(form.array(dy), form.array(z), bias, "silu", **settings)[0]
    for begin, end in ((0, 17), (17, 18), (18, 50)):
        part, row = slice(begin, end), dict(row=begin)
        assert_same_bits(form.ops.norm_act(form.array(z[part]), bias, "silu", **settings, **row), to_numpy(whole)[part])
        arrays = form.array(dy[part]), form.array(z[part]), bias
        gradient = form.ops.norm_act_backward(*arrays, "silu", **settings, **row)
        assert_same_bits(gradient[0], to_numpy(dz)[part])


def test_a_word_equal_to_the_threshold_keeps(form):
    """One word in 2^32: so the probability is made of a word."""
    counters = [np.array([word], np.uint64) for word in (0, 0, 0, plain_norm.FOR_DROPOUT)]
    words = [int(word[0]) for word in plain_random.philox4x32(np, counters, 0, 0)]
    for word in words:
        expected = [[other >= word for other in words]]
        assert _kept(form, 1, 4, word / 2**32).tolist() == expected
        assert _kept(form, 1, 4, (word + 1) / 2**32).tolist() != expected


def test_backward_drops_what_forward_dropped(form):
    for N in (37, 40):
        kept = _kept(form, 33, N, 0.5, **COUNTED)
        ones, zeros = form.array(np.ones((33, N))), form.array(np.zeros(N))
        dz, dbias, _ = form.ops.norm_act_backward(ones, ones, zeros, "identity", dropout=0.5, **COUNTED)
        assert_same_bits(to_numpy(dz), kept * np.float32(2.0))
        assert to_numpy(dbias).tolist() == (2.0 * kept.sum(0)).tolist()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_the_probability_says(backend, p):
    """Also in each row, column and place in a pack: five standard deviations."""
    B, N = 1000, 400
    kept = _kept(backend, B, N, p, seed=12)
    for axis, count in ((None, B * N), (0, B), (1, N)):
        assert np.abs(kept.mean(axis) - (1 - p)).max() < 5 * (p * (1 - p) / count) ** 0.5
    for k in range(4):
        assert abs(kept[:, k::4].mean() - (1 - p)) < 5 * (p * (1 - p) / (B * N / 4)) ** 0.5


def test_neighbours_steps_layers_and_seeds_are_independent(backend):
    masks = [_kept(backend, 500, 400, 0.5, **c) for c in ({}, dict(step=1), dict(layer=1), dict(seed=1), dict(row=500))]
    shifted = [masks[0][1:, :], masks[0][:, 1:], masks[0][:, 4:]]
    for a, b in [(masks[0], m) for m in masks[1:]] + [(masks[0][: len(m), : m.shape[1]], m) for m in shifted]:
        assert abs((a == b).mean() - 0.5) < 5 * 0.5 / a.size**0.5


def test_no_probability_drops_nothing(form, rng):
    z, bias = rng.normal(0, 1, (9, 7)), rng.normal(0, 1, 7)
    y = form.ops.norm_act(form.array(z), form.array(bias), "gelu", dropout=0.0, seed=5, step=4)
    assert_same_bits(y, form.ops.bias_act(form.array(z), form.array(bias), "gelu"))


def test_what_is_dropped_is_not_hidden_if_it_is_no_number(form):
    """NaN 0 is NaN, as torch has it."""
    z = form.array(np.full((8, 8), np.nan))
    assert np.isnan(to_numpy(form.ops.norm_act(z, form.array(np.zeros(8)), "relu", dropout=0.5))).all()


def test_no_use_of_the_counters_meets_another():
    uses = {plain_random.FOR_NOISE, plain_random.FOR_SHUFFLE}
    assert plain_norm.FOR_DROPOUT not in uses and max(*uses, plain_norm.FOR_DROPOUT) < 256
