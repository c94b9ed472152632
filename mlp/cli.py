"""What the command lines share."""

import argparse
import re
from pathlib import Path

from . import InputError


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one sentence."""

    def error(self, message):
        raise InputError(f"{message} (see --help)")


def make_folder(folder: Path) -> Path:
    """Create a folder for results and see that it can be written; InputError where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written ({error.strerror}); give another folder") from None
    return folder


def file_name(name: str) -> str:
    """`name` without what is awkward in the name of a file."""
    return re.sub("[^A-Za-z0-9._-]+", "-", name)
