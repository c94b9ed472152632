"""A trained model on disk: parameters by name, and the configuration that they belong to."""

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import InputError, archive, one_line
from .configs import Config


class Checkpoint(NamedTuple):
    arrays: dict[str, np.ndarray]  # weight0 (in, out), bias0 (out,), weight1, ...
    config: Config
    class_names: tuple[str, ...]
    data_name: str  # of the data set that it was trained on, as in Dataset.name; "" where it was not recorded


def save(path: Path, arrays, config: Config, class_names: tuple[str, ...], data_name: str = "") -> None:
    """Write `path` whole or not at all: arrays by name, and the rest of Checkpoint as JSON (see archive.py)."""
    names = {"class_names": class_names, "data_name": data_name}
    archive.write(path, "model", {"config": asdict(config)} | names, arrays)


def load(path: Path) -> tuple[dict[str, np.ndarray], Config, tuple[str, ...]]:
    """The arrays, the config and the class names of read(path)."""
    return read(path)[:3]


def read(path: Path) -> Checkpoint:
    """Read what save() wrote; InputError for a file that is missing, damaged or of another format."""
    try:
        about, arrays = archive.read(path)
        if about["kind"] != "model":
            raise InputError(f"{path} is the {about['kind']} of a run, expected a model; give its checkpoint.npz")
        config = config_of(about["config"])
        return Checkpoint(arrays, config, tuple(about["class_names"]), str(about.get("data_name", "")))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give the checkpoint.npz of a run's folder") from None
    except InputError:
        raise
    except archive.NewerFormat as error:
        raise InputError(
            f"{path} has checkpoint format {error}; this version reads format {archive.FORMAT} and older ones"
        ) from None
    except Exception as error:
        reason = one_line(error)
        raise InputError(f"{path} is not a readable checkpoint ({reason}); give the one a run wrote") from None


def config_of(fields: dict) -> Config:
    """The Config whose fields JSON has brought back."""
    return Config(**fields | {"hidden": tuple(fields["hidden"])})
