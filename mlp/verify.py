"""python -m mlp verify: make a finished run again, and compare every number that does not tell the time."""

import csv
import json
import tempfile
from pathlib import Path

import numpy as np

from . import InputError, checkpoint, provenance, run_folder
from .distributed import is_first

TIMES = ("seconds", "seconds_per_epoch", "images_per_second")
HISTORY, METRICS, CONFUSION, CHECKPOINT = "history.csv", "metrics.json", "confusion.csv", "checkpoint.npz"


def run(args) -> int:
    """0 where the run in args.run has been made again bit for bit, 1 where something differs. InputError for a folder
    that holds no finished run, or other data than it was trained on."""
    from . import run

    folder = args.run
    config, content = run_folder.read_config(folder)
    if (outcome := run_folder.outcome(folder)) not in ("finished", "stopped early", "diverged"):
        raise InputError(f"{folder} holds a run that was not ended; go on with it by train.py --resume {folder}")
    _read(folder)  # what is damaged is told before an hour of training
    with tempfile.TemporaryDirectory(prefix="verify-") as place:
        again = Path(place) / "again"
        status = run.train(config, again, run.Options(), content)
        if not is_first():
            return 0
        if status and outcome != "diverged":
            raise InputError(f"{folder} cannot be verified: making it again ended with status {status}")
        changed = provenance.differences(content, run_folder.read_config(again)[1])
        found = differences(folder, again)
    rows = len(_read(folder)[HISTORY])
    if not found:
        print(f"{folder} is reproduced bit for bit: {rows} epochs, metrics, confusion matrix and parameters")
        return 0
    for line in found:
        print(f"differs: {line}")
    print("this may be because of " + "; ".join(changed) if changed else "nothing else that is known differs")
    return 1


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs, by file, beside the times: where first, and how."""
    found = []
    for name, content in _read(one).items():
        counterpart = _read(other)[name]
        if len(content) != len(counterpart):
            found.append(f"{name}: {len(content)} entries against {len(counterpart)}")
            continue
        unequal = [key for key in content if not _same(content[key], counterpart.get(key))]
        if unequal:
            key = unequal[0]
            what = f"{content[key]} against {counterpart.get(key)}" if name != CHECKPOINT else "other values"
            found.append(f"{name}: {key}: {what}" + (f", and {len(unequal) - 1} more" if len(unequal) > 1 else ""))
    return found


def _same(one, other) -> bool:
    if isinstance(one, np.ndarray):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    return repr(one) == repr(other)  # NaN is NaN


def _read(folder: Path) -> dict[str, dict]:
    """Every file that is compared, as {what: value}."""
    try:
        with open(folder / HISTORY, newline="") as file:
            history = {f"epoch {row['epoch']}": _timeless(row) for row in csv.DictReader(file)}
        metrics = _timeless(json.loads((folder / METRICS).read_text(encoding="utf-8")))
        with open(folder / CONFUSION, newline="") as file:
            confusion = {f"row {row[0]}": row[1:] for row in csv.reader(file)}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{folder} is damaged or not a finished run ({reason}); begin a new run") from None
    arrays = checkpoint.read(folder / CHECKPOINT).arrays
    return {HISTORY: history, METRICS: metrics, CONFUSION: confusion, CHECKPOINT: arrays}


def _timeless(content: dict) -> dict:
    return {name: value for name, value in content.items() if name not in TIMES}
