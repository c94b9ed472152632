"""Parameters on disk: an .npz of plain arrays and one JSON text, never a pickle."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import InputError
from .configs import Config

FORMAT = 1


class Checkpoint(NamedTuple):
    arrays: dict[str, np.ndarray]  # weight0 (in, out), bias0 (out,), weight1, ...
    config: Config
    class_names: tuple[str, ...]
    data_name: str  # of the data set that it was trained on, as in Dataset.name; "" where it was not recorded


def save(path: Path, arrays, config: Config, class_names: tuple[str, ...], data_name: str = "") -> None:
    """Write `path` whole or not at all: arrays by name, and the rest of Checkpoint as JSON."""
    names = {"class_names": class_names, "data_name": data_name, "arrays": list(arrays)}
    about = json.dumps({"format": FORMAT, "config": asdict(config)} | names)
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        np.savez(file, about=np.array(about), **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: Path) -> tuple[dict[str, np.ndarray], Config, tuple[str, ...]]:
    """The arrays, the config and the class names of read(path)."""
    return read(path)[:3]


def read(path: Path) -> Checkpoint:
    """Read what save() wrote; InputError for a file that is missing, damaged or of another format."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray):  # NumPy hands out as bytes what does not begin like an array
                raise ValueError(f"{name} is not an array")
        about = json.loads(str(arrays.pop("about")))
        if about["format"] != FORMAT:
            raise InputError(f"{path} has checkpoint format {about['format']}; this version reads format {FORMAT}")
        if about["arrays"] != list(arrays):  # a damaged table of contents hides members without an error
            raise ValueError(f"it holds {', '.join(arrays) or 'no arrays'}, expected {', '.join(about['arrays'])}")
        fields = about["config"] | {"hidden": tuple(about["config"]["hidden"])}
        return Checkpoint(arrays, Config(**fields), tuple(about["class_names"]), str(about.get("data_name", "")))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give the checkpoint.npz of a run's folder") from None
    except InputError:
        raise
    except Exception as error:  # damaged bytes raise nearly anything in zipfile, numpy and json
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} is not a readable checkpoint ({reason}); give the one a run wrote") from None
