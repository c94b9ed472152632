"""python -m mlp explore: its numbers against hand calculations, its files, its refusals."""

import json

import matplotlib.image
import numpy as np
import pytest

from mlp import data, explore
from mlp.__main__ import main

from .training import write_npy

FILES = {"explore.json", "balance.png", "samples.png", "means.png", "pixels.png"}


def dataset(counts=(40, 10, 3), seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts), dtype=np.int32), counts))
    images = (rng.random((len(labels), 784)) * 60 * (labels[:, None] + 1)).astype(np.uint8)
    images[:, :300] = 0
    return data.Dataset("three", images, labels, ("zero", "é", "Z"), "ab" * 32)


def test_classes_and_parts_are_counted():
    found = dataset()
    about = explore.describe(found, data.stratified_split(found.labels))
    assert about["images"] == 53 and about["largest_over_smallest"] == pytest.approx(40 / 3)
    assert about["classes"] == [
        {"name": "zero", "images": 40, "train": 28, "val": 4, "test": 8},
        {"name": "é", "images": 10, "train": 7, "val": 1, "test": 2},
        {"name": "Z", "images": 3, "train": 1, "val": 1, "test": 1},
    ]
    assert about["split"] == {"train": 36, "val": 6, "test": 11}


def test_pixel_statistics_are_those_of_all_pixels():
    images = dataset().images
    statistics = explore.pixel_statistics(images)
    exact = images / 255.0
    assert abs(statistics["mean"] - exact.mean()) <= 1e-12 and abs(statistics["std"] - exact.std()) <= 1e-12
    assert statistics["zero_share"] == np.mean(images == 0)
    assert statistics["histogram"] == [int((images == value).sum()) for value in range(256)]


def test_statistics_of_many_images_in_parts():
    images = np.random.default_rng(1).integers(0, 256, (25_001, 4), np.uint8)
    statistics = explore.pixel_statistics(images)
    assert sum(statistics["histogram"]) == images.size
    assert abs(statistics["mean"] - images.mean() / 255) <= 1e-12


def test_samples_are_of_their_class_and_means_are_means():
    found = dataset()
    samples, means = explore.examples(found)
    for c in range(3):
        members = found.images[found.labels == c]
        assert any(np.array_equal(samples[c].ravel(), image) for image in members)
        assert np.abs(means[c].ravel() - members.astype(np.float64).mean(axis=0)).max() <= 1e-9
    assert np.array_equal(explore.examples(found)[0], samples)
    assert not np.array_equal(explore.examples(found, seed=1)[0], samples)


def test_the_summary_has_a_line_for_every_class_of_many():
    about = explore.describe(found := dataset(), data.stratified_split(found.labels))
    about["classes"] = [{"name": f"c{i}", "images": 7, "train": 4, "val": 1, "test": 2} for i in range(47)]
    lines = explore.summary(about).splitlines()
    assert max(map(len, lines)) <= 120 and len(lines) <= 25
    assert all(f" c{i} " in " ".join(lines) + " " for i in range(47))


def test_a_folder_is_explored(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_npy(tmp_path / "good (1)", rows=60)
    assert main(["explore", "--data", "good (1)"]) == 0
    folder = tmp_path / "runs" / "explore-good-1-"
    out, err = capsys.readouterr()
    assert err == "" and "60 images of 5 classes" in out and "results in runs/explore-good-1-" in out
    assert {path.name for path in folder.iterdir()} == FILES
    about = json.loads((folder / "explore.json").read_text(encoding="utf-8"))
    assert about["data"] == "good (1)" and [row["images"] for row in about["classes"]] == [12] * 5
    for name in FILES - {"explore.json"}:
        picture = matplotlib.image.imread(folder / name)
        assert min(picture.shape[:2]) >= 150 and picture[..., :3].std() > 0.02
    assert main(["explore", "--data", "good (1)", "--out", "elsewhere/deep"]) == 0  # and again
    assert (tmp_path / "elsewhere" / "deep" / "explore.json").read_bytes() == (folder / "explore.json").read_bytes()


@pytest.mark.parametrize("words, wrong", [
    (("--data", "nowhere"), "nowhere is not a readable folder"),
    (("--data", "glyphs:5"), "5"),
    (("--data", "good", "--out", "file"), "--out file cannot be written"),
    (("--data", "good", "--out", "file/below"), "--out file/below cannot be written"),
])  # fmt: skip
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, words, wrong):
    monkeypatch.chdir(tmp_path)
    write_npy(tmp_path / "good", rows=60)
    (tmp_path / "file").write_text("in the way")
    assert main(["explore", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and wrong in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
