"""Jobs of several processes: the results of one process, one writer, and an end in order when something goes wrong."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mlp import run_folder, verify
from mlp.distributed import LOST, Job
from mlp.progress import STATE

from . import jobs
from .checks import assert_same_bits
from .jobs import CASES, OF_LAUNCHER, Started
from .test_runs import FILES
from .training import ROOT, SCRIPT, environment, train, write_npy

PROCESSES = (2, 3)
# 21 batches of 49 images, then one of 21, in each of 12 epochs.
OPTIONS = (
    "--model", "m0", "--fused", "--device", "cpu", "--data", "good", "--hidden", "32,16", "--batch-size", 49,
    "--epochs", 12, "--patience", 100, "--checkpoint-every", "0.01s",
)  # fmt: skip


# ---- the same results


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """The folder with what the processes of jobs have computed."""
    folder = tmp_path_factory.mktemp("computed")
    command = [sys.executable, "-W", "error", "-m", "tests.jobs", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


@pytest.fixture(scope="module")
def alone():
    """Case -> what one process computes."""
    return {name: jobs.trained(jobs.make(changes, Job())) for name, changes in CASES.items()}


def of_ranks(folder, name, processes):
    return [dict(np.load(folder / str(processes) / f"{name} {rank}.npz")) for rank in range(processes)]


def assert_equal_results(actual, expected):
    """Equal counts; losses to 1e-6; parameters and running statistics to 1e-6 of their norm. Single ones may be further
    away: where a gradient is about 0, Adam makes a step of its rounding errors. Batch normalisation makes it 0 in all
    that moves the product of a whole batch alike, so there it is 1e-5."""
    for name in ("counts", "confusion"):
        assert np.array_equal(actual[name], expected[name]), name
    assert np.allclose(actual["losses"], expected["losses"], rtol=1e-6, atol=0)
    tolerance = 1e-5 if "arrays/norm_mean0" in expected else 1e-6
    for kind in ("weight", "bias", "norm_weight", "norm_mean", "norm_var"):
        names = [name for name in expected if name.startswith(f"arrays/{kind}")]
        if names:
            a, b = (np.concatenate([part[name].ravel() for name in names]).astype(float) for part in (actual, expected))
            assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), kind


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("name", CASES)
def test_a_job_computes_what_one_process_does(computed, alone, name, processes):
    first, *others = of_ranks(computed, name, processes)
    assert_equal_results(first, alone[name])
    for other in others:
        for part in alone[name]:
            assert_same_bits(other[part], first[part])


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("name", CASES)
def test_a_job_that_goes_on_within_an_epoch_makes_the_same_bits(computed, name, processes):
    first = of_ranks(computed, name, processes)[0]
    assert first["done"] == 16 * 49
    for part in first:
        if part.startswith("again/"):
            assert_same_bits(first[part], first[part.removeprefix("again/")])


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("name", CASES)
def test_one_process_goes_on_with_what_a_job_has_begun(computed, alone, name, processes):
    first = of_ranks(computed, name, processes)[0]
    state, best = (
        {part.removeprefix(of): array for part, array in first.items() if part.startswith(of)}
        for of in ("state/", "best/")
    )
    assert_equal_results(jobs.resumed(jobs.make(CASES[name], Job()), state, best, int(first["done"])), alone[name])


# ---- the command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    write_npy(folder / "good")
    return folder


@pytest.fixture(scope="module")
def undisturbed(place):
    """A job of two processes, started as by torchrun; its folder is place / "undisturbed"."""
    command = [sys.executable, "-m", "torch.distributed.run", *OF_LAUNCHER, 2, SCRIPT, *OPTIONS, "--out", "undisturbed"]
    environ = environment() | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, command)], cwd=place, env=environ, capture_output=True, text=True, timeout=120)


def losses(folder):
    with open(folder / "history.csv", newline="") as file:
        return np.array([[float(row[name]) for name in ("train_loss", "val_loss")] for row in csv.DictReader(file)])


def test_a_job_leaves_the_folder_of_an_ordinary_run(place, undisturbed):
    assert (undisturbed.returncode, undisturbed.stderr) == (0, "")
    assert {path.name for path in (place / "undisturbed").iterdir()} - {run_folder.LOCK} == FILES
    assert sorted(path.name for path in place.iterdir() if path.is_dir()) == ["good", "undisturbed"]
    assert json.loads((place / "undisturbed" / "config.json").read_text())["processes"] == 2
    assert re.findall("^device: .*, 2 processes$", undisturbed.stdout, re.M)
    epochs = [int(number) for number in re.findall("^epoch +([0-9]+) ", undisturbed.stdout, re.M)]
    assert epochs == list(range(1, 13)) and len(losses(place / "undisturbed")) == 12
    assert undisturbed.stdout.count("results in undisturbed") == 1


def test_a_job_is_as_good_as_an_ordinary_run(place, undisturbed):
    assert train(*OPTIONS, "--out", "alone", cwd=place).returncode == 0
    assert np.allclose(losses(place / "undisturbed"), losses(place / "alone"), rtol=1e-6, atol=0)
    job, one = (json.loads((place / name / "metrics.json").read_text()) for name in ("undisturbed", "alone"))
    assert job["test"]["accuracy"] == one["test"]["accuracy"] and job["noise"] == one["noise"]


def test_mistakes_are_told_once_and_leave_nothing(place, undisturbed):
    """All at the same time: most of it is the start of processes."""
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    wrong = {
        "the last batch of 1,050 images has 1 of them, too few for 2 processes; give another --batch-size":
            (*OPTIONS, "--batch-size", 1, "--out", "new"),
        "missing": (*OPTIONS, "--data", "missing", "--out", "new"),
        "--out undisturbed already holds a run": (*OPTIONS, "--out", "undisturbed"),
    }  # fmt: skip
    started = {sentence: Started(2, *arguments, cwd=place) for sentence, arguments in wrong.items()}
    for sentence, job in started.items():
        done = job.finish()
        told = complaints(done)
        assert done.returncode and len(told) == 1 and sentence in told[0] and done.stdout == "", done.stderr
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


# ---- jobs that are ended


def in_training(job, folder):
    """Wait until the job has written its progress."""
    state = folder / STATE
    before = state.stat().st_mtime_ns if state.exists() else 0
    until = time.monotonic() + 60
    while not state.exists() or state.stat().st_mtime_ns == before:
        assert not job.is_over() and time.monotonic() < until, job.finish()
        time.sleep(0.002)


def ended(job):
    """The end of a job that has been told to end, or whose process has been killed: within seconds."""
    done = job.finish(20)
    assert done.returncode
    return done


def complaints(done):
    assert f'File "{SCRIPT}' not in done.stderr, done.stderr  # of the launcher there is a traceback
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def assert_finished(done, folder):
    assert done.returncode == 0, done.stderr
    assert run_folder.outcome(folder) == "finished" and not (folder / STATE).exists()


def test_when_a_process_is_killed_or_all_are_terminated_the_run_goes_on(place, undisturbed):
    job = Started(2, *OPTIONS, "--out", "killed", cwd=place)
    in_training(job, place / "killed")
    os.kill(job.ranks()[1], signal.SIGKILL)
    assert complaints(ended(job)) == [f"error: {LOST}"]

    for processes in (1, 3):
        name = f"killed-{processes}"
        shutil.copytree(place / "killed", place / name)
        resume = ("--resume", name)
        done = train(*resume, cwd=place) if processes == 1 else Started(processes, *resume, cwd=place).finish()
        assert_finished(done, place / name)
        notice = f"not bit for bit as if never interrupted: number of processes: 2 then, {processes} now"
        assert done.stdout.count(notice) == 1
        assert np.allclose(losses(place / name), losses(place / "undisturbed"), rtol=1e-6, atol=0)

    job = Started(2, "--resume", "killed", "--checkpoint-every", "0.01s", cwd=place)
    in_training(job, place / "killed")
    os.kill(job.pid, signal.SIGTERM)
    assert complaints(ended(job)) == ["error: terminated; go on with --resume killed"]
    assert run_folder.outcome(place / "killed") == "" and (place / "killed" / STATE).exists()
    done = Started(2, "--resume", "killed", cwd=place).finish()
    assert_finished(done, place / "killed")
    assert "not bit for bit" not in done.stdout
    assert not verify.differences(place / "undisturbed", place / "killed")


def test_a_torch_model_that_loses_its_writer_says_so_and_goes_on(place):
    job = Started(2, *OPTIONS, "--backend", "torch", "--out", "torch", cwd=place)
    in_training(job, place / "torch")
    os.kill(job.ranks()[0], signal.SIGKILL)
    assert complaints(ended(job)) in ([f"error: process 1: {LOST}"], [])  # the launcher may be quicker
    assert_finished(train("--resume", "torch", cwd=place), place / "torch")


def test_a_divergence_is_told_once_with_its_step_and_layer(place):
    job = Started(2, *OPTIONS, "--optimizer", "sgd", "--lr", "1e30", "--out", "diverged", cwd=place)
    told = complaints(ended(job))
    assert len(told) == 1
    assert re.search(r"^error: step [0-9]+ \(epoch 1\): the \w+ of layer [0-9] of 3 became NaN", told[0]), told
    assert run_folder.outcome(place / "diverged") == "diverged"
