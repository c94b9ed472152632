"""What the Nsight tools print, as tidy rows: the columns that are wanted, every value in the unit of its name.

A value is converted by the unit that the tool prints beside it, because that differs with the version and with the
size of the value: ncu has a row of units under its header, nsys has them in the header, as in "Med (ns)".
"""

import csv
import math
import os
import re
from pathlib import Path

from mlp import InputError

_PREFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}  # decimal: ncu prints 5120 bytes as 5.12 Kbyte
UNITS = {  # wanted unit -> printed unit -> factor
    "us": {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6},
    "GB/s": {f"{p}byte/{s}": factor / 1e9 for p, factor in _PREFIXES.items() for s in ("s", "second")},
    "byte": {f"{p}byte{per}": factor for p, factor in _PREFIXES.items() for per in ("", "/block")},
    "%": {"%": 1.0},
    "register": {"register/thread": 1.0},
    "": {"": 1.0},
}
METRICS = {  # column of ncu.csv -> ncu's metric, wanted unit
    "duration_us": ("gpu__time_duration.sum", "us"),
    "dram_gb_per_s": ("dram__bytes.sum.per_second", "GB/s"),
    "dram_percent": ("dram__throughput.avg.pct_of_peak_sustained_elapsed", "%"),
    "dram_bytes": ("dram__bytes.sum", "byte"),
    "achieved_occupancy_percent": ("sm__warps_active.avg.pct_of_peak_sustained_active", "%"),
    "theoretical_occupancy_percent": ("sm__maximum_warps_per_active_cycle_pct", "%"),
    "registers": ("launch__registers_per_thread", "register"),
    "shared_bytes": ("launch__shared_mem_per_block", "byte"),
}


def _table(text: str, what: str, columns, least: int = 1) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the CSV with these columns in what a tool printed; InputError with fewer rows than `least`."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        header = next(csv.reader([line]), [])
        if set(columns) <= set(_names_and_units(header)):
            rows = list(_rows_of(len(header), lines[number + 1 :]))
            if len(rows) >= least:
                return header, rows
    raise InputError(f"the tool printed no {what} (a table with the columns {', '.join(columns)})")


def _rows_of(width: int, lines: list[str]):
    """The CSV's rows up to the first that has not `width` fields."""
    for row in csv.reader(lines):
        if len(row) != width:
            return
        yield row


def _names_and_units(header) -> dict[str, str]:
    """["Med (ns)", "Name"] -> {"Med": "ns", "Name": ""}"""
    return dict(re.fullmatch(r"(.*?)(?: \(([^()]+)\))?", name).groups(default="") for name in header)


def convert(value: str, unit: str, wanted: str) -> str:
    """`value` of a printed unit in the wanted one; empty where the tool has none. InputError for an unknown unit."""
    if value in ("", "n/a", "nan", "(!) n/a", "(!) nan"):
        return ""
    try:
        number = float(value.replace(",", "")) * UNITS[wanted][unit]
    except (KeyError, ValueError):
        raise InputError(f"cannot read {value!r} {unit!r} as a number in {wanted or 'no unit'!r}") from None
    return f"{number:.12g}" if math.isfinite(number) else ""


def ncu_rows(text: str) -> list[dict]:
    """A row per kernel launch from `ncu --csv --page raw`, in the order of the launches."""
    names = ("Kernel Name", "Grid Size", "Block Size")
    columns = (*names, *(metric for metric, _ in METRICS.values()))
    header, (units, *launches) = _table(text, "kernel launches", columns, least=2)
    rows = []
    for number, values in enumerate(launches, 1):
        value, unit = dict(zip(header, values)), dict(zip(header, units))
        kernel, grid, block = (value[name] for name in names)
        shape = {"grid": "x".join(re.findall(r"\d+", grid)), "block": "x".join(re.findall(r"\d+", block))}
        metrics = {column: convert(value[m], unit[m], wanted) for column, (m, wanted) in METRICS.items()}
        rows.append({"launch": number, "kernel": kernel} | shape | metrics)
    return rows


def _nsys_rows(text: str, what: str, columns: dict[str, tuple[str, str]]) -> list[dict]:
    """The rows of one report of `nsys stats --format csv`; columns: ours -> nsys's without its unit, wanted unit."""
    header, printed = _table(text, what, [name for name, _ in columns.values()])
    units = _names_and_units(header)
    rows = []
    for values in printed:
        value = dict(zip(units, values))
        rows.append({
            column: value[name] if wanted == "text" else convert(value[name], units[name], wanted)
            for column, (name, wanted) in columns.items()
        })  # fmt: skip
    return rows


_TIMES = {"calls": ("Instances", ""), "total_us": ("Total Time", "us"), "median_us": ("Med", "us")}
_GPU_TIMES = {"gpu_total_us": ("Total Proj Time", "us"), "gpu_median_us": ("Proj Med", "us")}


def nsys_kernels(text: str) -> list[dict]:
    """A row per kernel, from the report cuda_gpu_kern_sum."""
    return _nsys_rows(text, "kernels", {"kernel": ("Name", "text")} | _TIMES)


def nsys_ranges(text: str) -> list[dict]:
    """A row per NVTX range: its time on the CPU, from the report nvtx_sum, and from its first to its last operation on
    the GPU, from nvtx_gpu_proj_sum, which leaves out the ranges that launch nothing."""
    hint = "NVTX ranges, as happens where Nsight Systems is older than the package nvtx expects"
    name = {"range": ("Range", "text")}
    on_cpu = _nsys_rows(text, hint, name | _TIMES)
    on_gpu = {row["range"]: row for row in _nsys_rows(text, "NVTX ranges projected to the GPU", name | _GPU_TIMES)}
    return [row | on_gpu.get(row["range"], dict.fromkeys(_GPU_TIMES, "")) for row in on_cpu]


def write(path: Path, rows: list[dict]) -> None:
    """Put the rows in place of those of their model and contender in a CSV file, whose other rows stay."""
    run = (rows[0]["model"], rows[0]["contender"])
    kept = []
    if path.exists():
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != list(rows[0]):
                raise InputError(f"{path} has other columns than are written now; move it away and profile again")
            kept = [row for row in reader if (row["model"], row["contender"]) != run]
    part = path.with_name(path.name + ".part")
    with open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(kept + rows)
    os.replace(part, path)
    print(f"written to {path}")


FILES = {  # tool -> result file -> its rows from what the tool prints
    "nsys": {"nsys_kernels.csv": nsys_kernels, "nsys_ranges.csv": nsys_ranges},
    "ncu": {"ncu.csv": ncu_rows},
}
