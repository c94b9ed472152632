"""python -m mlp: help, mistakes, and the commands that README.md shows."""

import shlex
import subprocess
import sys

import pytest

from mlp import InputError
from mlp.__main__ import build_parser, main

from .training import ROOT


@pytest.mark.parametrize("words", [["--help"], ["explore", "--help"], ["predict", "--help"], ["compare", "--help"]])
def test_help_imports_nothing_heavy(words):
    command = [sys.executable, "-X", "importtime", "-m", "mlp", *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "usage: python -m mlp" in result.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "mlp" in imported and not imported & {"numpy", "scipy", "matplotlib", "PIL", "torch", "cupy", "kernels"}


@pytest.mark.parametrize("words", [[], ["train"], ["explore", "x"], ["compare"], ["predict"], ["explore", "--dat=x"]])
def test_a_mistake_is_one_sentence(words, capsys):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_the_commands_of_the_readme_are_accepted():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("python -m mlp ")]
    assert {line.split()[3] for line in lines} >= {"explore", "predict", "compare"}
    for line in lines:
        try:
            build_parser().parse_args(shlex.split(line, comments=True)[3:])
        except InputError as error:
            pytest.fail(f"{line}: {error}")
