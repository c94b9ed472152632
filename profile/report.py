"""Write the tables of README.md from committed result files.

    python profile/report.py            # rewrite README.md
    python profile/report.py --check    # exit 1 if README.md differs from the results
"""

import argparse
import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "profile" / "results"
BEGIN, END = "<!-- step table: written by profile/report.py -->", "<!-- end of step table -->"


def step_table(path: Path) -> str:
    """The Markdown table of one step.csv, with what it was measured on."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for column in ("device", "cores", "versions", "date", "revision", "samples"):
        if len({row[column] for row in rows}) != 1:
            raise SystemExit(f"error: {path} mixes several values of {column}; measure it again in one run")
    first = rows[0]
    header = ("model", "batch", "contender", "ms/step (p20–p80)", "× GEMMs alone", "images/s")
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['batch']} | {row['contender']} | **{row['p50_ms']}** "
            f"({row['p20_ms']}–{row['p80_ms']}) | {row['to_gemm']} | {row['images_per_second']} |"
        )
    lines += ["", f"{first['device']}, {first['cores']} cores, {first['versions']}; {first['samples']} samples of 10 "
              f"steps each; {first['date']}, revision {first['revision']}. "
              f"`{path.relative_to(ROOT).as_posix()}`"]  # fmt: skip
    return "\n".join(lines)


def render(text: str) -> str:
    """README.md with the text between its markers replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"error: {README} has lost the markers of the step table; put them back")
    tables = [step_table(path) for path in sorted(RESULTS.glob("*/step.csv"))]
    return before + BEGIN + "\n\n" + "\n\n".join(tables) + "\n\n" + END + after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = README.read_text()
    fresh = render(text)
    if args.check:
        return int(fresh != text)
    README.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
