"""What a run must survive: kill -9 at random moments, again and again, until it is finished all the same.

`make torture` also fuzzes the readers (tests/fuzz.py) and writes a summary, which profile/report.py quotes.
"""

import os
import random
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from mlp import InputError, archive, run_folder, verify
from mlp.progress import STATE

from .training import SCRIPT, environment


@dataclass
class Tally:
    """What has happened to the runs so far."""

    kills: int = 0
    resumes: int = 0
    finished: int = 0
    by_place: dict = field(default_factory=lambda: {"before training": 0, "in training": 0, "after training": 0})
    losses: list = field(default_factory=list)  # what was lost, or differs from an undisturbed run


def start(arguments, cwd: Path) -> subprocess.Popen:
    """train.py in a process of its own, whose output is read."""
    command = [sys.executable, "-u", SCRIPT, *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_to_the_end(arguments, cwd: Path) -> float:
    """Run it undisturbed; seconds from the first line, when training begins, to the end."""
    with start(arguments, cwd) as process:
        process.stdout.readline()
        began = time.perf_counter()
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return time.perf_counter() - began


def killed(arguments, cwd: Path, delay: float, from_start: bool) -> tuple[bool, str]:
    """Run it, and kill -9 it `delay` seconds after its start, or after its training has begun. Whether it was over
    before, and what it printed."""
    lines = []
    with start(arguments, cwd) as process:
        reader = threading.Thread(target=lambda: lines.extend(process.stdout))
        if from_start:
            reader.start()
        else:
            lines.append(process.stdout.readline())
            reader.start()
        try:
            process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            process.kill()
        process.wait()
        reader.join()
        errors = process.stderr.read()
    assert process.returncode in (0, -9), (process.returncode, errors)
    return process.returncode == 0, "".join(lines)


def check_readable(folder: Path) -> list[str]:
    """What in the folder of a run that was killed cannot be read."""
    faults = []
    try:
        if (folder / "config.json").exists():
            run_folder.read_config(folder)
            run_folder.outcome(folder)
        if (folder / STATE).exists():
            archive.read(folder / STATE)
    except (InputError, Exception) as error:
        faults.append(f"{type(error).__name__}: {error}")
    return faults


def torment(arguments, cwd: Path, name: str, kills: int, rng: random.Random, tally: Tally, seconds: float) -> Path:
    """Begin the run in cwd/name, kill it `kills` times at random moments, and let it end. seconds: what it takes from
    when its training begins. What is lost or cannot be read is added to tally.losses."""
    folder, over, dead = cwd / name, False, 0
    while not over and dead < kills:
        begun = (folder / "config.json").exists()
        command = ["--resume", folder] if begun else [*arguments, "--out", folder]
        tally.resumes += begun
        from_start = rng.random() < 0.15
        over, output = killed(command, cwd, rng.uniform(0, 0.8 if from_start else seconds), from_start)
        if not over:
            dead += 1
            place = "before" if "device:" not in output else "after" if "over" in output or _trained(folder) else "in"
            tally.by_place[f"{place} training"] += 1
        tally.losses += [f"{name}: {fault}" for fault in check_readable(folder)]
    tally.kills += dead
    while not over:
        begun = (folder / "config.json").exists()
        run_to_the_end(["--resume", folder] if begun else [*arguments, "--out", folder], cwd)
        tally.resumes += begun
        over = True
    tally.finished += 1
    left = [path.name for path in folder.iterdir() if path.suffix == ".part" or path.name == STATE]
    tally.losses += [f"{name}: {file} was left behind" for file in left]
    return folder


def _trained(folder: Path) -> bool:
    """Whether the results are being written already."""
    return (folder / "checkpoint.npz").exists()


def compare(folder: Path, undisturbed: Path, tally: Tally) -> None:
    """Add to the losses what of a finished run is not that of an undisturbed one."""
    tally.losses += [f"{folder.name}: {difference}" for difference in verify.differences(undisturbed, folder)]
