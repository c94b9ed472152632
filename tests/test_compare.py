"""python -m mlp compare: runs in a table, seeds together, data sets apart, published results beside."""

import csv
import json
import shutil
from dataclasses import asdict
from statistics import stdev

import matplotlib.image
import pytest

from mlp import InputError, compare, configs, results
from mlp.__main__ import main

from .training import train, write_npy

SIGMAS = ("0.0", "0.1", "0.2", "0.3", "0.4", "0.5")


def write_run(folder, model="m1", accuracy=0.9, data="toy", sha256="a" * 64, noise=None, settings=None, **metrics):
    """A run's folder as train.py writes it, with made-up results; returns the folder."""
    folder.mkdir(parents=True)
    config = asdict(configs.preset(model, **(settings or {})))
    config |= {
        "plan": {}, "data_name": data, "data_sha256": sha256, "class_names": list("0123456789"),
        "device_name": "a CPU", "command": [], "versions": {"python": "3", "numpy": "2"},
    }  # fmt: skip
    scores = {"accuracy": accuracy, "macro_f1": accuracy - 0.01, "cross_entropy": 1 - accuracy, "n": 100}
    metrics = {
        "model": model, "fused": config["fused"], "data": data, "device": "a CPU", "outcome": "finished", "epochs": 3,
        "best_epoch": 2, "parameters": 1234567, "seconds_per_epoch": 1.5, "seconds": 9.0,
        "val": scores | {"accuracy": accuracy + 0.02}, "test": scores,
        "noise": noise or {s: {"accuracy": accuracy - float(s), "macro_f1": accuracy / 2 - float(s)} for s in SIGMAS},
    } | metrics  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    with open(folder / "history.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "val_loss", "val_accuracy"])
        writer.writerows([epoch, 1 / epoch, 1 - 1 / (epoch + 1)] for epoch in (1, 2, 3))
    return folder


def cells(text):
    """The tables of a Markdown text, each a list of rows of stripped cells, without the rule."""
    tables = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            tables[-1].append([cell.strip() for cell in line.strip("|").split(" | ")])
        elif tables[-1]:
            tables.append([])
    return [[rows[0], *rows[2:]] for rows in tables if rows]


def test_a_run_is_a_row(tmp_path):
    runs = compare.read([write_run(tmp_path / "a")])
    table, accuracy, f1 = cells(compare.tables(runs))
    assert dict(zip(*table)) == {
        "model": "m1", "kernels": "plain", "backend": "scratch", "device": "a CPU", "parameters": "1,234,567",
        "epochs": "3", "s/epoch": "1.5", "val accuracy %": "92.00", "test accuracy %": "90.00",
        "test macro F1 %": "89.00", "test cross-entropy": "0.1000",
    }  # fmt: skip
    header, row = ["model", "kernels", "backend", *SIGMAS], "90.00 80.00 70.00 60.00 50.00 40.00".split()
    assert accuracy == [header, ["m1", "plain", "scratch", *row]]
    assert f1[1] == ["m1", "plain", "scratch", *"45.00 35.00 25.00 15.00 5.00 -5.00".split()]


def test_seeds_of_one_experiment_are_one_row(tmp_path):
    values = (0.90, 0.92, 0.97)
    folders = [write_run(tmp_path / str(i), accuracy=v, settings={"seed": i}) for i, v in enumerate(values)]
    folders.append(write_run(tmp_path / "other", settings={"lr": 0.5}))
    folders.append(write_run(tmp_path / "fused", settings={"fused": True}))
    table, noise, _ = cells(compare.tables(compare.read(folders)))
    rows = [dict(zip(table[0], row)) for row in table[1:]]
    assert [row["model"] for row in rows] == ["m1, lr 0.001 (n=3)", "m1, lr 0.5", "m1, lr 0.001"]
    assert [row["kernels"] for row in rows] == ["plain", "plain", "fused"]
    assert rows[0]["test accuracy %"] == f"{100 * sum(values) / 3:.2f} ± {100 * stdev(values):.2f}"
    assert rows[0]["s/epoch"] == "1.5" and rows[1]["test accuracy %"] == "90.00"
    assert noise[1][3] == rows[0]["test accuracy %"]


def test_a_seed_that_is_there_twice_is_told(tmp_path):
    folders = [write_run(tmp_path / str(i), settings={"seed": i // 2}) for i in range(3)]
    assert "m1 (n=3, 2 seeds)" in compare.tables(compare.read(folders))
    assert "(n=" not in compare.tables(compare.read([folders[0], tmp_path / "." / "0", str(folders[0])]))


def test_data_sets_have_sections_of_their_own(tmp_path):
    folders = [
        write_run(tmp_path / "a", data="toy"), write_run(tmp_path / "b", data="glyphs-1000", sha256="b" * 64),
        write_run(tmp_path / "c", "m0", data="toy"), write_run(tmp_path / "d", data="toy", sha256="c" * 64),
    ]  # fmt: skip
    runs = compare.read(folders)
    text = compare.tables(runs)
    titles = [line for line in text.splitlines() if line.startswith("#")]
    assert titles == ["## toy (aaaaaaaa)", "## glyphs-1000", "## toy (cccccccc)"]
    assert [[row[0] for row in table[1:]] for table in cells(text)[::3]] == [["m0", "m1"], ["m1"], ["m1"]]
    (tmp_path / "out").mkdir()
    written = compare.plot(runs, tmp_path / "out")
    assert len({path.name for path in written}) == 6 and all(path.is_file() for path in written)
    assert (tmp_path / "out" / "noise-toy-aaaaaaaa-.png") in written


def test_published_results_stand_beside_theirs(tmp_path):
    folders = [write_run(tmp_path / model, model, data="emnist-bymerge") for model in ("m1", "m0", "m1a")]
    (section,) = results.sections(compare.read(folders))
    assert [row.name for row in section.rows] == ["m0", "m0, published", "m1", "m1, published", "m1a", "m1a, published"]
    table, accuracy, f1 = cells(compare.tables(compare.read(folders)))
    published = dict(zip(table[0], table[4]))
    assert published["test accuracy %"] == "88.58" and published["test macro F1 %"] == "85.73"
    assert published["test cross-entropy"] == "0.3368" and published["parameters"] == "444,847"
    assert published["s/epoch"] == "18.1" and published["epochs"] == published["kernels"] == "–"
    assert dict(zip(table[0], table[6]))["val accuracy %"] == "81.41"
    assert ["m1, published", "–", "cupy", *"88.58 77.44 39.95 17.44 8.98 5.49".split()] in accuracy
    assert [row[0] for row in f1] == ["model", "m0", "m1", "m1a"]  # which was not published
    assert "published" not in compare.tables(compare.read([write_run(tmp_path / "toy")]))


def test_the_published_results_are_fractions_of_known_models():
    for model, result in results.PUBLISHED["models"].items():
        judged = [result.get("val", {}), result.get("test", {}), *result.get("noise", {}).values()]
        scores = [value for part in judged for name, value in part.items() if name in compare.SCORES]
        assert scores and all(0 < score < 1 for score in scores), model
        if "noise" in result:
            assert tuple(result["noise"]) == SIGMAS and result["noise"]["0.0"]["accuracy"] == result["test"]["accuracy"]


def test_runs_from_before_noise_had_a_macro_f1(tmp_path):
    old = write_run(tmp_path / "old", noise={"0.0": 0.9, "0.5": 0.4})
    tables = cells(compare.tables(compare.read([old])))
    header, row = ["model", "kernels", "backend", "0.0", "0.5"], ["m1", "plain", "scratch", "90.00", "40.00"]
    assert len(tables) == 2 and tables[1] == [header, row]


def test_a_run_that_was_stopped_in_its_first_epoch(tmp_path):
    folder = write_run(tmp_path / "a", seconds_per_epoch=None, epochs=0, best_epoch=0)
    (folder / "history.csv").write_text("epoch,val_loss,val_accuracy\n")
    assert main(["compare", str(folder), "--out", str(tmp_path / "out")]) == 0
    table = cells((tmp_path / "out" / "compare.md").read_text(encoding="utf-8"))[0]
    assert dict(zip(*table))["s/epoch"] == "–"


def test_the_table_is_aligned_markdown():
    text = compare.markdown(["a", "long name"], [["é ± 1", "2"], ["b", "33"]], left=1)
    assert text.splitlines() == [
        "| a     | long name |", "| ----- | --------: |", "| é ± 1 |         2 |", "| b     |        33 |"
    ]  # fmt: skip


def break_run(folder, how):
    if how in ("config.json", "metrics.json", "history.csv"):
        (folder / how).unlink()
    elif how == "gone":
        shutil.rmtree(folder)
    elif how == "half":
        text = (folder / "metrics.json").read_text()
        (folder / "metrics.json").write_text(text[: len(text) // 2])
    elif how == "list":
        (folder / "metrics.json").write_text("[1, 2]")
    elif how == "no noise":
        write = json.loads((folder / "metrics.json").read_text())
        del write["noise"]
        (folder / "metrics.json").write_text(json.dumps(write))
    elif how == "other":
        (folder / "config.json").write_text('{"model": "m1"}')
    elif how == "words":
        (folder / "history.csv").write_text("epoch,val_loss,val_accuracy\none,two,three\n")
    elif how == "binary":
        (folder / "history.csv").write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize("how", [
    "config.json", "metrics.json", "history.csv", "gone", "half", "list", "no noise", "other", "words", "binary",
])  # fmt: skip
def test_a_folder_that_is_no_finished_run_is_one_sentence(tmp_path, capsys, how):
    good, bad = write_run(tmp_path / "good"), write_run(tmp_path / "bad")
    break_run(bad, how)
    assert main(["compare", str(good), str(bad), "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {bad} ") and err.count("\n") == 1 and "; " in err
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError):
        compare.read([good, bad])


def test_runs_of_train_py_are_compared(tmp_path, monkeypatch, capsys):
    write_npy(tmp_path / "good", rows=300)
    options = ("--device", "cpu", "--data", "good", "--hidden", "16", "--batch-size", "64", "--epochs", "3")
    for name, extra in (("plain", ()), ("fused", ("--fused", "--seed", "1"))):
        assert train(*options, *extra, "--out", name, cwd=tmp_path).returncode == 0
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "plain", "fused"]) == 0
    out, err = capsys.readouterr()
    folder = tmp_path / "runs" / "compare"
    text = (folder / "compare.md").read_text(encoding="utf-8")
    assert err == "" and text in out and {path.name for path in folder.iterdir()} == {
        "compare.md", "noise.png", "curves.png"
    }  # fmt: skip
    table, accuracy, f1 = cells(text)
    assert [row[:3] for row in table[1:]] == [["m1", "plain", "scratch"], ["m1", "fused", "scratch"]]
    measured = json.loads((tmp_path / "fused" / "metrics.json").read_text())
    assert dict(zip(table[0], table[2]))["test accuracy %"] == f"{100 * measured['test']['accuracy']:.2f}"
    assert f1[2][3:] == [f"{100 * scores['macro_f1']:.2f}" for scores in measured["noise"].values()]
    for name in ("noise", "curves"):
        picture = matplotlib.image.imread(folder / f"{name}.png")
        assert min(picture.shape[:2]) >= 300 and picture[..., :3].std() > 0.02
