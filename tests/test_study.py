"""The study: every preset trains, what was run is not run again, and the report says what the runs say."""

import json
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest

from mlp import InputError, configs, results, study
from mlp.__main__ import main

from .test_runs import assert_complete
from .training import train, write_npy

SMALL = dict(hidden=(24, 16), epochs=2, warmup=0, batch_size=128)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    write_npy(folder / "one", rows=600)
    write_npy(folder / "two", rows=500, classes=4)
    return folder


@pytest.mark.parametrize("name", configs.PRESETS)
def test_every_preset_trains_and_leaves_what_is_documented(place, name, capsys, monkeypatch):
    import train as command

    monkeypatch.chdir(place)
    folder = place / f"preset-{name}"
    arguments = ("--data", "one", "--device", "cpu", "--epochs", "2", "--warmup", "0", "--out", folder)
    assert command.main(["--model", name, *map(str, arguments)]) == 0
    metrics, history = assert_complete(folder)
    assert metrics["model"] == name and metrics["backend"] == configs.PRESETS[name].backend
    assert len(history) == 2 and np.isfinite(history[-1]["val_loss"])


class Here:
    """In the place of a process of its own, which takes seconds to import everything."""

    def __init__(self, target, args):
        self.target, self.args, self.exitcode = target, args, None

    def start(self):
        try:
            self.target(*self.args)
        except SystemExit as end:
            self.exitcode = end.code or 0

    def join(self):
        assert self.exitcode is not None


@pytest.fixture(scope="module")
def studied(place):
    """A study of small models, run through the command line; (its folder, its first run's time of change)."""
    patch = pytest.MonkeyPatch()
    patch.chdir(place)
    rows = {name: (model, {**SMALL, **changes}) for name, (model, changes) in study.MODELS.items()}
    names = ("m1 fused", "m3", "m3 from scratch, fused", "robust fused")
    patch.setattr(study, "MODELS", {name: rows[name] for name in names})
    patch.setattr(study, "REFINEMENTS", {"none": dict(SMALL), "average of parameters 0.9": SMALL | dict(ema=0.9)})
    patch.setattr(study.multiprocessing, "get_context", lambda kind: SimpleNamespace(Process=Here))
    arguments = ["study", "--data", "one", "--also", "two", "--seeds", "2", "--runs", "runs", "--out", "report"]
    try:
        assert main(arguments) == 0
        stamps = {path: path.stat().st_mtime_ns for path in place.glob("runs/*/metrics.json")}
        began = time.perf_counter()
        assert main(arguments) == 0  # nothing is left to run
        assert time.perf_counter() - began < 30
        assert {path: path.stat().st_mtime_ns for path in place.glob("runs/*/metrics.json")} == stamps
        yield place / "report"
    finally:
        patch.undo()


def test_the_report_has_every_row_of_every_data_set(place, studied):
    text = (studied / "report.md").read_text()
    for section in ("## one", "## two", "## Robust against plain", "## What each refinement is worth"):
        assert text.count(section) == 1
    one, two = text.split("## one")[1].split("## ")[0], text.split("## two")[1].split("## ")[0]
    assert len(re.findall(r"^\| m3[ ,(]", one, re.M)) == 6 and len(re.findall(r"^\| m3[ ,(]", two, re.M)) == 3
    assert "(n=2)" in one and "robust" in one and "robust" in two
    assert re.search(r"^\| average of parameters 0\.9 .*\| +(yes|no) \|$", text, re.M)
    for picture in re.findall(r"\]\((.*?\.png)\)", text):
        assert (studied / picture).stat().st_size > 5000
    assert len(list(studied.glob("*.png"))) == 5


def test_the_numbers_are_those_of_the_runs(place, studied):
    numbers = json.loads((studied / "results.json").read_text())
    assert len(numbers) == 2 * (4 + 2 + 2 + 2)
    for number in numbers:
        assert number["outcome"] == "finished" and number["epochs"] == 2
    (ours,) = [n for n in numbers if (n["row"], n["data"], n["seed"]) == ("m3 from scratch, fused", "one", 1)]
    metrics = json.loads((place / "runs" / "m3-from-scratch-fused-one-seed1" / "metrics.json").read_text())
    assert ours["test"] == metrics["test"] and ours["noise"] == metrics["noise"]


def test_the_gains_are_paired_by_seed(place, studied):
    text = (studied / "report.md").read_text().split("## Robust against plain")[1]
    runs = {
        (name, seed): json.loads((place / "runs" / f"{name}-two-seed{seed}" / "metrics.json").read_text())
        for name in ("m3", "robust-fused")
        for seed in (0, 1)
    }
    gains = [
        100 * (runs["robust-fused", s]["noise"]["0.3"]["accuracy"] - runs["m3", s]["noise"]["0.3"]["accuracy"])
        for s in (0, 1)
    ]
    expected = f"{np.mean(gains):+.2f} ± {np.std(gains, ddof=1):.2f}"
    assert expected in re.search(r"^\| two .*$", text, re.M)[0]
    assert results.spread(gains)[0] == pytest.approx(np.mean(gains))


def _job(folder, **changes):
    return study.Job("m1", configs.preset("m1", hidden=(8,), epochs=1, data="one", device="cpu", **changes), folder)


def test_an_interrupted_run_is_set_aside_and_run_again(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    job = _job(tmp_path / "run")
    job.folder.mkdir()
    (job.folder / "config.json").write_text("{}")  # it never came to its metrics
    study.execute([job])
    assert (job.folder / "metrics.json").exists() and (tmp_path / "run.unfinished1" / "config.json").read_text() == "{}"


def test_a_folder_of_another_configuration_is_refused_and_left(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    arguments = ("--model", "m1", "--hidden", 8, "--epochs", 1, "--data", "one", "--out", tmp_path / "run")
    assert train(*arguments, cwd=place).returncode == 0
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    with pytest.raises(InputError, match="holds a run of another configuration; move it away or give another --runs"):
        study.execute([_job(tmp_path / "run", lr=0.5)])
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before


def test_a_run_that_fails_ends_the_study_with_its_reason(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    with pytest.raises(InputError, match=r"m1 ended with status 2 \(.*nowhere.*\); see .*run\.log"):
        study.execute([study.Job("m1", configs.preset("m1", data="nowhere"), tmp_path / "run")])


def test_no_seeds_is_a_mistake_of_one_line(capsys, tmp_path):
    assert main(["study", "--seeds", "0", "--out", str(tmp_path / "report")]) == 2
    assert capsys.readouterr().err.startswith("error: --seeds 0 is not possible") and not any(tmp_path.iterdir())
