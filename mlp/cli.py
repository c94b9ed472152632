"""What the command lines share."""

import argparse
import io
import os
import sys
import time

from . import InputError, LostProcess

SECONDS_TO_SPEAK = 5.0


def accept_any_text() -> None:
    """Let prints go on where the terminal has no such character, or the name of a file is no text."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one sentence."""

    def error(self, message):
        raise InputError(f"{message} (see --help)")


def complain(error: InputError) -> int:
    """Print the sentence and return the exit status. Of the processes of a job the first speaks for all, and the job is
    ended when one has left with an error: the others give it time to speak, and do so themselves where they are still
    there after that, or where only those notice that are left."""
    rank = os.environ.get("RANK", "0")
    if rank != "0" and not isinstance(error, LostProcess):
        time.sleep(SECONDS_TO_SPEAK)
    print(f"error: {error}" if rank == "0" else f"error: process {rank}: {error}", file=sys.stderr)
    return 2
