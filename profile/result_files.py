"""The result files of one measurement: their columns, the checks they must pass, and what to call the machine.

Values stay the text that was written, so that README.md shows them digit by digit; number() converts one.
"""

import csv
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlp import InputError  # noqa: E402

MACHINE = ("device", "cores", "driver", "versions", "date", "revision")  # the last columns of every file
ONE_RUN = ("device", "cores", "driver", "versions", "revision")  # must be the same in a whole folder
COLUMNS = {
    "kernels.csv": "op contender size shape dtype samples p20_us p50_us p80_us bytes gb_per_s share_of_copy speedup "
                   "note",
    "step.csv": "contender model layers batch precision samples p20_ms p50_ms p80_ms to_gemm speedup images_per_second",
    "phases.csv": "contender model layers batch precision phase samples p20_ms p50_ms p80_ms",
    "epoch.csv": "contender model layers batch precision data images samples seconds images_per_second speedup",
    "sweep.csv": "sweep contender model layers batch width precision samples p20_ms p50_ms p80_ms flops bytes "
                 "gflop_per_s images_per_second",
    "ceilings.csv": "name precision value unit",
    "ladder.csv": "rung what precision launches bytes flops predicted_us bound samples p20_us p50_us p80_us speedup "
                  "gain note",
    "costs.csv": "name value unit",
    "launches.csv": "contender precision steps samples p20_us p50_us p80_us",
    "torture.csv": "trial kills resumes inputs executions losses",
}  # fmt: skip
COLUMNS = {name: (*columns.split(), *MACHINE) for name, columns in COLUMNS.items()}
# What tells the rows of a file apart. Every column is a number but these, the texts and MACHINE.
KEY = ("name", "trial", "sweep", "op", "rung", "contender", "size", "model", "layers", "batch", "width", "precision", "steps",
       "phase", "data")  # fmt: skip
NUMBERS = ("size", "batch", "width", "steps", "cores")
TEXTS = ("shape", "dtype", "note", "unit", "what", "bound")
# These may be empty where `note` says why.
MEASURED = ("samples", "p20_us", "p50_us", "p80_us", "gb_per_s", "share_of_copy", "speedup", "launches", "bytes",
            "flops", "predicted_us", "bound", "gain")  # fmt: skip
TRIED = ("kills", "resumes", "inputs", "executions")  # of a trial has what was done
RATIOS = ("share_of_copy", "speedup", "to_gemm", "gain")

Row = dict[str, str]
Results = dict[str, list[Row]]  # by file name


def number(row: Row, column: str) -> float:
    """The value of a column; NaN where it is empty."""
    return float(row[column]) if row[column] else math.nan


def key(row: Row) -> tuple[str, ...]:
    return tuple(row[column] for column in KEY if row.get(column))


def unique(rows: list[Row], *columns: str) -> list:
    """The different values of one column, or tuples of several columns, in the order of the file."""
    values = (tuple(row[column] for column in columns) for row in rows)
    return list(dict.fromkeys(value if len(columns) > 1 else value[0] for value in values))


def machine(row: Row) -> str:
    """'AMD EPYC, 2 cores', or with a driver 'NVIDIA H100, driver 570.1, 16 host cores'."""
    if row["driver"]:
        return f"{row['device']}, driver {row['driver']}, {row['cores']} host cores"
    return f"{row['device']}, {row['cores']} cores"


def made(rows: list[Row]) -> str:
    """When and from which revision, which says so where it was not committed."""
    dates, revision = sorted(unique(rows, "date")), rows[0]["revision"]
    days = " to ".join(dates[:1] + dates[1:][-1:])
    return f"{days}, revision {revision}" + (" (uncommitted changes)" if revision.endswith("+") else "")


def has_results(folder: Path) -> bool:
    return any((folder / name).exists() for name in COLUMNS)


def read(folder: Path) -> Results:
    """Every results file of `folder`.

    InputError for a folder without any, for one that mixes machines, versions or revisions, for a column that is
    missing, a row that is there twice, and a value that is empty or no number above 0 where there must be one.
    """
    if not has_results(folder):
        raise InputError(f"{folder} holds no results; expected at least one of {', '.join(COLUMNS)}")
    results = {name: _read_file(folder / name, columns) for name, columns in COLUMNS.items()
               if (folder / name).exists()}  # fmt: skip
    for column in ONE_RUN:
        where = {row[column]: name for name, rows in results.items() for row in rows}
        if len(where) > 1:
            values = " and ".join(f"{value or 'nothing'} ({name})" for value, name in list(where.items())[:2])
            raise InputError(f"{folder} mixes results of several runs: {column} is {values}; measure it in one run")
    return results


def _read_file(path: Path, columns: tuple[str, ...]) -> list[Row]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            rows, header = list(reader), reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({error})") from None
    missing = [column for column in columns if column not in header]
    if missing:
        raise InputError(f"{path} lacks the column {missing[0]}; measure it again with this version of profile/")
    if not rows:
        raise InputError(f"{path} has no rows; measure it again")
    seen = set()
    for line, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise InputError(f"row {line} of {path} does not have {len(header)} values, as its header has")
        for column in columns:
            _check(row, column, f"row {line} of {path}")
        if key(row) in seen:
            raise InputError(f"row {line} of {path} is there twice ({', '.join(key(row))}); measure it in one run")
        seen.add(key(row))
    return rows


def _check(row: Row, column: str, place: str) -> None:
    value = row[column]
    if not value:
        explained = column in MEASURED and row.get("note")
        if not (explained or column in ("note", "driver", *TRIED) or column == "width" and row["sweep"] == "batch"):
            raise InputError(f"{place} has no {column}")
    elif column in NUMBERS or column not in (*KEY, *TEXTS, *MACHINE):
        try:
            good = 0 < float(value) < math.inf or column == "losses" and value == "0"  # False for NaN
        except ValueError:
            good = False
        if not good:
            raise InputError(f"{place} has {column} {value}, expected a number above 0")
