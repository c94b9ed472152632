"""Folders and files for results."""

import os
import re
from pathlib import Path

from . import InputError


def make_folder(folder: Path) -> Path:
    """Create a folder for results and see that it can be written; InputError where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written ({error.strerror}); give another folder") from None
    return folder


def file_name(name: str) -> str:
    """`name` without what is awkward in the name of a file."""
    return re.sub("[^A-Za-z0-9._-]+", "-", name)


def replace_text(path: Path, text: str) -> None:
    """Write `path` whole or not at all, also where other processes write it at the same time."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8", newline="")
    os.replace(part, path)
