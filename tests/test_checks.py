"""The comparison that every kernel test rests on must itself reject what is wrong."""

import numpy as np
import pytest

from .checks import OFFSETS, Check, assert_close, assert_same_bits, max_error

ONES = np.ones((2, 3), np.float32)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 1.1])
def test_one_wrong_value_is_rejected(wrong):
    actual = ONES.copy()
    actual[1, 2] = wrong
    with pytest.raises(AssertionError, match=r"1 of 6 values differ; worst at \(1, 2\)"):
        assert_close(actual, ONES, rtol=1e-2)


@pytest.mark.parametrize("expected", [np.nan, np.inf, -np.inf])
def test_a_finite_value_is_rejected_where_nan_or_infinity_is_expected(expected):
    reference = ONES.copy()
    reference[0, 0] = expected
    with pytest.raises(AssertionError, match="1 of 6"):
        assert_close(ONES, reference, rtol=1e30, atol=1e30)
    assert_close(reference, reference, rtol=0.0)


@pytest.mark.parametrize("bound", [np.inf, np.nan])
def test_a_bound_that_is_not_finite_admits_only_equal_values(bound):
    with pytest.raises(AssertionError, match="6 of 6"):
        assert_close(ONES + 1, ONES, rtol=1.0, magnitude=np.full((2, 3), bound))
    assert_close(ONES, ONES, rtol=1.0, magnitude=np.full((2, 3), bound))


def test_shapes_must_be_equal_and_not_merely_broadcast():
    with pytest.raises(AssertionError, match="shape"):
        assert_close(ONES[:1], ONES, rtol=1.0)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(ONES[0, 0], ONES[0, :1], rtol=1.0)


def test_tolerances_are_inclusive_and_add():
    assert_close(1.5, 1.0, rtol=0.25, atol=0.25)
    with pytest.raises(AssertionError):
        assert_close(1.51, 1.0, rtol=0.25, atol=0.25)


def test_same_bits_tells_zeros_apart_and_accepts_nan():
    assert_same_bits(np.float32(np.nan), np.float32(np.nan))
    for other in (np.float32(-0.0), np.float64(0.0), np.zeros(1, np.float32)):
        with pytest.raises(AssertionError):
            assert_same_bits(np.float32(0.0), other)


@pytest.mark.parametrize("offset", OFFSETS)
def test_writes_beside_an_output_are_noticed(backend, offset):
    for index in (-1, 6):
        out, intact = backend.outputs(2, 3, offset=offset)
        intact()
        assert bool(backend.xp.isnan(out).all())
        first = out.ctypes.data if backend.xp is np else out.data.ptr
        assert first % 16 == 4 * offset
        out.base[64 + offset + index] = 0.0
        with pytest.raises(AssertionError):
            intact()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_the_largest_error_is_infinite_where_a_value_is_nan_or_infinite(wrong):
    bad = ONES.copy()
    bad[1, 2] = wrong
    assert max_error(bad, ONES) == max_error(ONES, bad) == np.inf
    assert max_error(ONES, ONES * 2, np.full((2, 3), wrong)) == np.inf
    assert max_error(bad, bad) == 0.0


def test_the_largest_error_is_relative_to_the_magnitude():
    actual = ONES.copy()
    actual[0, 1], actual[1, 0] = 1.5, 0.75
    assert max_error(actual, ONES) == 0.5
    assert max_error(actual, ONES, magnitude=np.array([1.0, 10.0, 1.0])) == 0.25
    assert max_error(actual, ONES, magnitude=0.0) == np.inf, "no error is small beside nothing"
    assert max_error(ONES[:0], ONES[:0]) == 0.0
    with pytest.raises(AssertionError, match="shape"):
        max_error(ONES[0], ONES)


def test_a_check_fails_exactly_where_its_error_is_above_its_tolerance():
    for actual in (1.0, 1.01, 1.5, np.nan):
        for tolerance in (0.0, 0.1):
            check = Check("x", np.float32(actual), np.float64(1.0), tolerance)
            if check.error() <= tolerance:
                check.verify()
            else:
                with pytest.raises(AssertionError, match="1 of 1 values differ"):
                    check.verify()
