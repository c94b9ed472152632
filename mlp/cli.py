"""What the command lines share."""

import argparse
import io
import sys

from . import InputError


def accept_any_text() -> None:
    """Let prints go on where the terminal has no such character, or the name of a file is no text."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one sentence."""

    def error(self, message):
        raise InputError(f"{message} (see --help)")
