"""What gather_batch draws: maps, strengths of noise, and another noise for each draw."""

import numpy as np
import pytest
from scipy import stats

from kernels import Augment, simt

from .backends import SimtOps, simt_backend
from .checks import ELEMENTWISE, EPS, assert_close, assert_same_bits, to_numpy
from .references import NOISE, WARP, maps, noise, of_images

SEED = 0xFEDC_BA98_7654_3210
AUGMENT = Augment(rotation=30.0, scale=0.25, shear=0.2, shift=2.5)
ALL = dict(augment=AUGMENT, noise_sigma=0.5, noise_uniform=True)
VARIANTS = {"maps": dict(augment=AUGMENT), "noise": dict(noise_sigma=0.5),
            "strengths": dict(noise_sigma=0.5, noise_uniform=True), "all": ALL}  # fmt: skip
DRAWS = (0, 1, 2, 255, 2**31, 2**32 - 1)


def _gather(form, images, index, draw=None, numbers=None, seed=SEED, **settings):
    labels = form.array(np.zeros(len(images)), np.int32)
    return form.ops.gather_batch(
        form.array(images, np.uint8), labels, form.array(index, np.int32), seed=seed,
        draw=None if draw is None else form.array([draw], np.int64),
        numbers=None if numbers is None else form.array(numbers, np.int32), **settings,
    )[0]  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_draws_differ_and_the_first_is_0(form, rng, name):
    images = rng.integers(0, 256, (5, 64), np.uint8)
    index = [0, 4, 4, 2]
    results = [to_numpy(_gather(form, images, index, draw, **VARIANTS[name])) for draw in DRAWS]
    assert_same_bits(_gather(form, images, index, **VARIANTS[name]), results[0])
    for k, one in enumerate(results):
        assert_same_bits(one[1], one[2])  # of the same image
        for other in results[:k]:
            assert ((one != other).mean(axis=1) > 0.5).all()
    for draw, same in ((2**32, 0), (2**32 + 1, 1), (-1, 2**32 - 1), (-(2**63), 0)):  # the low 32 bits count
        assert_same_bits(_gather(form, images, index, draw, **VARIANTS[name]), results[DRAWS.index(same)])


def test_a_draw_may_be_0d(backend, rng):
    images = rng.integers(0, 256, (5, 64), np.uint8)
    labels, index = backend.array(np.zeros(5), np.int32), backend.array([3, 1], np.int32)
    draw = backend.array(np.array(7), np.int64)
    x, _ = backend.ops.gather_batch(backend.array(images, np.uint8), labels, index, draw=draw, seed=SEED, **ALL)
    assert_same_bits(x, _gather(backend, images, [3, 1], 7, **ALL))


def test_noise_of_a_draw(form, rng):
    for D in (1, 5, 49, 784, 1030, 2500):
        images, index = rng.integers(0, 256, (4, D), np.uint8), [3, 0, 0]
        for draw in (1, 2**32 - 1):
            x = _gather(form, images, index, draw, noise_sigma=0.5)
            expected = images[index] / 255.0 + 0.5 * noise(index, D, SEED, draw)
            assert_close(x, expected, 2 * ELEMENTWISE, atol=NOISE, magnitude=np.abs(expected) + 1.0)


@pytest.mark.parametrize("augment", [AUGMENT, Augment(rotation=45.0), Augment(scale=0.99), Augment(shear=0.99),
                                     Augment(shift=40.0), Augment(45.0, 0.5, 0.5, 5.0)], ids=str)  # fmt: skip
def test_random_maps_are_those_of_the_reference(form, rng, augment):
    for side in (1, 2, 7, 28, 33):
        images, index = rng.integers(0, 256, (6, side * side), np.uint8), [5, 0, 1, 1]
        for draw in (0, 9):
            x = _gather(form, images, index, draw, augment=augment)
            affine = form.array(maps(index, augment, SEED, draw))
            # Matrices of float32, in pixels of up to 33 x 0.5: each product is off by a few roundings of 17.
            assert_close(x, _gather(form, images, index, affine=affine), 0.0, atol=2 * WARP)


def test_ranges_of_0_change_nothing(form, rng):
    images = rng.integers(0, 256, (6, 49), np.uint8)
    x = _gather(form, images, [3, 1], augment=Augment(), scale=2.0)
    assert_same_bits(x, _gather(form, images, [3, 1], scale=2.0))


def _matrices(backend, count, augment):
    """The maps that were drawn, from what they make of images whose brightness is the column or the row."""
    side = 64
    row, column = np.divmod(np.arange(side * side), side)
    images = np.repeat(np.stack([4 * column, 4 * row]).astype(np.uint8), count, axis=0)
    numbers, middle = np.tile(np.arange(count), 2), slice(24, 40)
    x = _gather(backend, images, np.arange(2 * count), numbers=numbers, augment=augment, scale=255.0 / 4.0)
    values = to_numpy(x).astype(np.float64).reshape(2, count, side, side)[:, :, middle, middle] - 31.5
    v, u = np.mgrid[middle, middle] - 31.5
    positions = np.stack([u.ravel(), v.ravel(), np.ones(u.size)], axis=1)
    solved = np.linalg.lstsq(positions, values.reshape(2 * count, -1).T, rcond=None)[0]
    return solved.T.reshape(2, count, 3).transpose(1, 0, 2)


def _uniform(values, low, high):
    """Within the range, and by Kolmogorov and Smirnov's test uniform in it."""
    assert low - 1e-4 <= values.min() and values.max() <= high + 1e-4
    assert stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-4


def test_random_maps_are_uniform_in_their_ranges(backend):
    """Rotation, shear and zooms by the matrix's decomposition; none depends on another."""
    a = _matrices(backend, 3000, AUGMENT)
    angle, zoom_u = np.degrees(np.arctan2(a[:, 1, 0], a[:, 0, 0])), np.hypot(a[:, 0, 0], a[:, 1, 0])
    cosine, sine = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    zoom_v = cosine * a[:, 1, 1] - sine * a[:, 0, 1]
    shear = (cosine * a[:, 0, 1] + sine * a[:, 1, 1]) / zoom_v
    drawn = [angle, shear, zoom_u, zoom_v, a[:, 0, 2], a[:, 1, 2]]
    for values, middle, spread in zip(drawn, (0, 0, 1, 1, 0, 0), (30.0, 0.2, 0.25, 0.25, 2.5, 2.5), strict=True):
        _uniform(values, middle - spread, middle + spread)
    correlation = np.corrcoef(drawn) - np.eye(6)
    assert np.abs(correlation).max() < 5 / np.sqrt(3000)


def test_strengths_of_noise_are_uniform(form):
    """Each image's noise is what it is without noise_uniform times one number."""
    index = np.arange(2000)
    black = np.zeros((2000, 12), np.uint8)
    full = to_numpy(_gather(form, black, index, 3, noise_sigma=0.5)).astype(np.float64)
    x = to_numpy(_gather(form, black, index, 3, noise_sigma=0.5, noise_uniform=True)).astype(np.float64)
    strength = np.sum(x * full, axis=1) / np.sum(full * full, axis=1)
    assert_close(x, strength[:, None] * full, 8 * EPS)
    _uniform(strength, 0.0, 1.0)
    assert_close(strength, of_images(index, SEED, 3)[:, 6], 8 * EPS)
    assert abs(np.corrcoef(strength, np.abs(full).mean(axis=1))[0, 1]) < 5 / np.sqrt(2000)


def test_what_is_drawn_does_not_depend_on_the_batch(backend, rng):
    """To the bit, wherever and with whatever else an image is drawn."""
    images = rng.integers(0, 256, (50, 144), np.uint8)
    whole = to_numpy(_gather(backend, images, np.arange(50), 4, **ALL))
    order = rng.permutation(50)
    parts = [to_numpy(_gather(backend, images, part, 4, **ALL)) for part in np.split(order, [1, 4, 33])]
    assert_same_bits(np.concatenate(parts), whole[order])
    assert_same_bits(_gather(backend, images, np.full(600, 7), 4, **ALL), np.tile(whole[7], (600, 1)))


def test_a_part_of_a_data_set_draws_what_the_whole_does(form, rng):
    images, numbers = rng.integers(0, 256, (40, 49), np.uint8), rng.permutation(40)[:11]
    for draw in (None, 5):
        whole = _gather(form, images, numbers, draw, **ALL)
        assert_same_bits(_gather(form, images[numbers], np.arange(11), draw, numbers=numbers, **ALL), whole)


@pytest.mark.parametrize("pixels", [49, 50])
def test_simt_devices_of_any_size_draw_the_same(rng, pixels):
    runner = simt_backend().ops.device.runner
    images, labels = rng.integers(0, 256, (9, pixels), np.uint8), np.zeros(9, np.int32)
    index = rng.integers(0, 9, 20).astype(np.int32)
    settings = dict(noise_sigma=0.5, noise_uniform=True, draw=np.array([3]), seed=SEED)
    if pixels == 49:
        settings["augment"] = AUGMENT
    results = [SimtOps(simt.Device(runner, count, seed)).gather_batch(images, labels, index, **settings)[0]
               for count, seed in ((0, 0), (1, 5), (8, 1))]  # fmt: skip
    for result in results[1:]:
        assert_same_bits(result, results[0])
