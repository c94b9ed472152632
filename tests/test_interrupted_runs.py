"""Runs that the user or the system cuts short: what is left, what is said, and that --resume ends them as if not."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mlp import archive, run_folder, verify
from mlp.progress import STATE

from .torture import start
from .training import script_after, train, tree, write_npy

LONG = ("--model", "m1", "--fused", "--data", "good", "--hidden", "48,24", "--batch-size", 64, "--epochs", 40,
        "--device", "cpu", "--patience", 1000)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data and an undisturbed run."""
    folder = tmp_path_factory.mktemp("interrupted")
    write_npy(folder / "good", rows=600)
    result = train(*LONG, "--out", "undisturbed", cwd=folder)
    assert (result.returncode, result.stderr) == (0, "")
    return folder


def interrupted(place, name, number, after="epoch   3 "):
    """Begin the run, send it a signal after a line of its output, and wait for its end."""
    with start([*LONG, "--out", name], place) as process:
        assert any(line.startswith(after) for line in process.stdout)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def resumed(place, name, *more):
    result = train("--resume", name, *more, cwd=place)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    assert verify.differences(place / "undisturbed", place / name) == []
    assert {path.name for path in (place / name).iterdir()} == {path.name for path in (place / "undisturbed").iterdir()}
    return result.stdout


def test_sigterm_keeps_the_progress_and_exits_143(place):
    status, out, err = interrupted(place, "terminated", signal.SIGTERM)
    assert (status, err) == (143, "error: terminated; go on with --resume terminated\n")
    about, _ = archive.read(place / "terminated" / STATE)
    assert about["epoch"] >= 4 and not (place / "terminated" / "metrics.json").exists()
    assert f"resumed in epoch {about['epoch']}, after {about['done']:,} of its images" in resumed(place, "terminated")


def test_ctrl_c_judges_what_there_is_and_can_be_resumed(place):
    status, out, err = interrupted(place, "ctrl-c", signal.SIGINT)
    assert (status, err) == (130, "") and "interrupted after" in out
    assert run_folder.outcome(place / "ctrl-c") == "interrupted" and (place / "ctrl-c" / "training.png").exists()
    resumed(place, "ctrl-c")
    _, content = run_folder.read_config(place / "ctrl-c")
    (once,) = content["resumed"]
    assert once["epoch"] >= 4 and "--resume" in once["command"] and once["processes"] == 1


def test_sigterm_before_training_ends_at_once(place):
    with start([*LONG, "--out", "early"], place) as process:
        time.sleep(0.1)
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGTERM, 143)  # a shell shows 143 for both


def test_a_run_that_is_over_has_nothing_to_resume(place):
    before = tree(place / "undisturbed")
    result = train("--resume", "undisturbed", cwd=place)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "the run in undisturbed is over (finished); there is nothing to go on with\n"
    assert tree(place / "undisturbed") == before


def test_without_a_checkpoint_it_begins_again(place):
    """As where it was killed in its first minute."""
    (place / "young").mkdir()
    shutil.copy(place / "undisturbed" / "config.json", place / "young")
    (place / "young" / "history.csv").write_text("epoch,lr\n1,0.5\n")
    assert "resumed in epoch 1, after 0 of its images" in resumed(place, "young")


def test_what_a_killed_run_has_left_half_written_goes(place):
    (place / "halves").mkdir()
    shutil.copy(place / "undisturbed" / "config.json", place / "halves")
    (place / "halves" / f"{STATE}.123.part").write_bytes(b"half")
    (place / "halves" / run_folder.LOCK).touch()  # of a process that is no more
    resumed(place, "halves")


def test_a_folder_without_a_configuration_is_no_run_and_may_become_one(place):
    """As where it was killed before there was anything."""
    (place / "bare").mkdir()
    (place / "bare" / run_folder.LOCK).touch()
    result = train("--resume", "bare", cwd=place)
    assert result.returncode == 2 and result.stderr.startswith("error: bare holds no run, expected a config.json")
    result = train(*LONG, "--epochs", 1, "--out", "bare", cwd=place)
    assert (result.returncode, result.stderr) == (0, "")


def test_two_runs_do_not_share_a_folder(place):
    with start([*LONG, "--epochs", 100000, "--out", "shared"], place) as process:
        assert any(line.startswith("epoch   1 ") for line in process.stdout)
        begun, again = train(*LONG, "--out", "shared", cwd=place), train("--resume", "shared", cwd=place)
        process.kill()
        process.communicate()
    assert begun.returncode == again.returncode == 2
    assert begun.stderr.startswith("error: --out shared already holds a run;") and begun.stderr.count("\n") == 1
    assert again.stderr == "error: shared is being written by another run; wait for it, or give another --out\n"
    assert train("--resume", "shared", "--checkpoint-every", "1", cwd=place,
                 python=stopped_at_once()).returncode == 143  # fmt: skip


def stopped_at_once():
    """train.py whose process gets SIGTERM when its training begins."""
    return script_after(
        "import mlp.loop, os; enter = mlp.loop.Signals.__enter__; "
        "mlp.loop.Signals.__enter__ = lambda self: (enter(self), os.kill(os.getpid(), 15), self)[2]"
    )


def test_other_data_is_refused(place):
    (place / "other").mkdir()
    shutil.copytree(place / "good", place / "other" / "good")
    images = np.load(place / "other" / "good" / "X_images.npy")
    images[0, 0, 0] ^= 1
    np.save(place / "other" / "good" / "X_images.npy", images)
    shutil.copytree(place / "undisturbed", place / "other" / "run")
    (place / "other" / "run" / "metrics.json").unlink()
    result = train("--resume", "run", cwd=place / "other")
    assert result.returncode == 2 and result.stderr == (
        "error: the run was trained on good, and --data good is good with other images now; put the data back, or "
        "begin a new run\n"
    )


def test_another_version_is_told(place):
    shutil.copytree(place / "undisturbed", place / "older")
    (place / "older" / "metrics.json").unlink()
    path = place / "older" / "config.json"
    path.write_text(re.sub(r'"numpy": "[^"]*"', '"numpy": "1.0"', path.read_text()))
    text = resumed(place, "older")
    assert re.search(r"\*\*\* not bit for bit as if never interrupted: versions: .*numpy 1\.0 then, .* now \*\*\*", text)


# ---- no room


def limited(*arguments, cwd, megabytes):
    """train.py that can write no file of more than so many megabytes, which looks to it as a full disk does."""
    return train(*arguments, cwd=cwd, python=script_after(
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({int(megabytes * 2**20)},) * 2)"
    ))  # fmt: skip


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="the system cannot limit the size of files")
@pytest.mark.parametrize("megabytes, file", [(0.4, STATE), (0.1, STATE), (0.02, STATE)])
def test_a_checkpoint_that_does_not_fit_ends_the_run_and_loses_nothing(place, tmp_path, megabytes, file):
    shutil.copytree(place / "good", tmp_path / "good")
    result = limited(*LONG, "--checkpoint-every", "1", "--out", "run", cwd=tmp_path, megabytes=megabytes)
    assert result.returncode == 2 and re.fullmatch(
        r"error: run/?.* cannot be written \(File too large\); make room, then go on with --resume run\n", result.stderr
    )
    assert run_folder.read_config(tmp_path / "run") and not list((tmp_path / "run").glob("*.part"))
    shutil.move(tmp_path / "run", place / f"limited{megabytes}")
    resumed(place, f"limited{megabytes}")


def mounted(folder, size):
    """A small tmpfs on `folder`, where this process may mount one."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here: needs root")


def test_a_full_disk_ends_the_run_and_loses_nothing(place, tmp_path):
    shutil.copytree(place / "good", tmp_path / "good")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted(disk, "700k")  # one checkpoint, but not a second one beside it
    try:
        result = train(*LONG, "--checkpoint-every", "1", "--out", disk / "run", cwd=tmp_path)
        assert result.returncode == 2 and "No space left on device" in result.stderr
        assert result.stderr.count("\n") == 1 and f"go on with --resume {disk}/run" in result.stderr
        archive.read(disk / "run" / STATE)
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        assert train("--resume", disk / "run", cwd=tmp_path).returncode == 0
        assert verify.differences(place / "undisturbed", disk / "run") == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_becomes_read_only(place, tmp_path):
    shutil.copytree(place / "good", tmp_path / "good")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted(disk, "20m")
    try:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        result = train(*LONG, "--out", disk / "run", cwd=tmp_path)
        assert result.returncode == 2 and result.stderr.count("\n") == 1
        assert result.stderr.startswith(f"error: --out {disk}/run cannot be written (Read-only file system)")
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert train(*LONG, "--epochs", 1, "--out", disk / "run", cwd=tmp_path).returncode == 0
        (disk / "run" / "metrics.json").unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        result = train("--resume", disk / "run", cwd=tmp_path)
        assert result.returncode == 2 and "Read-only file system" in result.stderr and result.stderr.count("\n") == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system on which nobody can make a folder")
def test_a_folder_that_cannot_be_made(place):
    result = train(*LONG, "--out", "/proc/run", cwd=place)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: --out /proc/run cannot be written")
