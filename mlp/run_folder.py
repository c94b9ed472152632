"""The folder of a run: who may write into it, and what is in it, whole at any moment."""

import csv
import io
import json
import time
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

from filelock import FileLock, Timeout

from . import InputError, one_line
from .configs import Config
from .checkpoint import config_of
from .files import file_name, make_folder, replace_text
from .progress import STATE, EpochRow

LOCK = ".lock"


def refuse_used(out: Path | None) -> None:
    """InputError where the folder already holds a run."""
    try:
        used = out is not None and (out / "config.json").exists()
    except OSError as error:
        raise InputError(f"--out {out} cannot be used ({error.strerror}); give another folder") from None
    if used:
        raise InputError(f"--out {out} already holds a run; give another folder, or go on with it by --resume {out}")


def make(out: Path | None, config: Config, data_name: str) -> Path:
    """Create the run's folder, `out` or a new one under runs/, and see that it can be written."""
    if out is None:
        name = f"{config.model}{'-fused' if config.fused else ''}-{file_name(data_name)}"
        out = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        while out.exists():  # another run of the same second
            out = out.with_name(out.name + "x")
    return make_folder(out)


@contextmanager
def locked(folder: Path):
    """While nobody else writes into the folder. InputError where somebody does. The lock is the system's: it ends with
    its process, however that ends."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{folder} is being written by another run; wait for it, or give another --out") from None
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); give another folder") from None
    try:
        for left in folder.glob("*.part"):  # by a run that was killed
            left.unlink()
        yield
        (folder / LOCK).unlink(missing_ok=True)
    finally:
        lock.release()


def read_config(folder: Path) -> tuple[Config, dict]:
    """The configuration of the run in the folder, and all of its config.json. InputError where there is none."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config = config_of({field.name: content[field.name] for field in fields(Config)})
        if not isinstance(content["data_sha256"], str):
            raise ValueError("data_sha256 is no text")
        return config, content
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder} holds no run, expected a config.json; give a folder that train.py wrote") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    except (ValueError, KeyError, TypeError, AttributeError, InputError, RecursionError) as error:
        reason = one_line(error)
        raise InputError(f"{path} is damaged or of another version ({reason}); begin a new run") from None


def outcome(folder: Path) -> str:
    """How the run in the folder has ended; "" where it has not."""
    try:
        return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["outcome"]
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{folder / 'metrics.json'} is damaged ({one_line(error)}); delete it") from None


def write_json(path: Path, content: dict) -> None:
    replace_text(path, json.dumps(content, indent=2) + "\n", durable=True)


def write_history(folder: Path, rows: list[EpochRow]) -> None:
    """history.csv. It is not forced onto the disk every epoch: the checkpoint has the rows, too."""
    names = [field.name for field in fields(EpochRow)]
    write_csv(folder / "history.csv", names, (asdict(row).values() for row in rows))


def write_csv(path: Path, header, rows) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    replace_text(path, text.getvalue())


def forget_state(folder: Path) -> None:
    """Remove the checkpoint of a training that is over."""
    (folder / STATE).unlink(missing_ok=True)
