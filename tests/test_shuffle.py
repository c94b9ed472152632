"""shuffle: a permutation, the same by every form, and one that looks random.

The statistics are of fixed seeds; their limits, p > 1e-4 and 5 standard errors, are passed by chance once in ten
thousand times or less.
"""

import itertools

import numpy as np
import pytest
from scipy import stats

import kernels
from kernels import plain

from .checks import OFFSETS, assert_same_bits, to_numpy
from .references import permutation

SEED = 0xFEDC_BA98_7654_3210
FEW = (0, 1, 2, 3, 31, 127, 128, 129, 255, 256, 257, 300)
LARGE = (1 << 17, (1 << 17) + 1, 400_000, 1_000_003)  # no element walks on; every second; some
KNOWN = (  # seed 0, epoch 0; SEED, epoch 3
    [2, 10, 7, 5, 3, 0, 1, 9, 8, 4, 11, 6],
    [7, 2, 3, 1, 8, 6, 5, 4, 0, 9, 10, 11],
)


def _index(N):
    return 3 * np.arange(N, dtype=np.int32) - 7


def _orders(N, seeds=None, epochs=None):
    """A permutation of [0, N) per row, for each of the seeds or epochs."""
    index = np.arange(N, dtype=np.int32)
    settings = [{"seed": s} for s in seeds] if epochs is None else [{"seed": SEED, "epoch": e} for e in epochs]
    return np.stack([kernels.shuffle(index, **s) for s in settings])


def test_a_permutation_the_same_by_every_form(form):
    for N in FEW if form.name == "simt" else range(301):
        out, intact = form.outputs(N, dtype=np.int32)
        assert form.ops.shuffle(form.array(_index(N), np.int32), seed=SEED, epoch=5, out=out) is out
        intact()
        assert_same_bits(np.sort(to_numpy(out)), _index(N))
        assert_same_bits(out, plain.shuffle(_index(N), seed=SEED, epoch=5))


@pytest.mark.parametrize("N", LARGE)
def test_a_large_permutation(backend, N):
    out, intact = backend.outputs(N, dtype=np.int32)
    backend.ops.shuffle(backend.array(_index(N), np.int32), seed=SEED, epoch=1, out=out)
    intact()
    assert_same_bits(np.sort(to_numpy(out)), _index(N))
    assert_same_bits(out, plain.shuffle(_index(N), seed=SEED, epoch=1))


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (SEED, 7), (2**64 - 1, 2**32 - 1)])
def test_as_it_is_defined(form, seed, epoch):
    for N in (1, 2, 255, 256, 257, 513, 1000):
        result = form.ops.shuffle(form.array(_index(N), np.int32), seed=seed, epoch=epoch)
        assert_same_bits(result, _index(N)[permutation(N, seed, epoch)])


def test_known_order(form):
    """What a replay of an old run counts on."""
    index = form.array(np.arange(12), np.int32)
    assert to_numpy(form.ops.shuffle(index)).tolist() == KNOWN[0]
    assert to_numpy(form.ops.shuffle(index, seed=SEED, epoch=3)).tolist() == KNOWN[1]


@pytest.mark.parametrize("offset", OFFSETS)
def test_any_values_wherever_they_lie(form, rng, offset):
    """Equal ones and negative ones; the index stays as it was."""
    values = rng.integers(-3, 4, 77).astype(np.int32)
    index = form.array(values, np.int32, offset)
    result = form.ops.shuffle(index, seed=9)
    assert_same_bits(result, values[permutation(77, 9, 0)])
    assert_same_bits(index, values)


def test_every_bit_of_seed_and_epoch_counts():
    """Two random permutations agree in one position on average, in 12 once in a billion pairs."""
    orders = _orders(1000, [0, *(1 << k for k in range(64))])
    epochs = _orders(1000, epochs=[0, *(1 << k for k in range(32))])
    for a, b in [*itertools.combinations(orders, 2), *itertools.combinations(epochs, 2)]:
        assert np.count_nonzero(a == b) < 12


@pytest.mark.parametrize("by", ["seeds", "epochs"])
@pytest.mark.parametrize(("N", "count"), [(2, 2), (3, 6), (4, 24), (5, 120), (6, 720)])
def test_all_permutations_of_a_few_elements_are_equally_likely(N, count, by):
    orders = _orders(N, **{by: range(40_000)})
    _, found = np.unique(orders @ (N ** np.arange(N)), return_counts=True)
    assert len(found) == count
    assert stats.chisquare(found).pvalue > 1e-4


@pytest.fixture(scope="module")
def thousands() -> np.ndarray:
    """2000 permutations of 1000 elements, of consecutive epochs."""
    return _orders(1000, epochs=range(2000))


def test_every_element_is_equally_likely_everywhere(thousands):
    for position in (0, 1, 15, 16, 31, 32, 499, 500, 998, 999):
        found = np.bincount(thousands[:, position] // 20, minlength=50)
        assert stats.chisquare(found).pvalue > 1e-4


def test_neighbours_are_independent(thousands):
    """Their correlation is -1 / (N - 1), because no element comes twice; its variance is 1 / N."""
    K, N = thousands.shape
    for distance in (1, 2, 16, 32, 512):
        first, second = thousands[:, :-distance], thousands[:, distance:]
        correlation = np.corrcoef(first.ravel(), second.ravel())[0, 1]
        assert abs(correlation + 1 / (N - 1)) < 5 / np.sqrt(first.size), distance
        differences = np.bincount(((second - first) % N).ravel(), minlength=N)
        assert differences[0] == 0 and stats.chisquare(differences[1:]).pvalue > 1e-4, distance


def test_epochs_are_independent(thousands):
    """Coincidences of two permutations are 1 on average, with variance 1."""
    K, N = thousands.shape
    for first, second in ((thousands[:-1], thousands[1:]), (thousands, np.arange(N)[None])):
        same = (first == second).sum(axis=1)
        assert abs(same.mean() - 1) < 5 / np.sqrt(len(same)) and abs(same.var() - 1) < 5 * np.sqrt(3 / len(same))
        pairs = zip(first, np.broadcast_to(second, first.shape), strict=True)
        correlation = [np.corrcoef(a, b)[0, 1] for a, b in pairs]
        assert abs(np.mean(correlation)) < 5 / np.sqrt(N * len(same))


def test_plain_runs_on_torch_tensors():
    torch = pytest.importorskip("torch")
    for N in (0, 1, 2, 5, 256, 1000, 70_000):
        index = torch.tensor(_index(N))
        expected = kernels.shuffle(_index(N), seed=SEED, epoch=4)
        result = plain.shuffle(index, seed=SEED, epoch=4)
        assert isinstance(result, torch.Tensor) and result.dtype == torch.int32
        assert_same_bits(result, expected)
        out = torch.full_like(index, -1)
        assert plain.shuffle(index, seed=SEED, epoch=4, out=out) is out
        assert_same_bits(out, expected)
        assert_same_bits(index, _index(N))


def test_into_itself_is_refused(backend):
    index = backend.array(_index(9), np.int32)
    with pytest.raises(ValueError, match=r"\bout must not be index\b"):
        kernels.shuffle(index, out=index)
    assert_same_bits(index, _index(9))


def test_a_torch_tensor_into_itself_is_refused():
    torch = pytest.importorskip("torch")
    index = torch.tensor(_index(9))
    with pytest.raises(ValueError, match=r"\bout must not be index\b"):
        kernels.shuffle(index, out=index)


def test_an_index_of_more_than_two_billion_elements_is_refused(tmp_path):
    """Positions have 32 bits. A file that is all hole takes no space, and is not read."""
    index = np.asarray(np.memmap(tmp_path / "index", np.int32, "w+", shape=(2**31 + 1,)))
    with pytest.raises(ValueError, match=r"\bindex must have at most 2\^31 elements, got 2147483649"):
        kernels.shuffle(index)
