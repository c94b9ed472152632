"""The plots of a folder of results, and which results each of them needs."""

import hashlib
import json
import math
from pathlib import Path

import ladder_plot
import numpy as np
from phase_clock import PHASES
from result_files import InputError, Results, Row, machine, made, number, unique
from report_style import PAPER, binary, curve, grid, legend, look, plain_ticks

PHASE_COLOURS = ("#fde725", "#7ad151", "#22a884", "#2a788e", "#414487", "#bbbbbb")  # viridis; the rest in grey
SMALL = 2**20  # bytes: the second panel of kernels.png
SWEPT = {"batch": "batch (images)", "width": "width of every hidden layer"}


def kernels(results: Results):
    """Speed-up over plain by op, on a logarithmic axis; the line across a group is that of a copy of the op's bytes."""
    rows = results["kernels.csv"]
    ops, names = unique(rows, "op"), [name for name in unique(rows, "contender") if name not in ("plain", "copy")]
    largest = max(number(row, "size") for row in rows)
    small = min((number(row, "size") for row in rows), key=lambda size: abs(math.log2(size / SMALL)))
    sizes = [largest, small] if small < largest else [largest]
    figure, panels = grid(len(sizes), 2, 5.5, len(ops) * (0.13 * len(names) + 0.16), sharey=True, sharex=True)
    y = np.arange(len(ops))
    for axes, size in zip(panels, sizes):
        found = {(row["op"], row["contender"]): number(row, "speedup") for row in rows if number(row, "size") == size}
        for place, op in zip(y, ops):
            here = [name for name in names if (op, name) in found]
            for k, name in enumerate(here):
                _speedup_bar(axes, place + 0.8 * ((k + 0.5) / len(here) - 0.5), 0.72 / len(here), name, found[op, name])
        ceilings = [found.get((op, "copy"), math.nan) for op in ops]
        axes.vlines(ceilings, y - 0.44, y + 0.44, color=look("copy")[0], linewidth=2, label="copy of the same bytes")
        axes.axvline(1, color=look("plain")[0], linewidth=1, label="plain")
        axes.set_yticks(y, ops)
        axes.set_ylim(len(ops) - 0.5, -0.5)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,.10g}")
        axes.margins(x=0.12)  # room for the numbers
        axes.set_title(f"{binary(size)} moved", fontsize=10)
        axes.set_xlabel("speed-up over plain (×)")
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    legend(figure, panels)
    return figure


def _speedup_bar(axes, place: float, height: float, name: str, speedup: float) -> None:
    """A bar from plain, 1, to the speed-up, which is written beside its end."""
    if math.isnan(speedup):
        axes.annotate(f"{name}: not measured", (1, place), (3, 0), textcoords="offset points",
                      va="center_baseline", fontsize=6)  # fmt: skip
        return
    axes.barh(place, speedup - 1, height, left=1, color=look(name)[0], label=name)
    right = speedup >= 1
    axes.annotate(f"{speedup:#.3g}", (speedup, place), (3 if right else -3, 0), textcoords="offset points",
                  ha="left" if right else "right", va="center_baseline", fontsize=6.5, bbox=PAPER)  # fmt: skip


def bandwidth(results: Results):
    """GB/s of the bytes that must move, by size: the median, and a band from the 20th to the 80th percentile."""
    rows = results["kernels.csv"]
    ops, sizes, columns = unique(rows, "op"), sorted({number(row, "size") for row in rows}), 4
    ticks = sizes[:: math.ceil(len(sizes) / 4)]
    figure, panels = grid(len(ops), columns, 3.1, 2.3, sharex=True, sharey=True)
    for place, (axes, op) in enumerate(zip(panels, ops)):
        for name in unique(rows, "contender"):
            mine = [row for row in rows if (row["op"], row["contender"]) == (op, name)]
            curve(axes, name, mine, "size", "gb_per_s", "us")
        axes.set_title(op, fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [binary(size) for size in ticks], fontsize=8)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if place % columns == 0:
            axes.set_ylabel("GB/s")
        if place + columns >= len(ops):  # nothing below it
            axes.set_xlabel("bytes moved")
            axes.tick_params(labelbottom=True)
    legend(figure, panels)
    return figure


def case_of(row: Row) -> tuple[str, str, str]:
    return row["model"], row["batch"], row["precision"]


def step(results: Results):
    """A step's time stacked by phase; the line is the time of its matrix products and nothing else."""
    rows = results["phases.csv"]
    strange = set(unique(rows, "phase")) - set(PHASES)
    if strange:
        raise InputError(f"phases.csv has the phase {min(strange)}; expected one of {', '.join(PHASES)}")
    cases, contenders = unique(rows, "model", "batch", "precision"), unique(rows, "contender")
    y = np.arange(len(contenders))
    figure, panels = grid(len(cases), 2, 5.2, 0.4 * len(contenders) + 1.0, sharey=True)
    for axes, case in zip(panels, cases):
        here, left = [row for row in rows if case_of(row) == case], np.zeros(len(contenders))
        for phase, colour in zip(PHASES, PHASE_COLOURS):
            times = {row["contender"]: number(row, "p50_ms") for row in here if row["phase"] == phase}
            width = np.array([times.get(name, 0.0) for name in contenders])
            axes.barh(y, width, 0.7, left, color=colour, edgecolor="white", linewidth=0.5, label=phase)
            left += width
        products = [number(row, "p50_ms") for row in results.get("step.csv", ())
                    if row["contender"].startswith("GEMMs alone") and case_of(row) == case]  # fmt: skip
        if products:
            axes.axvline(min(products), color=look("GEMMs alone")[0], linewidth=1.2, label="GEMMs alone")
        for place, total in zip(y, left):
            text = f"{total:.3f}" if total else "not measured"
            axes.annotate(text, (total, place), (3, 0), textcoords="offset points", va="center", fontsize=8, bbox=PAPER)
        axes.set_yticks(y, contenders)
        axes.set_ylim(len(contenders) - 0.5, -0.5)
        axes.set_xlim(0, 1.18 * left.max())
        axes.set_title("{}, batch {}, {}".format(*case), fontsize=10)
        axes.set_xlabel("ms per step (sum of the phases' medians)")
    legend(figure, panels)
    return figure


def panel_of(row: Row) -> tuple[str, str, str, str]:
    """What is the same in a panel of a sweep."""
    fixed = row["layers"] if row["sweep"] == "batch" else f"batch {row['batch']}"
    return row["model"], row["precision"], row["sweep"], fixed


def sweep_figure(rows: list[Row], height: float):
    """A figure, and for each panel its axes, the column that varies and the rows of each contender."""
    strange = set(unique(rows, "sweep")) - set(SWEPT)
    if strange:
        raise InputError(f"sweep.csv has the sweep {min(strange)}; expected one of {', '.join(SWEPT)}")
    cases = sorted(set(map(panel_of, rows)))
    figure, panels = grid(len(cases), 2, 5.8, height)
    parts = []
    for axes, case in zip(panels, cases):
        model, precision, sweep, fixed = case
        here = sorted((row for row in rows if panel_of(row) == case), key=lambda row: number(row, row["sweep"]))
        axes.set_title(f"{model}, {fixed}, {precision}", fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        parts.append((axes, sweep, {name: [row for row in here if row["contender"] == name]
                                    for name in unique(here, "contender")}))  # fmt: skip
    return figure, parts


def scaling(results: Results):
    """Images per second against what is swept, with a band from the 20th to the 80th percentile."""
    figure, parts = sweep_figure(results["sweep.csv"], 3.8)
    for axes, sweep, contenders in parts:
        for name, rows in contenders.items():
            curve(axes, name, rows, sweep, "images_per_second", "ms")
        axes.set_xlabel(SWEPT[sweep])
        ticks = sorted({number(row, sweep) for rows in contenders.values() for row in rows})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
        plain_ticks(axes.yaxis, (1, 2, 5))
        axes.set_ylabel("images/s")
    legend(figure, [axes for axes, _, _ in parts])
    return figure


def roofline(results: Results):
    """GFLOP/s against flop per byte of a step that does and moves the least, under the measured ceilings."""
    figure, parts = sweep_figure(results["sweep.csv"], 4.6)
    for axes, sweep, contenders in parts:
        names = {}  # of the points with this intensity
        for name, rows in contenders.items():
            intensity = [number(row, "flops") / number(row, "bytes") for row in rows]
            names |= dict(zip(intensity, (row[sweep] for row in rows)))
            colour, marker = look(name)
            axes.plot(intensity, [number(row, "gflop_per_s") for row in rows], color=colour, marker=marker,
                      markersize=5, linewidth=0.7, label=name)  # fmt: skip
        ceilings(axes, results["ceilings.csv"], rows[0]["precision"])
        spaced = apart(names, axes.get_xlim())
        top = axes.secondary_xaxis("top")
        top.set_xticks(spaced, [names[x] for x in spaced], fontsize=7, rotation=90)
        top.minorticks_off()
        top.set_xlabel(SWEPT[sweep], fontsize=8)
        for x in names:
            axes.axvline(x, color="grey", linewidth=0.4, zorder=0)
        plain_ticks(axes.yaxis, (1, 2, 5))
        axes.xaxis.set_major_formatter("{x:,.10g}")
        axes.set_xlabel("intensity (flop/byte)")
        axes.set_ylabel("GFLOP/s")
    legend(figure, [axes for axes, _, _ in parts])
    return figure


def apart(values, limits: tuple[float, float]) -> list[float]:
    """Those of `values` whose labels do not touch on a logarithmic axis, the largest first."""
    kept = []
    for value in sorted(values, reverse=True):
        if not kept or math.log(kept[-1] / value) > 0.025 * math.log(limits[1] / limits[0]):
            kept.append(value)
    return kept


def ceilings(axes, rows: list[Row], precision: str) -> None:
    """The largest measured bandwidth as a slope, the largest rate of a matrix product as a horizontal."""
    slopes = [row for row in rows if row["unit"] == "GB/s"]
    roofs = [row for row in rows if row["unit"] == "GFLOP/s" and row["precision"] == precision]
    if not slopes or not roofs:
        raise InputError(f"ceilings.csv needs a value in GB/s, and one of {precision} in GFLOP/s")
    slope, roof = (max(ceiling, key=lambda row: number(row, "value")) for ceiling in (slopes, roofs))
    fastest, highest = number(slope, "value"), number(roof, "value")
    low, high = axes.get_xlim()
    low, high = min(low, highest / fastest / 3), max(high, highest / fastest * 1.5)
    axes.set_xlim(low, high)
    bottom, top = min(axes.get_ylim()[0], fastest * low), 2 * highest
    axes.set_ylim(bottom, top)
    clear = (top / bottom) ** 0.03  # between a slope and its name
    axes.plot([low, highest / fastest, high], [fastest * low, highest, highest], color="black", linewidth=1.2)
    axes.annotate(f"{roof['name']}: {roof['value']} GFLOP/s", (high, highest), (-3, 3), textcoords="offset points",
                  ha="right", fontsize=8)  # fmt: skip
    axes.text(1.05 * low, clear * fastest * 1.05 * low, f"{slope['name']}: {slope['value']} GB/s", fontsize=8,
              rotation_mode="anchor", rotation=math.degrees(math.atan(fastest)),
              transform_rotates_text=True)  # fmt: skip


PLOTS = {  # file: (function, results files that it needs)
    "kernels.png": (kernels, ("kernels.csv",)),
    "bandwidth.png": (bandwidth, ("kernels.csv",)),
    "step.png": (step, ("phases.csv",)),
    "scaling.png": (scaling, ("sweep.csv",)),
    "roofline.png": (roofline, ("sweep.csv", "ceilings.csv")),
    "ladder.png": (ladder_plot.ladder, ("ladder.csv",)),
}


def possible(results: Results) -> list[str]:
    """The plots that these results are enough for."""
    return [name for name, (_, needed) in PLOTS.items() if all(file in results for file in needed)]


def digest(results: Results) -> str:
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()


def draw(folder: Path, results: Results) -> None:
    """Write every possible plot beside the results, with their digest inside."""
    rows = [row for rows in results.values() for row in rows]
    for name in possible(results):
        figure = PLOTS[name][0](results)
        figure.suptitle(f"{machine(rows[0])}; {made(rows)}", fontsize=10)
        figure.savefig(folder / name, dpi=120, metadata={"Results": digest(results)})
        print(f"written: {folder / name}")


def current(path: Path, results: Results) -> bool:
    """Whether draw() wrote this plot from these results."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.info.get("Results") == digest(results)
    except OSError:
        return False
