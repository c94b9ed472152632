"""Parameters on disk: an .npz of plain arrays and one JSON text, never a pickle."""

import json
import os
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

from . import InputError
from .configs import Config

FORMAT = 1


def save(path: Path, arrays: dict[str, np.ndarray], config: Config, class_names: tuple[str, ...]) -> None:
    """Write `path` whole or not at all: arrays by name, and as JSON the config and the names of the classes."""
    about = json.dumps({"format": FORMAT, "config": asdict(config), "class_names": class_names})
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        np.savez(file, about=np.array(about), **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: Path) -> tuple[dict[str, np.ndarray], Config, tuple[str, ...]]:
    """Read what save() wrote; InputError for a file that is missing, damaged or of another format."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(str(arrays.pop("about")))
        if about["format"] != FORMAT:
            raise InputError(f"{path} has checkpoint format {about['format']}; this version reads format {FORMAT}")
        fields = about["config"] | {"hidden": tuple(about["config"]["hidden"])}
        return arrays, Config(**fields), tuple(about["class_names"])
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give the checkpoint.npz of a run's folder") from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a readable checkpoint ({error}); give the one a run wrote") from None
