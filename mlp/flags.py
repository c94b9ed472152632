"""How numbers are written on a command line: widths, batch sizes, amounts of memory."""

import math
import re
from dataclasses import dataclass

from . import InputError
from .configs import FULL


@dataclass(frozen=True)
class Interval:
    """How often a checkpoint is written, at most: every so many seconds, or epochs; neither: never by itself."""

    seconds: float | None = 60.0
    epochs: int | None = None


def parse_interval(text: str) -> Interval:
    """'30s' -> Interval(30.0); '5min'; '2' -> Interval(None, 2), which are epochs; 'never'."""
    if text == "never":
        return Interval(None)
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)(s|min|h)|([1-9]\d{0,8})", text)
    if not found:
        raise InputError(
            f"--checkpoint-every {text} is no interval; give a time such as 30s or 5min, a number of epochs, or never"
        )
    number, unit, epochs = found.groups()
    return Interval(None, int(epochs)) if epochs else Interval(float(number) * {"s": 1, "min": 60, "h": 3600}[unit])


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
