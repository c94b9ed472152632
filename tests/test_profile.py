"""The measuring scripts run, and so do README.md's make targets."""

import csv
import re
import subprocess
import sys

import pytest

from .training import ROOT

README = (ROOT / "README.md").read_text()


def run(*command):
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_profile_does_not_hide_the_standard_library():
    assert not (ROOT / "profile" / "__init__.py").exists()
    assert run("-c", "import cProfile").returncode == 0


def test_bench_step_writes_what_it_prints(tmp_path):
    path = tmp_path / "step.csv"
    result = run(
        "profile/bench_step.py", "--models", "m0", "--batches", "64", "--rounds", "1", "--blocks", "2",
        "--settle", "0.01", "--csv", path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"plain", "fused", "GEMMs alone", "GEMMs alone, shared threads"} <= {row["contender"] for row in rows}
    for row in rows:
        assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["to_gemm"]) > 0 and row["samples"] == "2" and row["layers"] == "784-128-64-47"
        assert row["p50_ms"] in result.stdout


@pytest.mark.parametrize(
    "arguments", [("--models", "nothing"), ("--batches", "0"), ("--batches", "full"), ("--rounds", "0")]
)
def test_bench_step_refuses_in_one_sentence(arguments, tmp_path):
    result = run("profile/bench_step.py", *arguments, "--csv", tmp_path / "step.csv")
    assert result.returncode != 0 and "Traceback" not in result.stderr and "error" in result.stderr
    assert not (tmp_path / "step.csv").exists()


def test_every_make_target_of_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:^|`)make (?:CUPY=\S* )?([a-z-]+)", README, re.MULTILINE))
    assert {"train", "test", "bench"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
