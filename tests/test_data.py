"""Data sources, their integrity checks, the EMNIST download (from a server on this machine) and the split."""

import gzip
import hashlib
import http.server
import io
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlp import InputError, data, emnist, glyphs

MNIST = Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist-t10k"
NOBODY = "http://127.0.0.1:1/"  # port 1 refuses at once


def idx(array, magic=None):
    magic = magic or (0x800 | array.ndim)
    return np.array([magic, *array.shape], ">u4").tobytes() + array.astype(np.uint8).tobytes()


def sample(n=20, classes=10, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (n, 28, 28), np.uint8)
    return images, np.arange(n, dtype=np.uint8) % classes


def write_pair(folder, stem, images, labels, compress=False):
    folder.mkdir(parents=True, exist_ok=True)
    for kind, array in ((data.IMAGES, images), (data.LABELS, labels)):
        path = folder / f"{stem}{kind}{'.gz' if compress else ''}"
        path.write_bytes(gzip.compress(idx(array), 1) if compress else idx(array))


def write_emnist(root, split="bymerge", n=94, compress=False):
    """Both parts in torchvision's layout; returns the upright images and the labels, train first."""
    parts = []
    for seed, part in enumerate(("train", "test")):
        images, labels = sample(n, 47, seed)
        stem, stored = f"emnist-{split}-{part}", images.transpose(0, 2, 1)
        write_pair(root / "EMNIST" / "raw", stem, stored, labels, compress)
        parts.append((images, labels))
    return [np.concatenate(arrays) for arrays in zip(*parts)]


def refused(source, *words, root=Path("nowhere")):
    """load(source) fails with one line that holds every one of the words."""
    with pytest.raises(InputError) as caught:
        data.load(source, root)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, (word, message)
    return message


def test_import_is_light():
    """Training on EMNIST needs none of these, and some machines cannot import them."""
    code = "import sys, mlp.data; print({'matplotlib', 'PIL', 'scipy', 'torch', 'tqdm'} & set(sys.modules))"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [False, True])
def test_idx_folder(tmp_path, compress):
    images, labels = sample()
    write_pair(tmp_path / "mine", "train", images, labels, compress)
    loaded = data.load(str(tmp_path / "mine"))
    assert loaded.name == "mine" and loaded.notice == ""
    assert loaded.class_names == tuple("0123456789")
    assert loaded.images.dtype == np.uint8 and loaded.images.flags.c_contiguous
    assert loaded.labels.dtype == np.int32
    assert np.array_equal(loaded.images, images.reshape(-1, 784)) and np.array_equal(loaded.labels, labels)


def test_parts_are_concatenated_in_sorted_order(tmp_path):
    a, b = sample(20, seed=1), sample(30, seed=2)
    write_pair(tmp_path, "train", *b)
    write_pair(tmp_path, "t10k", *a, compress=True)
    loaded = data.load(tmp_path)
    assert np.array_equal(loaded.images, np.concatenate([a[0], b[0]]).reshape(-1, 784))
    assert np.array_equal(loaded.labels, np.concatenate([a[1], b[1]]))


def test_a_file_and_its_gzipped_twin_are_read_once(tmp_path):
    images, labels = sample()
    write_pair(tmp_path, "train", images, labels)
    write_pair(tmp_path, "train", images ^ 255, labels, compress=True)
    loaded = data.load(tmp_path)
    assert np.array_equal(loaded.images, images.reshape(-1, 784)), "the plain one, which is faster to read"


@pytest.mark.parametrize("split", ["bymerge", "balanced"])
def test_emnist_files_in_a_folder_are_turned_upright(tmp_path, split):
    images, labels = write_emnist(tmp_path, split)
    loaded = data.load(tmp_path / "EMNIST" / "raw")
    # "test" sorts before "train".
    assert np.array_equal(loaded.images[94:], images[:94].reshape(-1, 784))
    assert loaded.class_names == data.BYMERGE_CLASSES and loaded.images.flags.c_contiguous


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_npy_folder(tmp_path, flat, dtype):
    images, labels = sample()
    np.save(tmp_path / "X_images.npy", np.asfortranarray(images.reshape(20, 784) if flat else images))
    np.save(tmp_path / "y_images.npy", labels.astype(dtype))
    loaded = data.load(tmp_path)
    assert np.array_equal(loaded.images, images.reshape(-1, 784)) and loaded.images.flags.c_contiguous
    assert np.array_equal(loaded.labels, labels) and loaded.labels.dtype == np.int32


def test_checksum_follows_the_bytes_and_not_the_container(tmp_path):
    images, labels = sample()
    write_pair(tmp_path / "a", "train", images, labels)
    write_pair(tmp_path / "b", "other", images, labels, compress=True)
    write_pair(tmp_path / "c", "train", images ^ 1, labels)
    write_pair(tmp_path / "d", "train", images, labels[::-1])
    a, b, c, d = (data.load(tmp_path / name).checksum for name in "abcd")
    assert a == b and len({a, c, d}) == 3
    assert a == hashlib.sha256(images.tobytes() + labels.astype(np.int32).tobytes()).hexdigest()


def test_real_mnist():
    if not MNIST.is_dir():
        pytest.skip("shared/data/mnist-t10k is not beside the repository")
    loaded = data.load(MNIST)
    assert loaded.images.shape == (10_000, 784) and loaded.name == "mnist-t10k"
    assert np.bincount(loaded.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    ones = loaded.images[loaded.labels == 1].reshape(-1, 28, 28).mean(0)
    assert (ones.sum(0) > 10).sum() < (ones.sum(1) > 10).sum(), "a 1 stands upright"


def test_bymerge_size_is_read_in_seconds(tmp_path):
    images, labels = np.zeros((200_000, 28, 28), np.uint8), np.arange(200_000) % 47
    write_pair(tmp_path, "emnist-bymerge-train", images, labels)
    start = time.perf_counter()
    data.load(tmp_path)
    assert time.perf_counter() - start < 10  # a Python loop over images takes longer than this


# ---- damaged folders -----------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path):
    """A folder with one sound pair; the paths of its images and labels."""
    write_pair(tmp_path, "train", *sample())
    return tmp_path / f"train{data.IMAGES}", tmp_path / f"train{data.LABELS}"


def test_missing_folder(tmp_path):
    refused(tmp_path / "nix", "nix", "auto, emnist, glyphs")


def test_a_file_instead_of_a_folder(pair):
    refused(pair[0], pair[0], "expected a folder")


def test_empty_folder(tmp_path):
    refused(tmp_path, tmp_path, "holds no images")


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("length", [0, 3, 7, -1])
def test_truncated(pair, which, length):
    path = pair[which]
    path.write_bytes(path.read_bytes()[:length])
    refused(path.parent, path, "again")


def test_trailing_bytes(pair):
    pair[0].write_bytes(pair[0].read_bytes() + b"x")
    refused(pair[0].parent, pair[0], "bytes, expected")


@pytest.mark.parametrize("change", [
    lambda raw: raw[: len(raw) // 2],
    lambda raw: raw[:5],
    lambda raw: raw + b"garbage",
    lambda raw: b"not gzip" + raw,
    lambda raw: raw[:-8] + bytes(8),
    lambda raw: raw[: len(raw) // 2] + bytes(9) + raw[len(raw) // 2 + 9 :],
])  # fmt: skip
@pytest.mark.parametrize("kind", [data.IMAGES, data.LABELS])
def test_corrupt_gzip(tmp_path, kind, change):
    write_pair(tmp_path, "train", *sample(200), compress=True)
    path = tmp_path / f"train{kind}.gz"
    path.write_bytes(change(path.read_bytes()))
    refused(tmp_path, path, "gzip")


@pytest.mark.parametrize("which", [0, 1])
def test_wrong_magic(pair, which):
    pair[which].write_bytes(pair[1 - which].read_bytes())
    refused(pair[which].parent, pair[which], "begins with")


def test_wrong_image_shape(tmp_path):
    write_pair(tmp_path, "train", np.zeros((20, 32, 30), np.uint8), sample()[1])
    refused(tmp_path, data.IMAGES, "32x30", "28x28")


def test_count_mismatch(tmp_path):
    write_pair(tmp_path, "train", sample(21)[0], sample(20)[1])
    refused(tmp_path, data.LABELS, "20 labels", "21 images")


@pytest.mark.parametrize("which", [0, 1])
def test_images_without_labels_and_the_reverse(pair, which):
    pair[which].unlink()
    refused(pair[0].parent, pair[1 - which], "alone", pair[which].name)


def test_a_folder_that_stands_in_for_a_file(pair):
    pair[0].unlink()
    pair[0].mkdir()
    refused(pair[0].parent, pair[0], "cannot be read")


def test_no_images_at_all(tmp_path):
    write_pair(tmp_path, "train", np.zeros((0, 28, 28)), np.zeros(0))
    refused(tmp_path, data.LABELS, "at least one")


def test_empty_class(tmp_path):
    images, labels = sample()
    write_pair(tmp_path, "train", images, np.where(labels == 4, 5, labels))
    refused(tmp_path, data.LABELS, "no label 4")


def test_bymerge_needs_all_47_classes(tmp_path):
    write_pair(tmp_path, "emnist-bymerge-train", *sample(46, 46))
    refused(tmp_path, "emnist-bymerge-train", "no label 46")


def test_bymerge_knows_47_classes(tmp_path):
    write_pair(tmp_path, "emnist-bymerge-train", *sample(48, 48))
    refused(tmp_path, "emnist-bymerge-train", "label 47", "0 to 46")


def test_several_emnist_splits(tmp_path):
    write_emnist(tmp_path, "bymerge")
    write_emnist(tmp_path, "balanced")
    refused(tmp_path / "EMNIST" / "raw", "emnist-balanced", "emnist-bymerge", "expected one")


def test_emnist_beside_something_else(tmp_path):
    write_pair(tmp_path, "emnist-bymerge-train", *sample(47, 47))
    write_pair(tmp_path, "t10k", *sample())
    refused(tmp_path, "emnist-bymerge", "not EMNIST")


def test_idx_and_npy_together(pair):
    np.save(pair[0].with_name("X_images.npy"), sample()[0])
    refused(pair[0].parent, "IDX and .npy")


IMAGES_OK, LABELS_OK = sample()


@pytest.mark.parametrize("images, labels, named", [
    (IMAGES_OK.astype(np.float32), LABELS_OK, "X_images.npy"),
    (IMAGES_OK[:, :27], LABELS_OK, "X_images.npy"),
    (IMAGES_OK.reshape(20, 28, 28, 1), LABELS_OK, "X_images.npy"),
    (np.uint8(3), LABELS_OK, "X_images.npy"),
    (np.array([None, "x"], object), LABELS_OK, "X_images.npy"),
    (None, LABELS_OK, "X_images.npy"),
    (IMAGES_OK, None, "y_images.npy"),
    (IMAGES_OK, LABELS_OK.astype(np.float64), "y_images.npy"),
    (IMAGES_OK, LABELS_OK.astype(object), "y_images.npy"),
    (IMAGES_OK, LABELS_OK[:19], "y_images.npy"),
    (IMAGES_OK, LABELS_OK[:, None], "y_images.npy"),
    (IMAGES_OK, LABELS_OK.astype(np.int8) - 1, "label -1"),
    (IMAGES_OK, LABELS_OK.astype(np.int64) + 991, "label 1000"),
    (IMAGES_OK, np.where(LABELS_OK == 9, 2**32, LABELS_OK.astype(np.int64)), f"label {2**32}"),
    (IMAGES_OK[:0], LABELS_OK[:0], "y_images.npy"),
])  # fmt: skip
def test_unusable_npy(tmp_path, images, labels, named):
    for name, array in (("X_images.npy", images), ("y_images.npy", labels)):
        if array is not None:
            np.save(tmp_path / name, array)
    refused(tmp_path, named)


@pytest.mark.parametrize("name", ["X_images.npy", "y_images.npy"])
@pytest.mark.parametrize("change", [lambda raw: b"", lambda raw: b"text" * 9, lambda raw: raw[:-1],
                                    lambda raw: raw[:20]])  # fmt: skip
def test_damaged_npy(tmp_path, name, change):
    np.save(tmp_path / "X_images.npy", IMAGES_OK)
    np.save(tmp_path / "y_images.npy", LABELS_OK)
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    refused(tmp_path, tmp_path / name)


class Bomb:
    """Unpickling one makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["X_images.npy", "y_images.npy"])
def test_a_pickle_in_npy_is_never_run(tmp_path, name):
    np.save(tmp_path / "X_images.npy", IMAGES_OK)
    np.save(tmp_path / "y_images.npy", LABELS_OK)
    np.save(tmp_path / name, np.array([Bomb(tmp_path / "ran")], object), allow_pickle=True)
    refused(tmp_path, tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_npz_under_the_name_npy(tmp_path):
    np.save(tmp_path / "y_images.npy", LABELS_OK)
    with (tmp_path / "X_images.npy").open("wb") as file:
        np.savez(file, IMAGES_OK)
    refused(tmp_path, tmp_path / "X_images.npy")


# ---- EMNIST on disk and through the network ------------------------------------------------------


@pytest.mark.parametrize("compress", [False, True])
def test_emnist_on_disk(tmp_path, compress, monkeypatch):
    monkeypatch.setenv("EMNIST_URL", NOBODY)
    images, labels = write_emnist(tmp_path, compress=compress)
    write_emnist(tmp_path, "balanced")  # torchvision leaves every split in the same folder
    for source in ("emnist", "auto"):
        loaded = data.load(source, tmp_path)
        assert loaded.name == "emnist-bymerge" and loaded.notice == ""
        assert np.array_equal(loaded.images, images.reshape(-1, 784))
        assert np.array_equal(loaded.labels, labels)
        assert "".join(loaded.class_names) == "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"


@pytest.mark.parametrize("source", ["emnist", "auto"])
def test_damaged_emnist_is_an_error_even_for_auto(tmp_path, source, monkeypatch):
    monkeypatch.setenv("EMNIST_URL", NOBODY)
    write_emnist(tmp_path)
    path = tmp_path / "EMNIST" / "raw" / "emnist-bymerge-test-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    refused(source, path, root=tmp_path)


@pytest.fixture
def mirror(monkeypatch):
    """A server on this machine; mirror(body, status, length) makes EMNIST_URL lead to that answer."""
    answer = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(answer["status"])
            self.send_header("Content-Length", str(answer["length"]))
            self.end_headers()
            self.wfile.write(answer["body"])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("EMNIST_URL", f"http://127.0.0.1:{server.server_port}/gzip.zip")

    def serve(body, status=200, length=None, md5=None):
        answer.update(body=body, status=status, length=len(body) if length is None else length)
        monkeypatch.setenv("EMNIST_MD5", md5 or hashlib.md5(body).hexdigest())

    yield serve
    server.shutdown()
    server.server_close()
    thread.join()


def archive(root, splits=("bymerge",), pack=gzip.compress):
    """The bytes of a zip like NIST's, and the upright images and labels in it."""
    arrays, buffer = None, io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for split in splits:
            arrays = write_emnist(root / split, split)
            for path in sorted((root / split / "EMNIST" / "raw").iterdir()):
                file.writestr(f"gzip/{path.name}.gz", pack(path.read_bytes()))
    return buffer.getvalue(), arrays


def leftovers(root):
    return [str(p.relative_to(root)) for p in root.rglob("*") if not p.is_dir() or p.name.startswith(".")]


@pytest.mark.parametrize("source", ["emnist", "auto"])
def test_download(tmp_path, mirror, source, monkeypatch):
    body, (images, labels) = archive(tmp_path, ("balanced", "bymerge"))
    mirror(body)
    root = tmp_path / "root"
    loaded = data.load(source, root)
    assert loaded.name == "emnist-bymerge" and loaded.notice == ""
    assert np.array_equal(loaded.images, images.reshape(-1, 784)) and np.array_equal(loaded.labels, labels)
    names = sorted(name for pair in emnist.FILES for name in pair)
    assert sorted(leftovers(root)) == [os.path.join("EMNIST", "raw", name) for name in names]
    monkeypatch.setenv("EMNIST_URL", NOBODY)
    assert data.load(source, root).checksum == loaded.checksum, "the second time needs no network"


def test_download_404(tmp_path, mirror):
    mirror(b"gone", status=404)
    refused("emnist", "127.0.0.1", "404", root=tmp_path)
    assert leftovers(tmp_path) == []


def test_download_wrong_md5(tmp_path, mirror):
    mirror(b"something else", md5="0" * 32)
    refused("emnist", "127.0.0.1", "MD5", "0" * 32, root=tmp_path)
    assert leftovers(tmp_path) == []


def test_a_mirror_without_md5_must_hold_the_known_archive(tmp_path, mirror, monkeypatch):
    mirror(b"something else")
    monkeypatch.delenv("EMNIST_MD5")
    refused("emnist", emnist.MD5, root=tmp_path)


def test_download_truncated(tmp_path, mirror):
    body, _ = archive(tmp_path / "made")
    mirror(body[:1000], length=len(body))
    refused("emnist", "broke off", f"1000 of {len(body)}", root=tmp_path / "root")
    assert leftovers(tmp_path / "root") == []


def test_archive_without_bymerge(tmp_path, mirror):
    mirror(archive(tmp_path / "made", ("balanced",))[0])
    refused("emnist", "does not hold emnist-bymerge-train", root=tmp_path / "root")
    assert leftovers(tmp_path / "root") == []


@pytest.mark.parametrize("pack", [lambda raw: raw, lambda raw: gzip.compress(raw)[:-9]])
def test_archive_with_damaged_members(tmp_path, mirror, pack):
    mirror(archive(tmp_path / "made", pack=pack)[0])
    refused("emnist", "cannot be unpacked", root=tmp_path / "root")
    assert leftovers(tmp_path / "root") == []


def test_archive_that_is_no_zip(tmp_path, mirror):
    mirror(b"<html>log in first</html>")
    refused("emnist", "cannot be unpacked", root=tmp_path)
    assert leftovers(tmp_path) == []


def test_root_that_cannot_be_written(tmp_path, mirror):
    mirror(archive(tmp_path / "made")[0])
    root = tmp_path / "file"
    root.write_text("in the way")
    refused("emnist", root, "cannot be stored", root=root)


def test_full_disk(tmp_path, mirror, monkeypatch):
    mirror(archive(tmp_path / "made")[0])

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(emnist.shutil, "copyfileobj", full)
    refused("emnist", "No space left on device", tmp_path / "root", root=tmp_path / "root")
    assert leftovers(tmp_path / "root") == []


@pytest.mark.parametrize("url", [NOBODY, "no address", "http://"])
def test_unreachable(tmp_path, monkeypatch, url):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("EMNIST_URL", url)
    refused("emnist", url, "EMNIST_URL", root=tmp_path)


# ---- glyphs and auto -----------------------------------------------------------------------------


def test_auto_falls_back_with_a_notice(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("EMNIST_URL", NOBODY)
    monkeypatch.setattr(data, "DEFAULT_GLYPHS", 2000)
    loaded = data.load("auto", tmp_path)
    assert loaded.name == "glyphs-2000" and len(loaded.labels) == 2000
    assert "NOT EMNIST" in loaded.notice and NOBODY in loaded.notice and "\n" not in loaded.notice
    asked_for = data.load("glyphs:2000", tmp_path)
    assert asked_for.notice == "" and asked_for.checksum == loaded.checksum


def test_glyphs_have_bymerge_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DEFAULT_GLYPHS", 1000)
    loaded = data.load("glyphs", tmp_path)
    assert loaded.class_names == tuple(glyphs.CLASSES) and loaded.name == "glyphs-1000"
    assert (tmp_path / "glyphs-1000-0.npz").is_file()


@pytest.mark.parametrize("size", ["abc", "", "-3", "1e5", " 2000", "²"])
def test_glyphs_without_a_number(tmp_path, size):
    source = f"glyphs:{size}"
    refused(source, source, "glyphs:100000", root=tmp_path)


@pytest.mark.parametrize("n", [0, 46, 999, 10**11])
def test_glyphs_of_an_impossible_size(tmp_path, n):
    refused(f"glyphs:{n}", f"{n} images", "expected 1000 to", root=tmp_path)


# ---- split ---------------------------------------------------------------------------------------

FRACTIONS = [(0.70, 0.10, 0.20), (0.1, 0.8, 0.1), (0.98, 0.01, 0.01), (0.05, 0.05, 0.9)]


@given(
    st.lists(st.integers(3, 60), min_size=1, max_size=12),
    st.integers(0, 2**32 - 1),
    st.sampled_from(FRACTIONS),
)
def test_split_properties(counts, seed, fractions):
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    np.random.default_rng(seed).shuffle(labels)
    split = data.stratified_split(labels, seed, fractions)
    parts = (split.train, split.val, split.test)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    for part, fraction in zip(parts, fractions):
        assert part.dtype == np.int32 and (np.diff(part) > 0).all()
        share = np.bincount(labels[part], minlength=len(counts))
        assert share.min() >= 1
        # Two roundings, and the images that the guarantee of one each moves.
        assert (np.abs(share - fraction * np.array(counts)) <= 2).all()
    again = data.stratified_split(labels.astype(np.int64), seed, fractions)
    assert all(np.array_equal(a, b) for a, b in zip(parts, (again.train, again.val, again.test)))


def test_split_shares_and_seed():
    labels = np.repeat(np.arange(47), 1000)
    split = data.stratified_split(labels)
    assert (len(split.train), len(split.val), len(split.test)) == (32_900, 4_700, 9_400)
    assert not np.array_equal(split.test, data.stratified_split(labels, seed=1).test)


@pytest.mark.parametrize("count", [1, 2])
def test_split_of_a_class_too_small(count):
    labels = np.array([0] * 10 + [1] * count)
    with pytest.raises(InputError, match=f"class 1 has {count} image.*at least 3") as caught:
        data.stratified_split(labels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fractions", [(0.7, 0.3), (0.8, 0.2, 0.0), (0.7, 0.2, 0.2), (0.7, np.nan, 0.2)])
def test_split_fractions(fractions):
    with pytest.raises(InputError, match="sum to 1"):
        data.stratified_split(np.repeat(np.arange(3), 10), fractions=fractions)
