"""gather_batch against a float64 formula; noise against Philox's known answers, warps against SciPy."""

import numpy as np
import pytest
from scipy import stats

import kernels
from kernels import plain
from kernels.plain_random import philox4x32

from .checks import ELEMENTWISE, EPS, OFFSETS, assert_close, assert_same_bits, to_numpy
from .references import NOISE, WARP, noise, positions, warped

SEED = 0xFEDC_BA98_7654_3210


def _data(rng, M, D):
    return rng.integers(0, 256, (M, D), np.uint8), rng.integers(-5, 50, M).astype(np.int32)


def _arrays(form, images, labels, index, offset=0):
    return (
        form.array(images, np.uint8, offset),
        form.array(labels, np.int32, offset),
        form.array(index, np.int32, offset),
    )


def test_philox_known_answers():
    """The vectors of Random123's kat_vectors for philox4x32-10."""
    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    known = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (*pi, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]
    for counter, key, expected in known:
        counters = [np.array([c], np.uint64) for c in counter]
        assert tuple(int(x[0]) for x in philox4x32(np, counters, *key)) == expected


def test_awkward_shapes(form, rng):
    for B, D in form.shapes:
        images, labels = _data(rng, 7, D)
        index = rng.integers(0, 7, B)
        for mean, scale, offset in [(0.0, 1.0, 0), (0.17, 3.0, 1), (-0.5, 1.0, 0), (0.0, -2.0, 1)]:
            x, x_intact = form.outputs(B, D, offset=offset)
            y, y_intact = form.outputs(B, dtype=np.int32, offset=offset)
            settings = dict(out_x=x, out_y=y, mean=mean, scale=scale)
            results = form.ops.gather_batch(*_arrays(form, images, labels, index, offset), **settings)
            assert results[0] is x and results[1] is y
            pixels = images[index] / 255.0
            assert_close(x, (pixels - mean) * scale, ELEMENTWISE, magnitude=(pixels + abs(mean)) * abs(scale))
            assert_same_bits(y, labels[index])
            x_intact()
            y_intact()


@pytest.mark.parametrize("settings", [{}, dict(noise_sigma=0.5, seed=3)], ids=["clean", "noisy"])
def test_large_batch(backend, rng, settings):
    """Enough work for the CPU to share among threads."""
    images, labels = _data(rng, 300, 784)
    index = rng.integers(0, 300, 2000)
    x, x_intact = backend.outputs(2000, 784)
    y, y_intact = backend.outputs(2000, dtype=np.int32)
    backend.ops.gather_batch(*_arrays(backend, images, labels, index), out_x=x, out_y=y, **settings)
    expected = images[index] / 255.0
    if settings:
        expected += 0.5 * noise(range(300), 784, 3)[index]
    assert_close(x, expected, ELEMENTWISE, atol=0.5 * NOISE if settings else 0.0)
    assert_same_bits(y, labels[index])
    x_intact()
    y_intact()


@pytest.mark.parametrize("bad", [-1, 6, 7, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("extra", ["none", "noise", "affine"])
def test_an_index_out_of_range_gives_a_nan_row_and_label_minus_1(form, rng, bad, extra):
    for D in (1, 4, 9, 784):
        images, labels = _data(rng, 6, D)
        index = np.array([0, 5, bad, 3, bad])
        settings = {"none": {}, "noise": dict(noise_sigma=0.1), "affine": {}}[extra]
        if extra == "affine":
            settings = dict(affine=form.array(np.tile(np.eye(2, 3), (5, 1, 1))))
        x, x_intact = form.outputs(5, D)
        y, y_intact = form.outputs(5, dtype=np.int32)
        form.ops.gather_batch(*_arrays(form, images, labels, index), out_x=x, out_y=y, **settings)
        x, y = to_numpy(x), to_numpy(y)
        assert np.isnan(x[[2, 4]]).all() and np.isfinite(x[[0, 1, 3]]).all()
        assert_same_bits(y, np.array([labels[0], labels[5], -1, labels[3], -1], np.int32))
        x_intact()
        y_intact()


BEGINNINGS = (0, 1, 17, 18, 22, 23, -1, -4, -5, -6, 2**31, -(2**31), 2**63 - 1, -(2**63), 2**63 - 3, -(2**63) + 3)


@pytest.mark.parametrize("extra", ["none", "noise", "affine"])
def test_a_batch_at_an_offset_on_the_device(form, rng, extra):
    """What index[offset : offset + B] gives, to the bit; beyond either end of the index, NaN rows and labels -1."""
    images, labels = _data(rng, 9, 16)
    index = rng.integers(0, 9, 23)
    index[4] = 9  # no image
    settings = {"none": {}, "noise": dict(noise_sigma=0.5, seed=3), "affine": {}}[extra]
    if extra == "affine":
        settings = dict(affine=form.array(np.eye(2, 3) + rng.normal(0, 0.2, (5, 2, 3))))
    for begin in BEGINNINGS:
        for past, shape in ((0, ()), (1, (1,))):
            offset = form.array(np.full(shape, begin), np.int64, past)
            x, x_intact = form.outputs(5, 16, offset=past)
            y, y_intact = form.outputs(5, dtype=np.int32, offset=past)
            arrays = _arrays(form, images, labels, index, past)
            results = form.ops.gather_batch(*arrays, offset=offset, out_x=x, out_y=y, scale=2.0, **settings)
            assert results[0] is x and results[1] is y
            x_intact()
            y_intact()
            rows = positions(index, begin, 5)
            expected = form.ops.gather_batch(*_arrays(form, images, labels, rows, past), scale=2.0, **settings)
            assert_same_bits(x, expected[0])
            assert_same_bits(y, expected[1])
            assert np.array_equal(np.isnan(to_numpy(x)).all(axis=1), (rows < 0) | (rows >= 9))
            assert int(to_numpy(offset).ravel()[0]) == begin


def test_the_rows_of_out_x_are_the_batch(form, rng):
    """However long the index is: shorter than the batch, or empty; labels without an output of their own."""
    images, labels = _data(rng, 6, 9)
    for length, B in ((0, 3), (2, 5), (7, 7), (5, 0), (50, 1)):
        index = rng.integers(0, 6, length)
        x, _ = form.outputs(B, 9)
        offset = form.array([1], np.int64)
        _, y = form.ops.gather_batch(*_arrays(form, images, labels, index), offset=offset, out_x=x)
        rows = positions(index, 1, B)
        assert_same_bits(y, np.where(rows < 0, -1, labels[rows]).astype(np.int32))
        assert_close(x, np.where(rows[:, None] < 0, np.nan, images[rows] / 255.0), ELEMENTWISE)


def test_a_large_batch_at_an_offset(backend, rng):
    """Enough work for the CPU to share among threads."""
    images, labels = _data(rng, 300, 784)
    index = rng.integers(0, 300, 5000)
    x, x_intact = backend.outputs(2000, 784)
    offset = backend.array([4000], np.int64)
    _, y = backend.ops.gather_batch(*_arrays(backend, images, labels, index), offset=offset, out_x=x)
    x_intact()
    rows = positions(index, 4000, 2000)
    assert_same_bits(y, np.where(rows < 0, -1, labels[rows]).astype(np.int32))
    assert_close(x, np.where(rows[:, None] < 0, np.nan, images[rows] / 255.0), ELEMENTWISE)


def test_noise_is_the_published_generator(form, rng):
    for D in (1, 2, 3, 4, 5, 47, 127, 784):
        for seed in (0, 1, 2**32 - 1, 2**32, SEED, 2**64 - 1):
            images, labels = _data(rng, 9, D)
            index = np.array([8, 0, 3, 3])
            arrays = _arrays(form, images, labels, index)
            x, _ = form.ops.gather_batch(*arrays, mean=0.25, scale=2.0, noise_sigma=0.5, seed=seed)
            expected = (images[index] / 255.0 + 0.5 * noise(index, D, seed) - 0.25) * 2.0
            assert_close(x, expected, 2 * ELEMENTWISE, atol=NOISE, magnitude=np.abs(expected) + 1.0)


def test_noise_of_the_smallest_uniform_number(form):
    """Under this seed pixel 0 of image 0 draws 23 zero bits, whose logarithm must not be taken."""
    arrays = _arrays(form, np.zeros((1, 4), np.uint8), [0], [0])
    x = to_numpy(form.ops.gather_batch(*arrays, noise_sigma=1.0, seed=75465)[0])
    assert_close(x, noise([0], 4, 75465), ELEMENTWISE, atol=NOISE)
    assert_close(np.hypot(x[0, 0], x[0, 1]), np.sqrt(-2 * np.log(2.0**-24)), ELEMENTWISE)


def test_noise_does_not_depend_on_the_batch(backend, rng):
    """An image's noise is the same, to the bit, wherever and with whatever else it is drawn."""
    images, labels = _data(rng, 50, 127)

    def draw(index):
        arrays = _arrays(backend, images, labels, index)
        return to_numpy(backend.ops.gather_batch(*arrays, noise_sigma=0.3, seed=SEED)[0])

    whole = draw(np.arange(50))
    order = rng.permutation(50)
    assert_same_bits(draw(order), whole[order])
    assert_same_bits(np.concatenate([draw(part) for part in np.split(order, [1, 4, 33])]), whole[order])
    assert_same_bits(draw(np.full(600, 7)), np.tile(whole[7], (600, 1)))


def test_noise_of_a_part_of_a_data_set_is_that_of_the_whole(form, rng):
    """`numbers` says which images of the whole the part's are."""
    images, labels = _data(rng, 40, 9)
    numbers = rng.permutation(40)[:11]
    whole = form.ops.gather_batch(*_arrays(form, images, labels, numbers), noise_sigma=0.4, seed=SEED)
    part = _arrays(form, images[numbers], labels[numbers], np.arange(11))
    results = form.ops.gather_batch(*part, noise_sigma=0.4, seed=SEED, numbers=form.array(numbers, np.int32))
    for one, other in zip(whole, results, strict=True):
        assert_same_bits(one, other)
    unnumbered = form.ops.gather_batch(*part, noise_sigma=0.4, seed=SEED)[0]
    assert (to_numpy(unnumbered) != to_numpy(whole[0])).mean() > 0.9


def test_noise_differs_between_seeds_images_and_pixels(form):
    images, labels = np.zeros((3, 64), np.uint8), np.zeros(3, np.int32)
    rows = []
    for seed in (0, 1, 2**32, 2**63):
        arrays = _arrays(form, images, labels, [0, 1, 2])
        rows.extend(to_numpy(form.ops.gather_batch(*arrays, noise_sigma=1.0, seed=seed)[0]))
    assert len(np.unique(np.concatenate(rows))) > 0.99 * 12 * 64


def test_noise_is_standard_normal_and_independent(form):
    """Limits of 5 standard errors: each fails by chance once in 1.7 million seeds, and the seed is fixed."""
    n = 2000 * 400
    arrays = _arrays(form, np.zeros((2000, 400), np.uint8), np.zeros(2000, np.int32), np.arange(2000))
    x = to_numpy(form.ops.gather_batch(*arrays, noise_sigma=1.0, seed=SEED)[0]).astype(np.float64)
    assert abs(x.mean()) < 5 / np.sqrt(n)
    assert abs(x.var() - 1) < 5 * np.sqrt(2 / n)
    assert abs(stats.skew(x, axis=None)) < 5 * np.sqrt(6 / n)
    assert abs(stats.kurtosis(x, axis=None)) < 5 * np.sqrt(24 / n)
    assert stats.kstest(x.ravel()[::4], "norm").pvalue > 1e-4
    for a, b in [
        (x[:, :-1], x[:, 1:]),
        (x[:, :-2], x[:, 2:]),
        (x[:-1], x[1:]),
        (x[:, :-1] ** 2, x[:, 1:] ** 2),
    ]:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(a.size)


def _warped(form, images, index, affine, **settings):
    labels = np.zeros(len(images), np.int32)
    affine = form.array(np.broadcast_to(affine, (len(index), 2, 3)))
    return form.ops.gather_batch(*_arrays(form, images, labels, index), affine=affine, **settings)[0]


@pytest.mark.parametrize("side", [1, 2, 3, 7, 28, 33])
def test_maps_of_whole_pixels_are_exact(form, rng, side):
    images = rng.integers(0, 256, (4, side * side), np.uint8)
    index = [3, 0, 0, 2]
    square = images[index].reshape(-1, side, side)
    padded = np.pad(square, ((0, 0), (3, 3), (3, 3)))
    cases = {
        "identity": ([[1, 0, 0], [0, 1, 0]], square),
        "mirror": ([[-1, 0, 0], [0, 1, 0]], square[:, :, ::-1]),
        "transpose": ([[0, 1, 0], [1, 0, 0]], square.transpose(0, 2, 1)),
        "half turn": ([[-1, 0, 0], [0, -1, 0]], square[:, ::-1, ::-1]),
        "right": ([[1, 0, -2], [0, 1, 0]], padded[:, 3 : 3 + side, 1 : 1 + side]),
        "up and left": ([[1, 0, 3], [0, 1, 1]], padded[:, 4 : 4 + side, 6 : 6 + side]),
        "far away": ([[1, 0, 1e9], [0, 1, -1e9]], np.zeros_like(square)),
    }
    for name, (affine, expected) in cases.items():
        arrays = _arrays(form, expected.reshape(4, -1), np.zeros(4, np.int32), np.arange(4))
        same = form.ops.gather_batch(*arrays, scale=2.0)[0] == _warped(form, images, index, affine, scale=2.0)
        assert bool(same.all()), name
        # With a mean, the compiler may fuse pixel / 255 - mean into one rounding where there is no map.
        x = _warped(form, images, index, affine, mean=0.25, scale=2.0)
        assert_close(x, form.ops.gather_batch(*arrays, mean=0.25, scale=2.0)[0], 0.0, atol=2 * 2 * EPS)


def test_maps_between_pixels_are_bilinear(form, rng):
    side = 28
    images = rng.integers(0, 256, (6, side * side), np.uint8)
    affine = (np.eye(2, 3) + rng.normal(0, 0.3, (6, 2, 3)) * [1, 1, 15]).astype(np.float32)
    x = _warped(form, images, np.arange(6), affine)
    assert_close(x, warped(images, affine), 0.0, atol=WARP)


def test_maps_against_torch_grid_sample(form, rng):
    """torch's unit is half the distance between the outer pixels' centres (align_corners=True)."""
    torch = pytest.importorskip("torch")
    side = 28
    images = rng.integers(0, 256, (6, side * side), np.uint8)
    affine = (np.eye(2, 3) + rng.normal(0, 0.3, (6, 2, 3)) * [1, 1, 15]).astype(np.float32)
    theta = torch.tensor(affine / np.float64([1, 1, (side - 1) / 2]), dtype=torch.float64)
    grid = torch.nn.functional.affine_grid(theta, (6, 1, side, side), align_corners=True)
    pixels = torch.tensor(images.reshape(6, 1, side, side) / 255.0)
    expected = torch.nn.functional.grid_sample(pixels, grid, padding_mode="zeros", align_corners=True)
    x = _warped(form, images, np.arange(6), affine)
    assert_close(x, expected.reshape(6, -1), 0.0, atol=WARP)


def test_noise_is_added_after_the_map(form, rng):
    images = rng.integers(0, 256, (5, 49), np.uint8)
    index, turn = [4, 1], [[0, 1, 0], [-1, 0, 0]]
    x = _warped(form, images, index, turn, noise_sigma=0.5, seed=9)
    clean = _warped(form, images, index, turn)
    assert_close(x, to_numpy(clean) + 0.5 * noise(index, 49, 9), ELEMENTWISE, atol=NOISE)


def test_fused_equals_plain_with_everything(rng):
    images, labels = _data(rng, 20, 784)
    index = rng.integers(-2, 22, 64).astype(np.int32)
    affine = (np.eye(2, 3) + rng.normal(0, 0.1, (64, 2, 3))).astype(np.float32)
    settings = dict(mean=0.17, scale=3.0, noise_sigma=0.2, seed=SEED, affine=affine)
    (x, y), (plain_x, plain_y) = (
        ops.gather_batch(images, labels, index, **settings) for ops in (kernels, plain)
    )
    assert_close(x, plain_x, 2 * ELEMENTWISE, atol=3 * (2 * WARP + 0.4 * NOISE))
    assert_same_bits(y, plain_y)


@pytest.mark.parametrize("offset", OFFSETS)
def test_inputs_stay_as_they_were(form, rng, offset):
    images, labels = _data(rng, 4, 25)
    arrays = _arrays(form, images, labels, [1, 3], offset)
    form.ops.gather_batch(*arrays, noise_sigma=0.1)
    for array, before in zip(arrays, (images, labels, np.array([1, 3], np.int32)), strict=True):
        assert_same_bits(array, before)
