"""Folders and files for results."""

import os
import re
from contextlib import contextmanager
from pathlib import Path

from . import InputError


def make_folder(folder: Path) -> Path:
    """Create a folder for results and see that it can be written; InputError where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}.part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written ({error.strerror}); give another folder") from None
    return folder


def file_name(name: str) -> str:
    """`name` without what is awkward in the name of a file."""
    return re.sub("[^A-Za-z0-9._-]+", "-", name)


@contextmanager
def replacing(path: Path, durable: bool = True):
    """A binary file that takes the place of `path` when the block has gone well: whole or not at all, also where other
    processes write it at the same time, and if durable also after a loss of power. After an error `path` is as it was.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if durable:
        _sync_folder(path.parent)


def replace_text(path: Path, text: str, durable: bool = False) -> None:
    """Write `path` whole or not at all; see replacing()."""
    with replacing(path, durable) as file:
        file.write(text.encode())


def _sync_folder(folder: Path) -> None:
    """Make what was renamed there survive a loss of power; not everything that is mounted as a folder can do that."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # as on Windows
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
