"""The command line: help, the list of presets, and what each mistake is answered with."""

import argparse
import shlex
import sys
import time

import numpy as np
import pytest

import train as command
from kernels import BackendError, cuda
from mlp import configs

from .training import ROOT, SCRIPT, script_after, train, tree, write_npy


def has_gpu() -> bool:
    try:
        cuda.check()
    except BackendError:
        return False
    return True


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with good and bad data; the tests leave it as it is."""
    folder = tmp_path_factory.mktemp("cli")
    write_npy(folder / "good", rows=60)
    for name, images in {
        "cut": np.zeros((60, 28, 27), np.uint8),
        "floats": np.zeros((60, 28, 28), np.float32),
        "short": np.zeros((59, 28, 28), np.uint8),
    }.items():
        np.save(write_npy(folder / name, rows=60) / "X_images.npy", images)
    np.save(write_npy(folder / "lonely", rows=60) / "y_images.npy", np.arange(60))  # an image for each class
    (folder / "empty").mkdir()
    (folder / "corrupt").mkdir()
    for kind in ("images-idx3", "labels-idx1"):
        (folder / "corrupt" / f"toy-{kind}-ubyte.gz").write_bytes(b"\x1f\x8b\x08\x00 not gzip at all")
    (folder / "a-file").write_text("in the way")
    (folder / "done").mkdir()
    (folder / "done" / "config.json").write_text("{}")
    (folder / "done" / "checkpoint.npz").write_bytes(b"precious")
    return folder


GOOD = ("--data", "good")
MISTAKES = [
    (("--model", "m9"), "--model m9"),
    (("--data", "nowhere"), "nowhere"),
    (("--data", "x" * 300), "x" * 300),
    (("--data", "a-file"), "a-file"),
    (("--data", "empty"), "empty"),
    (("--data", "corrupt"), "toy-"),
    (("--data", "cut"), "28, 27"),
    (("--data", "floats"), "float32"),
    (("--data", "short"), "59"),
    (("--data", "lonely"), "class 0"),
    (("--data", "glyphs:5"), "5"),
    (("--data", "glyphs:many"), "glyphs:many"),
    (("--batch-size", "0", *GOOD), "--batch-size 0"),
    (("--batch-size", "x"), "--batch-size x"),
    (("--lr", "nan"), "--lr nan"),
    (("--lr", "abc"), "--lr"),
    (("--lr", "-1"), "--lr -1"),
    (("--epochs", "-1"), "--epochs -1"),
    (("--epochs", "2.5"), "--epochs"),
    (("--hidden", "400,x"), "--hidden 400,x"),
    (("--hidden", ""), "--hidden"),
    (("--hidden", "0"), "--hidden 0"),
    (("--hidden",), "--hidden"),
    (("--seed", "-1"), "--seed -1"),
    (("--activation", "sine"), "--activation sine"),
    (("--schedule", "staircase"), "--schedule staircase"),
    (("--device", "tpu"), "--device tpu"),
    (("--momentum", "0.9"), "--momentum"),
    (("--model", "m0", "--decoupled"), "--decoupled"),
    (("--turbo",), "--turbo"),
    (("--batch", "4"), "--batch"),  # no abbreviations
    (("--checkpoint-every", "often"), "--checkpoint-every often"),
    (("--checkpoint-every", "0"), "--checkpoint-every 0"),
    (("--resume", "nowhere"), "nowhere holds no run"),
    (("--resume", "done"), "done/config.json"),
    (("--resume", "done", "--lr", "1"), "--lr cannot be given with --resume"),
    (("--resume", "done", "--out", "x"), "--out cannot be given with --resume"),
    (("m1",), "m1"),
    (("--config", "nowhere.json"), "--config nowhere.json"),
    (("--config", "a-file"), "--config a-file"),
    (("--search", "many"), "--search"),
    (("--jobs", "2"), "--search"),
    (("--search", "2", "--checkpoint-every", "5s"), "--checkpoint-every belongs to a single training"),
    (("--search", "2", *GOOD, "--study", "a-file"), "--study a-file"),
    ((*GOOD, "--out", "a-file/below"), "--out a-file/below"),
    ((*GOOD, "--out", "a-file"), "--out a-file"),
    ((*GOOD, "--out", "x" * 300), "--out xxx"),
    ((*GOOD, "--out", "done"), "--out done"),
]


def assert_refused(result, place, before, word):
    assert result.returncode == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and word in lines[0], result.stderr
    assert "Traceback" not in result.stderr and not lines[0].endswith(".")
    assert tree(place) == before


@pytest.mark.parametrize("arguments, word", MISTAKES, ids=[" ".join(words)[:40] for words, _ in MISTAKES])
def test_a_mistake_is_one_line_and_changes_nothing(place, arguments, word):
    before = tree(place)
    data = () if {"--data", "--resume"} & set(arguments) else ("--data", "nowhere")  # one that passes must not train
    assert_refused(train(*data, *arguments, cwd=place), place, before, word)


@pytest.mark.skipif(has_gpu(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_refused(place):
    before = tree(place)
    result = train("--device", "cuda", *GOOD, cwd=place)
    assert_refused(result, place, before, "--device cuda is not possible")


def test_fused_without_the_library_says_what_to_run(place):
    missing = script_after("from kernels import host; host.LIBRARY = host.LIBRARY.parent / 'no.so'")
    before = tree(place)
    result = train("--fused", "--device", "cpu", *GOOD, cwd=place, python=missing)
    assert_refused(result, place, before, "--fused is not possible")
    assert "make build" in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space, which only Linux does")
def test_a_model_too_large_for_the_memory_leaves_no_folder(place):
    small = script_after("import resource; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))")
    before = tree(place)
    arguments = ("--device", "cpu", "--hidden", "65536,65536", "--out", "new", *GOOD)
    assert_refused(train(*arguments, cwd=place, python=small), place, before, "do not fit into the memory")


def test_ctrl_c_outside_of_training_ends_without_a_traceback(place):
    pressed = script_after(
        "import mlp.data, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "mlp.data.load = lambda *_: signal.raise_signal(signal.SIGINT)"
    )
    before = tree(place)
    result = train("--device", "cpu", *GOOD, cwd=place, python=pressed)
    assert result.returncode == 130 and result.stdout == ""
    assert result.stderr.splitlines() == ["error: interrupted"]
    assert tree(place) == before


def test_list_prints_every_preset(place):
    result = train("--list", cwd=place)
    assert (result.returncode, result.stderr) == (0, "")
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(configs.PRESETS)
    assert all(configs.describe(config) in result.stdout for config in configs.PRESETS.values())


def test_help_names_every_option_and_every_choice(place):
    result = train("--help", cwd=place)
    assert (result.returncode, result.stderr) == (0, "")
    text = " ".join(result.stdout.split())
    for action in command.build_parser()._actions:
        assert all(option in text for option in action.option_strings)
        assert action.help and action.help != argparse.SUPPRESS
    for choice in configs.ACTIVATIONS + configs.OPTIMIZERS + configs.SCHEDULES + configs.DEVICES:
        assert choice in text


@pytest.mark.parametrize("option", ["--help", "--list"])
def test_help_is_immediate(place, option):
    """At most half a second, in the best of three; and nothing heavy is imported."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        train(option, cwd=place)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) <= 0.5
    log = train(option, cwd=place, python=("-X", "importtime", SCRIPT)).stderr
    imported = {line.rpartition("|")[2].strip() for line in log.splitlines()}
    assert "mlp.configs" in imported
    heavy = {"numpy", "torch", "cupy", "scipy", "matplotlib", "tqdm", "optuna", "kernels"}
    assert not heavy & {name.partition(".")[0] for name in imported}


def readme_commands() -> list[str]:
    """The lines of README.md that begin with `python train.py`, with their continuations."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip().startswith("python train.py")]


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="there is no README.md")
def test_the_commands_of_the_readme_are_accepted(capsys):
    commands = readme_commands()
    assert commands
    for line in commands:
        words = shlex.split(line, comments=True)[2:]
        try:
            args = vars(command.build_parser().parse_args(words))
        except SystemExit as end:  # --help
            assert words == ["--help"] and not end.code
            continue
        given = {name: value for name, value in args.items() if value is not None}
        for other in ("list", "out", "model", "nvtx", "tune", "explain", "config", "search", "study", "jobs",
                      "checkpoint_every", "resume"):  # fmt: skip
            given.pop(other, None)
        configs.preset(args["model"] or "m1", **given)
