"""The built-in glyph set: what it promises about bytes, balance, difficulty and its cache."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mlp import InputError, data, glyphs

N = glyphs.SMALLEST


@pytest.fixture(scope="module")
def small():
    return glyphs.generate(4 * N)


def test_form(small):
    images, labels = small
    assert images.shape == (4 * N, 784) and images.dtype == np.uint8 and images.flags.c_contiguous
    assert labels.shape == (4 * N,) and labels.dtype == np.int32
    assert len(glyphs.CLASSES) == len(set(glyphs.CLASSES)) == 47
    assert (np.diff(labels) != 0).mean() > 0.8, "labels come in random order"


def test_same_bytes_whatever_the_threads(monkeypatch, small):
    monkeypatch.setattr(glyphs, "ThreadPoolExecutor", lambda _: ThreadPoolExecutor(1))
    again = glyphs.generate(4 * N)
    assert all(np.array_equal(a, b) for a, b in zip(small, again))


def test_seed_changes_everything(small):
    images, labels = glyphs.generate(4 * N, seed=1)
    assert not np.array_equal(labels, small[1])
    assert np.array_equal(np.bincount(labels), np.bincount(small[1]))
    assert not (images == small[0]).all(axis=1).any()


def test_images_are_all_different(small):
    assert len(np.unique(small[0], axis=0)) == 4 * N


def test_imbalance_of_bymerge():
    counts = dict(zip(glyphs.CLASSES, glyphs.class_counts(100_000)))
    digits = sum(counts[d] for d in "0123456789")
    assert 0.40 < digits / 100_000 < 0.55
    assert 10 < max(counts.values()) / min(counts.values()) < 20
    assert counts["O"] > counts["Q"] * 5 and counts["e"] > counts["f"] * 5


@pytest.mark.parametrize("n", [N, N + 1, 12_345, 814_255])
def test_counts_add_up(n):
    counts = glyphs.class_counts(n)
    assert counts.sum() == n and counts.min() >= glyphs.PER_CLASS


def test_smallest_set_can_be_split():
    labels = glyphs.generate(N)[1]
    split = data.stratified_split(labels)
    for part in (split.train, split.val, split.test):
        assert len(np.unique(labels[part])) == 47


def test_ink_is_a_centred_character(small):
    images = small[0].reshape(-1, 28, 28)
    ink = images > 100
    assert ink.reshape(len(ink), -1).sum(1).min() > 10, "every image shows something"
    assert ink.mean(0)[[0, -1]].max() < 0.05 and ink.mean(0)[:, [0, -1]].max() < 0.05, "the border is paper"
    rows, columns = ink.any(2), ink.any(1)
    height = 28 - rows[:, ::-1].argmax(1) - rows.argmax(1)
    width = 28 - columns[:, ::-1].argmax(1) - columns.argmax(1)
    assert 17 < np.median(np.maximum(height, width)) < 23
    centre = (rows[:, ::-1].argmax(1) - rows.argmax(1)) / 2
    assert abs(np.median(centre)) <= 1


def test_characters_are_upright(small):
    """A T has its bar above and an E its stem on the left; a transposed or mirrored renderer fails."""
    images, labels = small
    mean = {c: images[labels == glyphs.CLASSES.index(c)].reshape(-1, 28, 28).mean(0) for c in "TE7"}
    assert mean["T"][:10].sum() > 1.3 * mean["T"][18:].sum()
    assert mean["7"][:, 16:].sum() > 1.2 * mean["7"][:, :12].sum()
    assert mean["E"][:, :14].sum() > 1.1 * mean["E"][:, 14:].sum()


def test_merged_classes_are_drawn_in_both_cases():
    cases = zip(glyphs.CLASSES, glyphs._cases())
    drawn = {name: {glyphs.CHARACTERS[i] for i in pair} for name, pair in cases}
    assert drawn["C"] == {"C", "c"} and drawn["A"] == {"A"} and drawn["a"] == {"a"} and drawn["1"] == {"1"}
    assert sum(len(characters) == 2 for characters in drawn.values()) == 15


def test_neither_trivial_nor_noise():
    """The nearest class mean, weaker than a trained model, reads far more than chance, far less than all."""
    images, labels = glyphs.generate(6 * N)
    x = images / np.float32(255)
    train, test = slice(0, 4 * N), slice(4 * N, None)
    means = np.stack([x[train][labels[train] == k].mean(0) for k in range(47)])
    distance = (means**2).sum(1) - 2 * x[test] @ means.T
    accuracy = (distance.argmin(1) == labels[test]).mean()
    assert 0.35 < accuracy < 0.80


@pytest.mark.parametrize("n", [0, -5, N - 1, glyphs.LARGEST + 1])
def test_size_out_of_range(n):
    with pytest.raises(InputError, match=f"{n} images.*expected {N} to") as caught:
        glyphs.generate(n)
    assert "\n" not in str(caught.value)


def test_missing_fonts(monkeypatch, tmp_path):
    monkeypatch.setattr("matplotlib.get_data_path", lambda: str(tmp_path))
    with pytest.raises(InputError, match="fonts that ship with matplotlib") as caught:
        glyphs._fonts()
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


class TestCache:
    @pytest.fixture
    def made(self, tmp_path):
        return glyphs.load(N, tmp_path), tmp_path / f"glyphs-{N}-0.npz"

    @pytest.fixture
    def calls(self, made, monkeypatch):
        """Every later call of generate, which still works."""
        calls, generate = [], glyphs.generate
        monkeypatch.setattr(glyphs, "generate", lambda *a: calls.append(a) or generate(*a))
        return calls

    def test_reused(self, made, calls):
        again = glyphs.load(N, made[1].parent)
        assert not calls and all(np.array_equal(a, b) for a, b in zip(made[0], again))
        assert [p.name for p in made[1].parent.iterdir()] == [made[1].name], "no temporary file stays"

    def damage_flip(self, path):
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)

    def damage_truncate(self, path):
        path.write_bytes(path.read_bytes()[:-1000])

    def damage_empty(self, path):
        path.write_bytes(b"")

    def damage_text(self, path):
        path.write_text("not a cache")

    def damage_plain_npy(self, path):
        with path.open("wb") as file:
            np.save(file, np.zeros(3))

    def damage_foreign_keys(self, path):
        np.savez(path, other=np.zeros(3))

    def damage_other_labels(self, path):
        with np.load(path) as file:
            parts = dict(file)
        np.savez(path, **parts | {"labels": parts["labels"][::-1].copy()})

    def damage_other_dtype(self, path):
        with np.load(path) as file:
            parts = dict(file)
        np.savez(path, **parts | {"images": parts["images"].view(np.int8)})

    def damage_other_seed(self, path):
        glyphs.load(N, path.parent, seed=7)
        path.with_name(f"glyphs-{N}-7.npz").replace(path)

    @pytest.mark.parametrize("damage", [name for name in list(locals()) if name.startswith("damage_")])
    def test_damaged_is_made_again(self, made, calls, damage):
        getattr(self, damage)(made[1])
        calls.clear()
        again = glyphs.load(N, made[1].parent)
        assert len(calls) == 1 and all(np.array_equal(a, b) for a, b in zip(made[0], again))
        glyphs.load(N, made[1].parent)
        assert len(calls) == 1, "the sound copy replaced the damaged one"

    def test_root_that_cannot_be_written(self, tmp_path):
        root = tmp_path / "file"
        root.write_text("in the way")
        images, labels = glyphs.load(N, root)
        assert images.shape == (N, 784) and root.read_text() == "in the way"
