"""What the command lines share."""

import argparse
import io
import os
import sys

from . import InputError, LostProcess


def accept_any_text() -> None:
    """Let prints go on where the terminal has no such character, or the name of a file is no text."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one sentence."""

    def error(self, message):
        raise InputError(f"{message} (see --help)")


def complain(error: InputError) -> int:
    """Print the sentence and return the exit status. Of the processes of a job the first speaks for all, but what only
    those notice that are left is told by each."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or isinstance(error, LostProcess):
        print(f"error: {error}" if rank == "0" else f"error: process {rank}: {error}", file=sys.stderr)
    return 2
