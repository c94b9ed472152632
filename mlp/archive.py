"""Arrays and a JSON text in one .npz file: never a pickle, written whole or not at all, read only as it was written.

The member `about` is the JSON text: "format", "kind" (what the file is), "arrays" (the names of the other members),
what the caller adds, and "sha256" over all of that and over every array's name, dtype, shape and bytes.
"""

import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np

from .files import replacing

FORMAT = 2  # 1 had neither a kind nor a checksum
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same content is the same bytes, whenever it is written


class NewerFormat(Exception):
    """The file was written by another version."""


def write(path: Path, kind: str, about: dict, arrays: dict[str, np.ndarray]) -> None:
    """Write `path`, or after an error leave it as it was. OSError where it cannot be written."""
    arrays = {name: np.ascontiguousarray(array) if array.ndim else array for name, array in arrays.items()}
    about = {"format": FORMAT, "kind": kind, "arrays": list(arrays)} | about
    about["sha256"] = _digest(about, arrays)
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as members:
        for name, array in {"about": np.array(json.dumps(about)), **arrays}.items():
            with members.open(zipfile.ZipInfo(f"{name}.npy", _EPOCH), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def read(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """What write() was given. FileNotFoundError; NewerFormat; and for a file that is damaged or foreign nearly any
    Exception, because damaged bytes raise nearly anything in zipfile, numpy and json."""
    with zipfile.ZipFile(path) as file:
        arrays = {member.filename.removesuffix(".npy"): _array(file, member) for member in file.infolist()}
    about = json.loads(str(arrays.pop("about")))
    if about["format"] not in (1, FORMAT):
        raise NewerFormat(about["format"])
    if about["arrays"] != list(arrays):  # a damaged table of contents hides members without an error
        raise ValueError(f"it holds {', '.join(arrays) or 'no arrays'}, expected {', '.join(about['arrays'])}")
    if about["format"] == 1:
        about["kind"] = "model"
    elif about.pop("sha256") != _digest(about, arrays):
        raise ValueError("its content is not what its checksum says")
    return about, arrays


def _array(file: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    if member.compress_type != zipfile.ZIP_STORED:  # what is compressed may be larger than the memory
        raise ValueError(f"{member.filename} is compressed")
    return np.lib.format.read_array(io.BytesIO(file.read(member)), allow_pickle=False)


def _digest(about: dict, arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
