"""python -m mlp verify: what is reproduced, what is found to differ, and what is refused."""

import csv
import json
import shutil

import numpy as np
import pytest

import train as command
from mlp import __main__ as mlp
from mlp import archive, checkpoint, plots, provenance, run, verify

from .training import tree, write_npy

KINDS = {
    "fused": "--model m1 --fused --train-noise 0.2 --dropout 0.1 --epochs 3 --ema 0.9",
    "torch": "--model m3 --epochs 2",
    "stopped": "--model m1 --patience 1 --lr 0.05 --epochs 50",
    "diverged": "--model m1 --optimizer sgd --lr 1e30 --epochs 9",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the images and a finished run of each kind."""
    folder = tmp_path_factory.mktemp("verify")
    write_npy(folder / "images", rows=400)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, options in KINDS.items():
            fixed = "--device cpu --data images --hidden 16,12 --batch-size 50".split()
            status = command.main([*options.split(), *fixed, "--out", name])
            assert status == (name == "diverged")
            outcome = json.loads((folder / name / "metrics.json").read_text())["outcome"]
            assert outcome == {"stopped": "stopped early", "diverged": "diverged"}.get(name, "finished")
    return folder


@pytest.fixture
def here(place, monkeypatch):
    """The same, as the current folder."""
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def copied(here, tmp_path):
    """A copy of the fused run, to be changed."""
    return shutil.copytree(here / "fused", tmp_path / "copy")


@pytest.fixture
def check(capsys, monkeypatch):
    """Runs the command: exit status, the lines of the answer, the lines of what goes beside it."""
    for name in ("training", "confusion", "noise"):  # nobody compares plots, and they take most of the time
        monkeypatch.setattr(plots, name, lambda *args: None)

    def run_command(folder):
        capsys.readouterr()
        status = mlp.main(["verify", str(folder)])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return run_command


@pytest.mark.parametrize("name", KINDS)
def test_a_run_is_reproduced(here, check, name):
    """In one line; whatever else is said goes to stderr, and nothing into the folder."""
    before = tree(here)
    status, answer, beside = check(name)
    assert (status, len(answer)) == (0, 1)
    assert answer[0].startswith(f"{name} is reproduced bit for bit: ")
    assert any(line.startswith("epoch   1 ") for line in beside) and not any("error" in line for line in beside)
    assert tree(here) == before


def change_csv(path, row, column, change):
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    rows[row][column] = change(rows[row][column])
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def change_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def history(folder):
    change_csv(folder / "history.csv", 2, 2, lambda text: repr(np.nextafter(float(text), 9.0).item()))


def missing_epoch(folder):
    path = folder / "history.csv"
    path.write_text("".join(path.read_text().splitlines(True)[:-1]))


def confusion(folder):
    change_csv(folder / "confusion.csv", 1, 1, lambda text: str(int(text) + 1))


def metric(folder):
    change_json(folder / "metrics.json", lambda content: content["test"].update(accuracy=0.999))


def weight(folder):
    """One bit of one weight, and the checksum is right again."""
    path = folder / "checkpoint.npz"
    arrays, config, names, data_name = checkpoint.read(path)
    arrays["weight1"].view(np.uint32)[3, 4] ^= 1
    checkpoint.save(path, arrays, config, names, data_name)


def missing_array(folder):
    path = folder / "checkpoint.npz"
    arrays, config, names, data_name = checkpoint.read(path)
    del arrays["bias0"]
    checkpoint.save(path, arrays, config, names, data_name)


def other_config(folder):
    path = folder / "checkpoint.npz"
    arrays, config, names, data_name = checkpoint.read(path)
    checkpoint.save(path, arrays, config, names, "other images")


def seed(folder):
    change_json(folder / "config.json", lambda content: content.update(seed=1))


TAMPERED = {
    history: ["history.csv: epoch 2: "],
    missing_epoch: ["history.csv: epoch 3: nothing against {"],
    confusion: ["confusion.csv: row 0: "],
    metric: ["metrics.json: test: "],
    weight: ["checkpoint.npz: weight1: other values"],
    missing_array: ["checkpoint.npz: bias0: nothing against an array"],
    other_config: ["checkpoint.npz: data_name: other images against images"],
    seed: ["history.csv: epoch 1: ", "metrics.json: ", "checkpoint.npz: "],
}


@pytest.mark.parametrize("tamper", TAMPERED)
def test_tampering_is_found_and_named(copied, check, tamper):
    tamper(copied)
    before = tree(copied)
    status, answer, _ = check(copied)
    assert status == 1
    found = [line for line in answer if line.startswith("differs: ")]
    for text in TAMPERED[tamper]:
        assert any(line.startswith(f"differs: {text}") for line in found), (text, found)
    assert len(found) == 1 or tamper is seed
    assert answer[-1] == "nothing else that is known differs"
    assert tree(copied) == before


def test_times_do_not_count(copied, check):
    change_csv(copied / "history.csv", 1, 6, lambda text: "123.0")
    change_json(copied / "metrics.json", lambda content: content.update(seconds=5, seconds_per_epoch=None))
    assert check(copied)[0] == 0


def test_what_may_be_the_reason_is_named(copied, check):
    def other(content):
        content["versions"]["numpy"] = "1.0"
        content.update(revision="0123456789abcdef", device_name="another processor", processes=2)

    change_json(copied / "config.json", other)
    assert check(copied)[0] == 0  # nothing differs, so that no reason is needed
    weight(copied)
    status, answer, _ = check(copied)
    assert status == 1 and answer[0] == "differs: checkpoint.npz: weight1: other values"
    for text in ("device: another processor then", "processes: 2 then, 1 now", "numpy 1.0 then",
                 f"numpy {np.__version__} now", "revision: 0123456789abcdef then"):  # fmt: skip
        assert text in answer[-1]
    assert answer[-1].startswith("this may be because of ")


@pytest.mark.parametrize("one, other", [
    ({}, {}), ({"revision": "a"}, {"revision": "a"}), ({"command": ["x"]}, {"command": ["y"]}),
])  # fmt: skip
def test_what_decides_nothing_is_no_reason(one, other):
    assert provenance.differences(one, other) == []


def test_what_is_not_known_of_an_old_run_is_called_so():
    found = provenance.differences({}, {"revision": "a", "versions": {"python": "3"}})
    assert found == ["versions: unknown then, python 3 now", "revision: unknown then, a now"]


def test_the_threads_of_torch_are_those_of_the_run(here, check, tmp_path):
    """Its matrix products may depend on them."""
    import torch

    before, seen, learner = torch.get_num_threads(), [], run.make_learner
    folder = shutil.copytree(here / "torch", tmp_path / "copy")
    change_json(folder / "config.json", lambda content: content.update(threads=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_learner", lambda *args: seen.append(torch.get_num_threads()) or learner(*args))
        assert check(folder)[0] == 0
    assert seen == [3] and torch.get_num_threads() == before


# ---- refused


def unfinished(folder):
    (folder / "metrics.json").unlink()


def interrupted(folder):
    change_json(folder / "metrics.json", lambda content: content.update(outcome="interrupted"))


def no_folder(folder):
    shutil.rmtree(folder)


def empty(folder):
    no_folder(folder)
    folder.mkdir()


def foreign(folder):
    empty(folder)
    (folder / "notes.txt").write_text("mine")


def foreign_config(folder):
    (folder / "config.json").write_text('{"name": "something else"}')


def a_file(folder):
    no_folder(folder)
    folder.write_text("text")


def damaged_config(folder):
    (folder / "config.json").write_bytes(b"\xff\x00{")


def damaged_metrics(folder):
    (folder / "metrics.json").write_text('{"outcome": ')


def metrics_of_another_kind(folder):
    (folder / "metrics.json").write_text('["outcome"]')


def damaged_history(folder):
    (folder / "history.csv").write_bytes(b"\xff\xfe\x00\x01")


def history_of_another_kind(folder):
    (folder / "history.csv").write_text("a,b\n1,2\n")


def no_confusion(folder):
    (folder / "confusion.csv").unlink()


def short_confusion(folder):
    (folder / "confusion.csv").write_text("\n\n")


def long_field(folder):
    (folder / "confusion.csv").write_text("x" * 200_000)


def deep_metrics(folder):
    (folder / "metrics.json").write_text("[" * 100_000)


def damaged_checkpoint(folder):
    data = bytearray((folder / "checkpoint.npz").read_bytes())
    data[len(data) // 2] ^= 4
    (folder / "checkpoint.npz").write_bytes(data)


def state_for_a_checkpoint(folder):
    archive.write(folder / "checkpoint.npz", "state", {"config": {}}, {})


def no_checkpoint(folder):
    (folder / "checkpoint.npz").unlink()


def other_data(folder):
    change_json(folder / "config.json", lambda content: content.update(data_sha256="0" * 64))


def no_data(folder):
    change_json(folder / "config.json", lambda content: content.update(data="elsewhere"))


def impossible_config(folder):
    change_json(folder / "config.json", lambda content: content.update(hidden=[0]))


@pytest.mark.parametrize("spoil", [
    unfinished, interrupted, no_folder, empty, foreign, foreign_config, a_file, damaged_config, damaged_metrics,
    metrics_of_another_kind, damaged_history, history_of_another_kind, no_confusion, short_confusion, long_field,
    deep_metrics, damaged_checkpoint, state_for_a_checkpoint, no_checkpoint, other_data, no_data, impossible_config,
])  # fmt: skip
def test_what_cannot_be_verified_is_refused_in_one_sentence(copied, check, monkeypatch, spoil):
    """Before anything is trained, with the exit status of wrong usage."""
    spoil(copied)
    before = tree(copied) if copied.is_dir() else None
    monkeypatch.setattr(run, "fit", None)
    status, answer, errors = check(copied)
    assert (status, answer, len(errors)) == (2, [], 1)
    assert errors[0].startswith("error: ") and errors[0][-1] not in ".!"
    assert str(copied) in errors[0] or spoil in (other_data, no_data)
    assert before is None or tree(copied) == before


def test_changed_images_are_refused(place, tmp_path, check, monkeypatch):
    """The run's own folder is as it was; its data are not."""
    shutil.copytree(place / "images", tmp_path / "images")
    shutil.copytree(place / "fused", tmp_path / "fused")
    images = np.load(tmp_path / "images" / "X_images.npy")
    images[0, 0, 0] ^= 1
    np.save(tmp_path / "images" / "X_images.npy", images)
    monkeypatch.chdir(tmp_path)
    status, answer, errors = check("fused")
    assert (status, answer, len(errors)) == (2, [], 1)
    assert "was trained on images" in errors[0] and "put the data back" in errors[0]


def test_differences_tell_the_first_entry_and_how_many_more(here, copied):
    assert verify.differences(here / "fused", copied) == []
    for row in (1, 2, 3):
        change_csv(copied / "history.csv", row, 4, lambda text: "nan")
    (line,) = verify.differences(here / "fused", copied)
    assert line.startswith("history.csv: epoch 1: ") and line.endswith(", and 2 more") and "nan" in line
