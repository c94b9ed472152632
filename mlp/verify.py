"""python -m mlp verify: make a finished run again, and compare every number that does not tell the time."""

import csv
import io
import json
import sys
import tempfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path

import numpy as np

from . import InputError, checkpoint, one_line, provenance, run_folder
from .distributed import is_first

TIMES = ("seconds", "seconds_per_epoch", "images_per_second")
HISTORY, METRICS, CONFUSION, CHECKPOINT = "history.csv", "metrics.json", "confusion.csv", "checkpoint.npz"
ABSENT = "nothing"


def run(args) -> int:
    """0 where the run in args.run has been made again bit for bit, 1 where something differs. InputError for a folder
    that holds no finished run, or other data than it was trained on."""
    from . import run

    folder = args.run
    config, content = run_folder.read_config(folder)
    if (outcome := run_folder.outcome(folder)) not in ("finished", "stopped early", "diverged"):
        raise InputError(f"{folder} holds a run that was not ended; go on with it by train.py --resume {folder}")
    epochs = len(_read(folder)[HISTORY])  # what is damaged is told before an hour of training
    with tempfile.TemporaryDirectory(prefix="verify-") as place:
        again = Path(place) / "again"
        with _beside_the_answer(), _threads_of_torch(content):
            status = run.train(config, again, run.Options(), content)
        if not is_first():
            return 0
        if status and outcome != "diverged":
            raise InputError(f"{folder} cannot be verified: making it again ended with status {status}")
        changed = provenance.differences(content, run_folder.read_config(again)[1])
        found = differences(folder, again)
    if not found:
        print(f"{folder} is reproduced bit for bit: {epochs} epochs, metrics, confusion matrix and parameters")
        return 0
    for line in found:
        print(f"differs: {line}")
    print("this may be because of " + "; ".join(changed) if changed else "nothing else that is known differs")
    return 1


@contextmanager
def _beside_the_answer():
    """The progress of the run goes to stderr, where the answer is not looked for. That it diverges again, which is told
    there, is no error here."""
    with redirect_stdout(sys.stderr), redirect_stderr(io.StringIO()):
        yield


@contextmanager
def _threads_of_torch(content: dict):
    """As many as the run had where it was torch's, whose products and sums may depend on them; ours do not."""
    if not content.get("threads"):
        yield
        return
    try:
        import torch
    except ImportError:  # which is told when the run is begun
        yield
        return

    before = torch.get_num_threads()
    torch.set_num_threads(content["threads"])
    try:
        yield
    finally:
        torch.set_num_threads(before)


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs, by file, beside the times: where first, and how."""
    found, others = [], _read(other)
    for name, content in _read(one).items():
        counterpart = others[name]
        pairs = {key: (content.get(key, ABSENT), counterpart.get(key, ABSENT)) for key in content | counterpart}
        unequal = [key for key, pair in pairs.items() if not _same(*pair)]
        if unequal:
            more = f", and {len(unequal) - 1} more" if len(unequal) > 1 else ""
            found.append(f"{name}: {unequal[0]}: {_text(*pairs[unequal[0]])}{more}")
    return found


def _same(one, other) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    return repr(one) == repr(other)  # NaN is NaN


def _text(one, other) -> str:
    arrays = [isinstance(value, np.ndarray) for value in (one, other)]
    if all(arrays):
        return "other values"
    return " against ".join("an array" if array else str(value) for array, value in zip(arrays, (one, other)))


def _read(folder: Path) -> dict[str, dict]:
    """Every file that is compared, as {what: value}."""
    try:
        with open(folder / HISTORY, newline="") as file:
            history = {f"epoch {row['epoch']}": _timeless(row) for row in csv.DictReader(file)}
        metrics = _timeless(json.loads((folder / METRICS).read_text(encoding="utf-8")))
        with open(folder / CONFUSION, newline="") as file:
            confusion = {f"row {row[0]}": row[1:] for row in csv.reader(file)}
    except (OSError, csv.Error, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = one_line(error)
        raise InputError(f"{folder} is damaged or not a finished run ({reason}); begin a new run") from None
    model = checkpoint.read(folder / CHECKPOINT)
    about = {"class_names": model.class_names, "data_name": model.data_name, **asdict(model.config)}
    return {HISTORY: history, METRICS: metrics, CONFUSION: confusion, CHECKPOINT: model.arrays | about}


def _timeless(content: dict) -> dict:
    return {name: value for name, value in content.items() if name not in TIMES}
