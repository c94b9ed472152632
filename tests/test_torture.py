"""kill -9 at random moments, in small; `make torture` does it fifty times."""

import random

import pytest

from . import torture
from .training import write_npy

RUN = ("--data", "good", "--hidden", "96,48", "--batch-size", 32, "--device", "cpu", "--checkpoint-every", "0.02s")
RUNS = {
    "scratch": ("--model", "m1", "--fused", "--epochs", 25),
    "normalised": ("--model", "robust", "--fused", "--dropout", 0.2, "--ema", 0.9, "--epochs", 8),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_killed_ends_as_one_that_is_not(tmp_path, name):
    write_npy(tmp_path / "good", rows=900)
    arguments, tally, rng = [*RUNS[name], *RUN], torture.Tally(), random.Random(7)
    seconds = torture.run_to_the_end([*arguments, "--out", tmp_path / "undisturbed"], tmp_path)
    folder = torture.torment(arguments, tmp_path, "killed", 3, rng, tally, seconds)
    torture.compare(folder, tmp_path / "undisturbed", tally)
    assert tally.losses == [] and tally.finished == 1 and tally.kills == sum(tally.by_place.values())
    assert tally.kills >= 1 and tally.resumes >= 1
