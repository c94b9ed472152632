"""The plot of ladder.csv: see report_plots.py for the others."""

import math

import numpy as np
from report_style import grid, legend, look, plain_ticks, rung_look
from result_files import Results, number

KINDS = {"plain": "array code", "fused": "fused kernels", "fused, CUDA graph": "fused, CUDA graph"}  # in the legend


def ladder(results: Results):
    """A bar per rung on a logarithmic axis, its time and speed-up beside it, and where it was predicted to end."""
    rows = results["ladder.csv"]
    figure, (axes,) = grid(1, 1, 9.5, 0.42 * len(rows) + 0.5)
    times, predicted = ([number(row, column) for row in rows] for column in ("p50_us", "predicted_us"))
    first = next((k for k, row in enumerate(rows) if not row["gain"]), len(rows))  # that is no rung
    places = [k + (0.4 if k >= first else 0.0) for k in range(len(rows))]
    left = 0.6 * min(time for time in (*times, *predicted) if not math.isnan(time))
    for place, row, time in zip(places, rows, times):
        name = rung_look(row["rung"])
        axes.barh(place, time - left, 0.68, left, color=look(name)[0], label=KINDS.get(name))
        axes.plot([number(row, "p20_us"), number(row, "p80_us")], [place, place], color="black", linewidth=1)
        end = np.nanmax([number(row, "p80_us"), number(row, "predicted_us")])
        text = f"{row['p50_us']} µs" + (f"   {row['speedup']}×" if row is not rows[0] else "")
        axes.annotate(text, (end, place), (8, 0), textcoords="offset points", va="center_baseline", fontsize=8.5)
    axes.plot(predicted, places, linestyle="none", marker="D", markersize=6, markerfacecolor="white",
              markeredgecolor="black", label="predicted")  # fmt: skip
    named = [row["rung"].lower() == row["precision"] for row in rows]  # by their precision
    axes.set_yticks(places, [row["rung"] + ("" if by else f"  ({row['precision']})") for row, by in zip(rows, named)])
    axes.set_ylim(places[-1] + 0.6, -0.6)
    axes.set_xscale("log")
    right = max(np.nanmax(predicted), *times)
    axes.set_xlim(left, right * (right / left) ** 0.3)  # room for the numbers
    plain_ticks(axes.xaxis, (1, 2, 5))
    axes.set_xlabel("µs per training step (median; line: 20th to 80th percentile)")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    legend(figure, [axes])
    return figure
