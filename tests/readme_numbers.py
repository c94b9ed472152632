"""Which numbers of README.md are in no results file.

In a generated table: every number, in the CSV that the table names. In prose: every number with a unit of time,
rate or ratio, in a column of that unit. A unit that no column has, such as %, is in no results file.
"""

import csv
import re
from pathlib import Path

COLUMNS_OF = {
    "ms": ("p20_ms", "p50_ms", "p80_ms"), "µs": ("p20_us", "p50_us", "p80_us"), "s": ("seconds",),
    "images/s": ("images_per_second",), "GB/s": ("gb_per_s",), "GFLOP/s": ("gflop_per_s",),
    "×": ("speedup", "to_gemm"),
}  # fmt: skip
SAME = {"us": "µs", "μs": "µs", "microseconds": "µs", "milliseconds": "ms", "second": "s", "seconds": "s",
        "images per second": "images/s", "x": "×", "times": "×"}  # fmt: skip
OTHERS = ("ns", "min", "minute", "minutes", "h", "hour", "hours", "MB/s", "GiB/s", "TB/s", "TFLOP/s", "%", "percent",
          "-fold")  # fmt: skip
UNITS = "|".join(map(re.escape, sorted((*COLUMNS_OF, *SAME, *OTHERS), key=len, reverse=True)))
NUMBER = r"(?<![\w.,])\d[\d,]*(?:\.\d+)?"
RANGE = rf"{NUMBER}(?:(?:\s?[–-]\s?|\s(?:to|and|or)\s){NUMBER})*"
CLAIM = re.compile(rf"({RANGE})[\s-]?({UNITS})(?![\w/])(?!\s?\d)")  # "28×28" is a shape
GENERATED = re.compile(r"<!-- (.+?): written by profile/report.py -->(.*?)<!-- end of \1 -->", re.DOTALL)


def unsupported(text: str, root: Path) -> list[str]:
    """The numbers of `text` that no results file below `root` has, each with what surrounds it."""
    generated = [block for _, body in GENERATED.findall(text) for block in table_numbers(body, root)]
    prose = re.sub(r"```.*?```", "", GENERATED.sub("", text), flags=re.DOTALL)
    return generated + prose_numbers(re.sub("[*`]", "", prose), root)


def cells(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table_numbers(section: str, root: Path) -> list[str]:
    """Of a generated section: those that are not in the file below their table, word by word."""
    found = []
    for table, caption in re.findall(r"((?:^\|.*\n)+)\n(.*\.csv`.*)$", section, re.MULTILINE):
        (name,) = re.findall(r"`(\S+\.csv)`", caption)
        values = {value for row in cells(root / name) for value in row.values()}
        words = {word for value in values for word in numeric_words(value)}
        _, _, *lines = table.splitlines()
        for cell in (cell.strip() for line in lines for cell in line.strip("|").split(" | ")):
            if cell not in values:
                found += [f"{number} in {cell}" for number in re.findall(NUMBER, cell) if number not in values]
        found += [f"{word} in {caption}" for word in numeric_words(caption.replace(name, "")) if word not in words]
    if section.count("|---") and not re.search(r"\.csv`", section):
        found.append("a table that names no file")
    return found


def numeric_words(text: str) -> list[str]:
    """'numpy 2.4.6; 54 samples' -> ['2.4.6', '54']."""
    return [word.strip(".") for word in re.findall(r"[\w.+-]*\d[\w.+-]*", text)]


def prose_numbers(prose: str, root: Path) -> list[str]:
    """Outside the generated sections: claims whose number no results file has in a column of their unit."""
    rows = [row for path in sorted(root.glob("profile/results/*/*.csv")) for row in cells(path)]
    found = []
    for claim in CLAIM.finditer(prose):
        unit = SAME.get(claim[2], claim[2])
        known = {row[column] for row in rows for column in COLUMNS_OF.get(unit, ()) if row.get(column)}
        known |= {row["value"] for row in rows if row.get("unit") == unit}
        numbers = (number.rstrip(",").replace(",", "") for number in re.findall(NUMBER, claim[1]))
        found += [f"{number} in {claim[0]}" for number in numbers if number not in known]
    return found
