"""Whole runs of train.py: what they leave behind, Ctrl-C, fused against plain, without CuPy and torch."""

import csv
import gzip
import json
import re
import signal
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from kernels import plain
from mlp import checkpoint, data
from mlp.configs import Config
from mlp.evaluate import NOISE_SIGMA
from mlp.model import MLP

from .training import BACKENDS, ROOT, SCRIPT, easy_images, environment, script_after, train, tree, write_npy

HISTORY = [
    "epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds", "images_per_second",
]  # fmt: skip
FILES = {
    "config.json", "history.csv", "metrics.json", "confusion.csv", "checkpoint.npz", "training.png",
    "confusion.png", "noise.png",
}  # fmt: skip
OPTIONS = ("--model", "m1", "--device", "cpu", "--data", "good", "--hidden", "32,16", "--batch-size", "64")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_npy(folder / "good")
    return folder


@pytest.fixture(scope="module")
def runs(place):
    """The same training, plain and fused: the finished processes by name; their folders are place / name."""
    return {
        name: train(*OPTIONS, "--epochs", 6, "--out", name, *extra, cwd=place)
        for name, extra in zip(BACKENDS, ((), ("--fused",)))
    }


def read_json(path):
    """Strict JSON: NaN and Infinity, which Python would accept, are errors."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in {path}"))


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def evaluate(folder, data_folder, part):
    """Accuracy and mean cross-entropy of the checkpoint in `folder`, calculated here."""
    arrays, config, names = checkpoint.load(folder / "checkpoint.npz")
    dataset = data.load(str(data_folder))
    index = getattr(data.stratified_split(dataset.labels), part)
    sizes = (dataset.images.shape[1], *config.hidden, len(names))
    model = MLP(sizes, config.activation, rows=len(index), ops=plain, dtype=np.float64)
    for layer, (weight, bias) in enumerate(zip(model.weights, model.biases)):
        weight[...], bias[...] = arrays[f"weight{layer}"], arrays[f"bias{layer}"]
    logits, labels = model.forward(dataset.images[index] / 255.0), dataset.labels[index]
    loss, _ = plain.softmax_cross_entropy(logits, labels)
    return np.mean(logits.argmax(axis=1) == labels), float(loss)


def assert_complete(folder):
    """The documented files and nothing else, and what can be checked of them in any run."""
    cut_short = read_json(folder / "metrics.json")["outcome"] in ("interrupted", "diverged")
    assert {path.name for path in folder.iterdir()} == FILES | ({"state.npz"} if cut_short else set())
    metrics, rows = read_json(folder / "metrics.json"), read_csv(folder / "history.csv")
    assert {"data", "device", "val", "test", "noise"} <= metrics.keys()
    for part in ("val", "test"):
        assert metrics[part].keys() == {"accuracy", "macro_f1", "cross_entropy", "n"}
        assert 0 <= metrics[part]["accuracy"] <= 1 and 0 <= metrics[part]["macro_f1"] <= 1
    assert list(metrics["noise"]) == [str(sigma) for sigma in NOISE_SIGMA]
    assert metrics["noise"]["0.0"] == {name: metrics["test"][name] for name in ("accuracy", "macro_f1")}
    assert rows[0] == HISTORY and len(rows) == 1 + metrics["epochs"]
    assert [int(row[0]) for row in rows[1:]] == list(range(1, len(rows)))
    header, *body = read_csv(folder / "confusion.csv")
    matrix = np.array([row[1:] for row in body], int)
    assert header[1:] == [row[0] for row in body] == read_json(folder / "config.json")["class_names"]
    assert matrix.sum() == metrics["test"]["n"]
    assert np.trace(matrix) / matrix.sum() == metrics["test"]["accuracy"]
    for name in ("training", "confusion", "noise"):
        picture = matplotlib.image.imread(folder / f"{name}.png")
        assert min(picture.shape[:2]) >= 300 and picture[..., :3].std() > 0.02
    return metrics, [dict(zip(HISTORY, map(float, row))) for row in rows[1:]]


@pytest.mark.parametrize("name", BACKENDS)
def test_a_run_leaves_what_is_documented(place, runs, name):
    assert (runs[name].returncode, runs[name].stderr) == (0, "")
    metrics, history = assert_complete(place / name)
    assert metrics["outcome"] == "finished" and metrics["data"] == "good" and len(history) == 6
    assert (metrics["val"]["n"], metrics["test"]["n"]) == (150, 300)
    best = min(history, key=lambda row: row["val_loss"])
    assert metrics["best_epoch"] == best["epoch"]
    assert metrics["val"]["cross_entropy"] == pytest.approx(best["val_loss"], rel=1e-6)
    assert metrics["val"]["accuracy"] == best["val_accuracy"]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert all(row["seconds"] > 0 and row["images_per_second"] > 0 for row in history)
    config = read_json(place / name / "config.json")
    assert {field for field in Config.__dataclass_fields__} <= config.keys()
    assert config["hidden"] == [32, 16] and config["fused"] is (name == "fused")
    assert len(re.findall("^epoch +[0-9]+ ", runs[name].stdout, re.M)) == 6


@pytest.mark.parametrize("name", BACKENDS)
def test_the_checkpoint_is_as_good_as_the_run_says(place, runs, name):
    metrics = read_json(place / name / "metrics.json")
    accuracy, loss = evaluate(place / name, place / "good", "test")
    assert accuracy == metrics["test"]["accuracy"] > 0.5
    assert loss == pytest.approx(metrics["test"]["cross_entropy"], rel=1e-5)


def test_fused_is_as_accurate_as_plain(place, runs):
    one, other = (read_json(place / name / "metrics.json")["test"] for name in BACKENDS)
    assert abs(one["accuracy"] - other["accuracy"]) <= 0.005
    assert abs(one["cross_entropy"] - other["cross_entropy"]) <= 1e-3 * one["cross_entropy"]


def test_the_same_command_gives_the_same_result(place, runs):
    again = train(*OPTIONS, "--epochs", 6, "--out", "again", "--fused", cwd=place)
    assert again.returncode == 0
    first, second = (checkpoint.load(place / name / "checkpoint.npz")[0] for name in ("fused", "again"))
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    one, other = ((place / name / "confusion.csv").read_bytes() for name in ("fused", "again"))
    assert one == other
    rows = [[row[:6] for row in read_csv(place / name / "history.csv")] for name in ("fused", "again")]
    assert rows[0] == rows[1]


def test_a_folder_that_holds_a_run_is_refused(place, runs):
    before = tree(place)
    result = train(*OPTIONS, "--out", "plain", cwd=place)
    assert result.returncode == 2 and result.stderr.startswith("error: --out plain already holds a run")
    assert tree(place) == before


def write_idx(folder, rows=120, classes=3):
    images, labels = easy_images(rows, classes)
    folder.mkdir()
    header = np.array([0x803, rows, 28, 28], ">u4").tobytes()
    (folder / "toy-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
    header = np.array([0x801, rows], ">u4").tobytes()
    (folder / "toy-labels-idx1-ubyte").write_bytes(header + labels.astype(np.uint8).tobytes())


def test_idx_files_and_the_default_folder(tmp_path):
    write_idx(tmp_path / "idx")
    arguments = ("--model", "m0", "--device", "cpu", "--data", "idx", "--epochs", 2)
    same_second = script_after("import time; time.strftime = lambda *_: '20250131-235959'")
    for python in ((), same_second, same_second):
        result = train(*arguments, cwd=tmp_path, python=python)
        assert (result.returncode, result.stderr) == (0, "")
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 3
    for folder in folders:
        assert re.fullmatch(r"m0-idx-\d{8}-\d{6}x?", folder.name)
        metrics, history = assert_complete(folder)
        assert metrics["data"] == "idx" and len(history) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"idx", "runs"}


def test_glyphs(tmp_path):
    arguments = ("--data", "glyphs:1000", "--epochs", 2, "--hidden", 16, "--out", "run", "--device", "cpu")
    result = train("--model", "m1", *arguments, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    metrics, _ = assert_complete(tmp_path / "run")
    assert metrics["data"] == "glyphs-1000" and metrics["val"]["n"] + metrics["test"]["n"] > 250
    assert len(read_csv(tmp_path / "run" / "confusion.csv")) == 48


def test_patience_and_full_batches(place):
    arguments = ("--batch-size", "full", "--lr", "0.3", "--patience", 2, "--epochs", 200, "--fused")
    result = train(*OPTIONS, *arguments, "--out", "patience", cwd=place)
    assert (result.returncode, result.stderr) == (0, "")
    metrics, history = assert_complete(place / "patience")
    losses = [row["val_loss"] for row in history]
    assert metrics["outcome"] == "stopped early" and len(history) == metrics["best_epoch"] + 2 < 200
    assert metrics["best_epoch"] == 1 + int(np.argmin(losses))
    assert evaluate(place / "patience", place / "good", "val")[1] == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.parametrize("extra", [(), ("--fused",)], ids=BACKENDS)
def test_a_run_that_diverges_says_so_once(place, tmp_path, extra):
    arguments = ("--optimizer", "sgd", "--lr", "1e30", "--out", tmp_path / "run", *extra)
    result = train(*OPTIONS, *arguments, cwd=place)
    assert result.returncode == 1
    state = tmp_path / "run" / "state.npz"
    assert re.fullmatch(
        r"error: step [12] \(epoch 1\): .* of layer [123] of 3 became NaN or infinite; the last good checkpoint is "
        rf"{re.escape(str(state))}, of epoch 1, after 0 of its images; try a lower --lr\n",
        result.stderr,
    )
    metrics, history = assert_complete(tmp_path / "run")
    assert metrics["outcome"] == "diverged" and (metrics["best_epoch"], len(history)) == (0, 1)


def test_ctrl_c_ends_in_order_with_the_best_weights(place):
    """The learning rate lets the validation loss go up and down: the best epoch need not be the last."""
    arguments = ("--model", "m0", "--device", "cpu", "--data", "good", "--epochs", "1000000", "--lr", "0.5")
    command = [sys.executable, SCRIPT, *arguments, "--out", "interrupted"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=place, env=environment(), **pipes) as process:
        try:
            assert any(line.startswith("epoch   3 ") for line in process.stdout)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, err) == (130, "")
    assert "interrupted after" in out
    metrics, history = assert_complete(place / "interrupted")
    losses = [row["val_loss"] for row in history]
    assert metrics["outcome"] == "interrupted" and len(losses) >= 3
    assert metrics["best_epoch"] == 1 + int(np.argmin(losses))
    assert evaluate(place / "interrupted", place / "good", "val")[1] == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.parametrize("extra", [(), ("--fused",)], ids=BACKENDS)
def test_training_needs_neither_cupy_nor_torch(place, tmp_path, extra):
    without = script_after("sys.modules.update(dict.fromkeys(('cupy', 'torch', 'torchvision')))")
    arguments = ("--data", "good", "--epochs", 1, "--hidden", 16, "--out", tmp_path / "run")
    result = train(*arguments, *extra, cwd=place, python=without)
    assert (result.returncode, result.stderr) == (0, "")
    assert_complete(tmp_path / "run")


DIGITS = ROOT.parent / "shared" / "data" / "mnist-t10k"


@pytest.mark.skipif(not DIGITS.is_dir(), reason=f"the MNIST test images are not in {DIGITS}")
def test_m1_reads_handwritten_digits(tmp_path):
    arguments = ("--data", DIGITS, "--fused", "--epochs", 5, "--out", tmp_path / "run", "--device", "cpu")
    result = train("--model", "m1", *arguments, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    metrics, history = assert_complete(tmp_path / "run")
    assert metrics["test"]["n"] == 2000 and metrics["parameters"] == 440_370
    assert metrics["test"]["accuracy"] >= 0.90 and metrics["test"]["macro_f1"] >= 0.89
    for name in ("accuracy", "macro_f1"):
        noise = [scores[name] for scores in metrics["noise"].values()]
        assert noise[0] > noise[3] > noise[5]
