"""How numbers are written on a command line: widths, batch sizes, amounts of memory."""

import math

from . import InputError
from .configs import FULL


def parse_hidden(text: str) -> tuple[int, ...]:
    """'400,240,120' -> (400, 240, 120)."""
    try:
        return tuple(int(width) for width in text.split(","))
    except ValueError:
        raise InputError(f"--hidden {text} is not a list of widths; give whole numbers such as 400,240,120") from None


def parse_batch_size(text: str) -> int | str:
    """'512' -> 512; 'full' stays."""
    if text == FULL:
        return text
    try:
        return int(text)
    except ValueError:
        raise InputError(f"--batch-size {text} is not possible; give a whole number or 'full'") from None


_UNITS = {"": 1} | {f"{k}{b}": 1000**n for n, k in enumerate("KMGT", 1) for b in ("", "B")}
_UNITS |= {f"{k}IB": 1024**n for n, k in enumerate("KMGT", 1)}


def parse_bytes(text: str) -> int:
    """'4GB' -> 4000000000; '512MiB' -> 536870912; '1000' -> 1000."""
    number = text.rstrip("KMGTIBkmgtib")
    try:
        return int(float(number) * _UNITS[text[len(number) :].upper()])
    except (ValueError, KeyError, OverflowError):
        raise InputError(f"--memory-limit {text} is no amount of memory; give bytes such as 4GB or 512MiB") from None


def format_bytes(count: int) -> str:
    """1234567 -> '1.24 MB': rounded up, so that it is enough."""
    for power, unit in ((3, "GB"), (2, "MB"), (1, "KB")):
        if count >= 1000**power:
            return f"{math.ceil(count / 1000**power * 100) / 100:g} {unit}"
    return f"{count} B"
