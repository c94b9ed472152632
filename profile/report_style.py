"""The look of the plots of results: a contender has the same colour and marker in all of them."""

import math

import numpy as np
from result_files import InputError, Row, number

from mlp.plots import new_figure

LOOK = {  # colours of Okabe and Ito (2008), which colour-blind readers tell apart; markers for everybody
    "plain": ("#7f7f7f", "s"),
    "fused": ("#d55e00", "o"),
    "fused, CUDA graph": ("#e69f00", "D"),
    "fused, NVTX ranges attached": ("#f0e442", "h"),
    "torch eager": ("#0072b2", "^"),
    "torch eager, fused optimizer": ("#0072b2", "^"),
    "torch fused optimizer": ("#332288", "<"),
    "torch.compile": ("#56b4e9", "v"),
    "torch.compile, fused optimizer": ("#56b4e9", "v"),
    "torch CUDA graph, fused optimizer": ("#332288", "<"),
    "cupy.fuse": ("#009e73", "P"),
    "ElementwiseKernel": ("#cc79a7", "X"),
    "copy": ("#000000", "."),
    "GEMMs alone": ("#000000", "."),
    "GEMMs alone, shared threads": ("#4d4d4d", "x"),
    "GEMMs alone, torch CUDA graph": ("#4d4d4d", "+"),
}
# The rungs of ladder.csv, by the name before the comma: array code, fused ops, graphs of them; torch's have a LOOK.
RUNGS = dict.fromkeys(("plain", "arena Adam", "resident data"), "plain") | {"fused ops": "fused"}
RUNGS |= dict.fromkeys(("graph", "tuned", "TF32", "epilogues", "own GEMM", "bf16"), "fused, CUDA graph")
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}  # behind text that lies on lines


def look(contender: str) -> tuple[str, str]:
    if contender not in LOOK:
        raise InputError(f"the contender {contender} has no colour; give it one in LOOK of profile/report_style.py")
    return LOOK[contender]


def rung_look(rung: str) -> str:
    """The contender of LOOK whose colour a rung of the ladder has."""
    return RUNGS.get(rung.partition(",")[0], rung)


def binary(size: float) -> str:
    """67108864 -> '64 MiB'."""
    power = min(int(math.log2(size) // 10), 3)
    return f"{size / 1024**power:g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def grid(panels: int, columns: int, width: float, height: float, **shared):
    """A figure, and an axes for each panel."""
    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    figure = new_figure(figsize=(width * columns, height * rows + 0.9))
    axes = figure.subplots(rows, columns, squeeze=False, **shared).flatten()
    for unused in axes[panels:]:
        unused.remove()
    return figure, axes[:panels]


def legend(figure, axes) -> None:
    """One legend below all panels."""
    entries = {label: handle for one in axes for handle, label in zip(*one.get_legend_handles_labels())}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)


def curve(axes, name: str, rows: list[Row], x: str, y: str, unit: str) -> None:
    """A rate y against column x, with the band that the times p20_`unit` to p80_`unit` make of it."""
    colour, marker = look(name)
    rows = sorted(rows, key=lambda row: number(row, x))
    across, rates = [number(row, x) for row in rows], np.array([number(row, y) for row in rows])
    p20, p50, p80 = (np.array([number(row, f"{p}_{unit}") for row in rows]) for p in ("p20", "p50", "p80"))
    axes.plot(across, rates, color=colour, marker=marker, markersize=4, linewidth=1.3, label=name)
    axes.fill_between(across, rates * p50 / p80, rates * p50 / p20, color=colour, alpha=0.15, linewidth=0)


def plain_ticks(axis, subs) -> None:
    """50,000 in place of 5 × 10⁴."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    axis.set_minor_formatter(NullFormatter())
