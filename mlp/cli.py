"""What the command lines share."""

import argparse

from . import InputError


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one sentence."""

    def error(self, message):
        raise InputError(f"{message} (see --help)")
