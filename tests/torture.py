"""What a run must survive: kill -9 at random moments, again and again, until it is finished all the same.

`make torture` (python -m tests.torture) does this to every kind of model, fuzzes the readers (fuzz.py), tries all bad
inputs (test_bad_input.py), and writes torture.csv, which profile/report.py quotes.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from mlp import InputError, archive, run_folder, verify
from mlp.device import cpu_name
from mlp.progress import STATE

from .training import ROOT, SCRIPT, environment


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
    command, env = [sys.executable, "-u", SCRIPT, *map(str, arguments)], environment() | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


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
    except Exception as error:
        faults.append(f"{type(error).__name__}: {error}")
    return faults


def torment(arguments, cwd: Path, name: str, kills: int, rng: random.Random, tally: Tally, seconds: float) -> Path:
    """Begin the run in cwd/name, kill it `kills` times at random moments, and let it end. seconds: what it takes from
    when its training begins. What is lost or cannot be read is added to tally.losses."""
    folder, over, dead = cwd / name, False, 0
    while not over and dead < kills:
        command = _next(arguments, folder, tally)
        from_start = rng.random() < 0.15
        over, output = killed(command, cwd, rng.uniform(0, 0.8 if from_start else seconds), from_start)
        if not over:
            dead += 1
            place = "before" if "device:" not in output else "after" if "over" in output or _trained(folder) else "in"
            tally.by_place[f"{place} training"] += 1
        tally.losses += [f"{name}: {fault}" for fault in check_readable(folder)]
    tally.kills += dead
    if not over:
        run_to_the_end(_next(arguments, folder, tally), cwd)
    tally.finished += 1
    left = [path.name for path in folder.iterdir() if path.suffix == ".part" or path.name == STATE]
    tally.losses += [f"{name}: {file} was left behind" for file in left]
    return folder


def _next(arguments, folder: Path, tally: Tally) -> list:
    """What begins the run, or goes on with it where it has begun."""
    begun = (folder / "config.json").exists()
    tally.resumes += begun
    return ["--resume", folder] if begun else [*arguments, "--out", folder]


def _trained(folder: Path) -> bool:
    """Whether the results are being written already."""
    return (folder / "checkpoint.npz").exists()


def compare(folder: Path, undisturbed: Path, tally: Tally) -> None:
    """Add to the losses what of a finished run is not that of an undisturbed one."""
    tally.losses += [f"{folder.name}: {difference}" for difference in verify.differences(undisturbed, folder)]


# ---- make torture

DATA = "glyphs:4000"
MODELS = {
    "m0": "--model m0 --epochs 120",
    "m1 fused": "--model m1 --fused --epochs 40 --patience 40",
    "m1 fused, average of parameters": "--model m1 --fused --epochs 30 --patience 30 --ema 0.99 --schedule cosine --warmup 2",
    "robust fused": "--model robust --fused --dropout 0.1 --epochs 12",
    "m1 early stopping": "--model m1 --lr 0.002 --patience 5 --epochs 60",
    "m2": "--model m2 --epochs 25 --patience 25",
    "m3": "--model m3 --epochs 12",
    "m2 fused": "--model m2 --fused --epochs 20 --patience 20",
}


def kill_runs(kills: int, seed: int) -> list[dict]:
    """Torment the MODELS in turn until there were so many kills: a row for each model."""
    rng, rows = random.Random(seed), {name: Tally() for name in MODELS}
    with tempfile.TemporaryDirectory(prefix="torture-") as place:
        cwd, undisturbed, number = Path(place), {}, 0
        while (left := kills - sum(tally.kills for tally in rows.values())) > 0:
            name = list(MODELS)[number % len(MODELS)]
            number += 1
            arguments = [*MODELS[name].split(), "--data", DATA, "--device", "cpu", "--checkpoint-every", "0.05s"]
            if name not in undisturbed:
                folder = cwd / f"undisturbed {name}"
                undisturbed[name] = folder, run_to_the_end([*arguments, "--out", folder], cwd)
            folder, seconds = undisturbed[name]
            done = torment(arguments, cwd, f"{number} {name}", min(4, left), rng, rows[name], 0.8 * seconds)
            compare(done, folder, rows[name])
            print(f"{name}: {rows[name]}", flush=True)
    return [
        {"trial": f"kill -9: {name}", "kills": tally.kills, "resumes": tally.resumes, "losses": len(tally.losses)}
        for name, tally in rows.items() if tally.kills
    ]  # fmt: skip


def try_bad_inputs() -> dict:
    """The table of bad inputs: how many were tried, and how many were not answered as they should be."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "tests/test_bad_input.py"]
    last = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True).stdout.splitlines()[-1]
    print(f"bad inputs: {last}", flush=True)
    passed, failed = (sum(map(int, re.findall(rf"(\d+) {what}", last))) for what in ("passed", "(?:failed|error)"))
    if not passed:
        raise InputError(f"no bad input was tried: {last}")
    return {"trial": "bad inputs", "inputs": passed + failed, "losses": failed}


def fuzz_readers(seconds: int, seed: int, out: Path) -> list[dict]:
    report = out / "fuzz.json"
    command = [sys.executable, "-m", "tests.fuzz", "--seconds", str(seconds), "--seed", str(seed), "--out", str(report)]
    if subprocess.run(command, cwd=ROOT, env=environment()).returncode not in (0, 1):
        raise InputError("the readers were not fuzzed; see above")
    rows = [
        {"trial": f"fuzz: {row['reader']} reader", "executions": row["executions"], "losses": len(row["failures"])}
        for row in json.loads(report.read_text())
    ]
    report.unlink()
    return rows


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seconds", type=int, default=60, help="of fuzzing (default: 60)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments and the changes (default: 1)")
    parser.add_argument("--out", type=Path, default=ROOT / "profile" / "results" / "torture")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT / "profile"))
    import machine

    args.out.mkdir(parents=True, exist_ok=True)
    try:
        rows = [try_bad_inputs(), *fuzz_readers(args.seconds, args.seed, args.out)]
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [*kill_runs(args.kills, args.seed), *rows]
    totals = {name: sum(row.get(name, 0) for row in rows) for name in ("kills", "resumes", "inputs", "executions", "losses")}
    facts = machine.facts(cpu_name(), "cpu")
    machine.write_csv(args.out / "torture.csv", [row | facts for row in (*rows, {"trial": "all"} | totals)])
    print(", ".join(f"{name}: {number:,}" for name, number in totals.items()))
    return int(totals["losses"] > 0)


if __name__ == "__main__":
    sys.exit(main())
