"""From the result files to plots and to the tables of README.md.

    python profile/report.py                  # every folder of profile/results: check, draw, rewrite README.md
    python profile/report.py FOLDER           # only draw the plots of that folder, wherever it is
    python profile/report.py --check          # exit 1 if README.md or a plot differs from the results; writes nothing
    python profile/report.py --compare A B    # exit 1 if a ratio of two runs differs by more than 10 %

Exits with 2, and one sentence, for results that are not those of one run on one machine; see result_files.py.
"""

import argparse
import sys
from pathlib import Path

import report_plots
from result_files import COLUMNS, RATIOS, InputError, Results, Row
from result_files import has_results, key, machine, made, number, read, unique

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "profile" / "results"
TOLERANCE = 1.10
ALT = {
    "kernels.png": "Speed-up of every op over plain array code, and the speed-up that a copy of its bytes would be",
    "bandwidth.png": "Bandwidth of every op against the bytes that it moves",
    "step.png": "Time of a training step by phase",
    "scaling.png": "Images per second against the batch and against the width of the hidden layers",
    "ladder.png": "Time of a training step, one change after another, and what was predicted",
    "roofline.png": "Arithmetic rate of training steps against their intensity, under the measured ceilings",
}


def spread(row: Row, unit: str) -> str:
    """The median in bold with its 20th and 80th percentile; a dash where nothing was measured."""
    p20, p50, p80 = (row[f"{p}_{unit}"] for p in ("p20", "p50", "p80"))
    return f"**{p50}** ({p20}–{p80})" if p50 else "–"


def step_table(rows: list[Row]) -> tuple[list, list[Row]]:
    """Lines of cells, the header first, and the rows that they show; so do the other tables."""
    table = [("model", "batch", "precision", "contender", "ms/step (p20–p80)", "× GEMMs alone", "× plain's speed",
              "images/s")]  # fmt: skip
    for row in rows:
        table.append((row["model"], row["batch"], row["precision"], row["contender"], spread(row, "ms"),
                      row["to_gemm"], row["speedup"], row["images_per_second"]))  # fmt: skip
    return table, rows


def kernel_table(rows: list[Row]) -> tuple[list, list[Row]]:
    """Every op at the largest size that it was measured at."""
    contenders = [name for name in unique(rows, "contender") if name != "fused"]
    table = [("op", "shape", "bytes", "fused µs (p20–p80)", *(f"{name} µs" for name in contenders),
              "fused: × plain's speed", "fused: share of copy")]  # fmt: skip
    shown = []
    for op in unique(rows, "op"):
        of_op = [row for row in rows if row["op"] == op]
        largest = max(number(row, "size") for row in of_op)
        cells = {row["contender"]: row for row in of_op if number(row, "size") == largest}
        if "fused" not in cells:
            raise InputError(f"kernels.csv has no row of {op}, fused, {largest:.0f}; measure it again")
        fused = cells["fused"]
        others = (cells[name]["p50_us"] if name in cells else "" for name in contenders)
        table.append((op, fused["shape"], fused["bytes"], spread(fused, "us"), *(time or "–" for time in others),
                      fused["speedup"] or "–", fused["share_of_copy"] or "–"))  # fmt: skip
        shown += cells.values()
    return table, shown


def epoch_table(rows: list[Row]) -> tuple[list, list[Row]]:
    table = [("model", "batch", "precision", "contender", "data", "images", "s/epoch", "× plain's speed", "images/s")]
    for row in rows:
        table.append((row["model"], row["batch"], row["precision"], row["contender"], row["data"], row["images"],
                      f"**{row['seconds']}**", row["speedup"], row["images_per_second"]))  # fmt: skip
    return table, rows


def ladder_table(rows: list[Row]) -> tuple[list, list[Row]]:
    table = [("rung", "what changes", "precision", "launches", "µs/step (p20–p80)", "predicted µs", "bound by",
              "× plain's speed", "× the speed before")]  # fmt: skip
    for row in rows:
        cells = (row[column] or "–" for column in ("predicted_us", "bound", "speedup", "gain"))
        table.append((row["rung"], row["what"], row["precision"], row["launches"] or "–", spread(row, "us"), *cells))
    return table, rows


def torture_table(rows: list[Row]) -> tuple[list, list[Row]]:
    columns = ("kills", "resumes", "inputs", "executions", "losses")
    table = [("trial", *columns)]
    for row in rows:
        table.append((row["trial"], *(row[column] or "–" for column in columns)))
    return table, rows


TABLES = {  # name: (file, its table, the plots below it)
    "ladder table": ("ladder.csv", ladder_table, ("ladder.png",)),
    "step table": ("step.csv", step_table, ("step.png", "scaling.png", "roofline.png")),
    "kernel table": ("kernels.csv", kernel_table, ("kernels.png", "bandwidth.png")),
    "epoch table": ("epoch.csv", epoch_table, ()),
    "torture table": ("torture.csv", torture_table, ()),
}


def caption(path: Path, rows: list[Row]) -> str:
    """What the table was measured on; why a contender has no time."""
    samples = sorted({int(number(row, "samples")) for row in rows if row.get("samples")})
    n = "–".join(map(str, samples[:1] + samples[1:][-1:]))
    each = f"; {n} samples each" if samples else ""
    text = f"{machine(rows[0])}, {rows[0]['versions']}{each}; {made(rows)}. `{path.as_posix()}`"
    return "\n\n".join([text, *notes([row for row in rows if row.get("note")], rows)])


def notes(noted: list[Row], rows: list[Row]):
    """A sentence per contender and note: which ops have it, if not all; and of the ladder, per note: which rungs."""
    if noted and "rung" in noted[0]:
        for note in unique(noted, "note"):
            yield f"{', '.join(unique([row for row in noted if row['note'] == note], 'rung'))}: {note}."
        return
    for contender, note in unique(noted, "contender", "note"):
        ops = [row["op"] for row in noted if (row["contender"], row["note"]) == (contender, note)]
        everywhere = len(ops) == len(unique(rows, "op"))
        yield f"{contender}: {note}" + ("." if everywhere else f" ({', '.join(ops)}).")


def costs(rows: list[Row]) -> str:
    """What the ladder's predictions were made of."""
    cells = (f"{row['name']} {row['value']} {row['unit'].replace('us', 'µs')}" for row in rows)
    return f"Predicted from, in the same run: {'; '.join(cells)}."


def section(name: str, everything: dict[Path, Results]) -> str:
    """The text between the markers of one table: for every machine the table, the caption and the plots."""
    file, table, pictures = TABLES[name]
    parts = []
    for folder, results in everything.items():
        place = folder.relative_to(README.parent)
        if file in results:
            (header, *lines), shown = table(results[file])
            cells = [header, ["---"] * len(header), *lines]
            parts += ["\n".join(f"| {' | '.join(line)} |" for line in cells), caption(place / file, shown)]
            if file == "ladder.csv" and "costs.csv" in results:
                parts.append(costs(results["costs.csv"]))
        drawn = [picture for picture in pictures if picture in report_plots.possible(results)]
        on = machine(next(iter(results.values()))[0])
        parts += [f"![{ALT[picture]}: {on}]({(place / picture).as_posix()})" for picture in drawn]
    return "\n\n".join(parts) or "not measured yet"


def render(text: str, everything: dict[Path, Results]) -> str:
    """README.md with the text between its markers replaced."""
    for name in TABLES:
        begin, end = f"<!-- {name}: written by profile/report.py -->", f"<!-- end of {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
            raise InputError(f"{README} must have the markers of the {name} once, {begin} and then {end}")
        before, after = text.partition(begin)[0], text.partition(end)[2]
        text = f"{before}{begin}\n\n{section(name, everything)}\n\n{end}{after}"
    return text


def check(text: str, fresh: str, everything: dict[Path, Results]) -> int:
    """1, and a sentence for each difference, where README.md or a plot is not that of the results."""
    stale = [
        f"{folder / name} was not drawn from the results"
        for folder, results in everything.items()
        for name in report_plots.possible(results)
        if not report_plots.current(folder / name, results)
    ]
    if fresh != text:
        stale.insert(0, f"{README} differs from the results")
    for sentence in stale:
        print(f"{sentence}; run python profile/report.py", file=sys.stderr)
    return int(bool(stale))


def compare(a: Results, b: Results) -> int:
    """Print the ratios that differ by more than TOLERANCE between two runs; 1 if there are any."""
    ratios = [
        {(name, *key(row), column): number(row, column)
         for name, rows in results.items() for row in rows for column in RATIOS if row.get(column)}
        for results in (a, b)
    ]  # fmt: skip
    common = [name for name in ratios[0] if name in ratios[1]]
    if not common:
        raise InputError("the two runs have no ratio in common; compare runs that measured the same")
    for label, results in zip("AB", (a, b)):
        rows = next(iter(results.values()))
        print(f"{label}: {machine(rows[0])}, {made(rows)}")
    differing = 0
    for name in common:
        low, high = sorted((ratios[0][name], ratios[1][name]))
        if not high <= TOLERANCE * low:
            differing += 1
            print(f"{', '.join(name)}: A {ratios[0][name]:.3f}, B {ratios[1][name]:.3f}, {high / low - 1:+.0%}")
    alone = len(ratios[0].keys() ^ ratios[1].keys())
    print(f"{len(common)} ratios compared, {differing} differ by more than {TOLERANCE - 1:.0%}"
          + (f"; {alone} are in one run only" if alone else ""))  # fmt: skip
    return int(differing > 0)


def report(args) -> int:
    if args.compare:
        return compare(*map(read, args.compare))
    if args.folder:
        report_plots.draw(args.folder, read(args.folder))
        return 0
    folders = sorted(folder for folder in RESULTS.glob("*") if has_results(folder))
    everything = {folder: read(folder) for folder in folders}
    text = README.read_text(encoding="utf-8")
    fresh = render(text, everything)
    if args.check:
        return check(text, fresh, everything)
    for folder, results in everything.items():
        report_plots.draw(folder, results)
    README.write_text(fresh, encoding="utf-8")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("folder", nargs="?", type=Path, help=f"a folder with some of {', '.join(COLUMNS)}")
    what.add_argument("--check", action="store_true")
    what.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"))
    try:
        return report(parser.parse_args(arguments))
    except (InputError, OSError) as error:  # OSError: a file that cannot be written
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
