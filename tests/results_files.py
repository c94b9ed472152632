"""Result files as the measuring scripts write them, with invented values, for the tests of profile/report.py."""

import csv
from itertools import product
from pathlib import Path

CPU = {"device": "Invented CPU", "cores": 2, "driver": "", "versions": "python 3.11.7, numpy 2.4.6",
       "date": "2026-01-31", "revision": "0123456789ab"}  # fmt: skip
GPU = CPU | {"device": "Invented GPU", "cores": 16, "driver": "570.86", "versions": "python 3.11.7, cupy 14.2.0"}
OPS = {  # op: (passes over memory of plain, of torch eager), against 2 of a copy
    "bias_act relu": (6, 4), "bias_act silu": (11, 4), "bias_act gelu": (22, 4), "bias_act_backward relu": (9, 6),
    "bias_act_backward silu": (20, 6), "bias_act_backward gelu": (30, 6), "softmax_cross_entropy": (14, 9),
    "adam_step": (24, 5), "sgd_step": (7, 4), "gather_batch": (7, 6),
}  # fmt: skip
SPEED = {"plain": 1.9, "fused": 1.0, "torch eager, fused optimizer": 1.6, "torch.compile": 1.3,
         "torch CUDA graph, fused optimizer": 1.2, "fused, CUDA graph": 0.8}  # fmt: skip
SHARE = {"gather": 0.05, "forward": 0.33, "loss": 0.03, "backward": 0.45, "optimizer": 0.12, "rest": 0.02}
MODELS = {"m0": (784, 128, 64, 47), "m1": (784, 400, 240, 120, 47)}


def percentiles(value: float, unit: str) -> dict[str, str]:
    return {f"{p}_{unit}": f"{value * spread:.3f}" for p, spread in (("p20", 0.95), ("p50", 1.0), ("p80", 1.08))}


def kernels(gpu: bool):
    bandwidth, latency = (2.9e6, 3.0) if gpu else (2.2e4, 1.5)  # bytes/µs, µs
    for (op, (plain, torch)), power in product(OPS.items(), range(16, 31 if gpu else 27, 2)):
        size = 2**power
        passes = {"plain": plain, "fused": 2.15, "torch eager": torch, "copy": 2}
        passes |= {"cupy.fuse": 2.6, "ElementwiseKernel": 2.3, "torch.compile": 2.4} if gpu else {}
        fast = 1 if gpu else 1 + 2 / (1 + (size / 2**22) ** 2)  # what fits into a CPU's caches
        time = {name: latency + size * n / 2 / bandwidth / fast for name, n in passes.items()}
        for name in passes:
            row = {"op": op, "contender": name, "size": size, "shape": f"{size // 3200}x400", "dtype": "float32",
                   "bytes": size + 1600, "note": ""}  # fmt: skip
            if name == "ElementwiseKernel" and not op.startswith("bias_act "):
                yield row | {"note": "not a pointwise op"}
                continue
            yield row | percentiles(time[name], "us") | {
                "samples": 40, "gb_per_s": f"{(size + 1600) / time[name] / 1e3:.2f}",
                "share_of_copy": f"{time['copy'] / time[name]:.3f}", "speedup": f"{time['plain'] / time[name]:.3f}",
            }  # fmt: skip


def work(layers, batch):
    """Flops and bytes of a step."""
    weights = sum(a * b for a, b in zip(layers, layers[1:]))
    return 6 * batch * weights, 28 * weights + batch * (784 + 20 * sum(layers))


def gemms_ms(layers, batch, gpu, precision):
    flops, moved = work(layers, batch)
    rate, latency = ((4e10 if precision == "float32" else 2e11), 0.04) if gpu else (2e8, 0.05)  # flops/ms, ms
    return latency + flops / rate + moved / (3e9 if gpu else 2e7)


def steps(gpu: bool, models, batches):
    """(row without times, contender, milliseconds of its matrix products)."""
    names = list(SPEED) if gpu else list(SPEED)[:3]
    for model, batch, precision in product(models, batches, ("float32", "tf32") if gpu else ("float32",)):
        layers = MODELS[model]
        row = {"model": model, "layers": "-".join(map(str, layers)), "batch": batch, "precision": precision}
        for name in names:
            yield row | {"contender": name}, gemms_ms(layers, batch, gpu, precision)


def step(gpu: bool):
    extra = {"GEMMs alone": 1 / 1.2, "fused, NVTX ranges attached": 1.01}
    extra |= {} if gpu else {"GEMMs alone, shared threads": 1.01 / 1.2}
    for row, products in steps(gpu, MODELS, (256, 512)):
        for name, factor in ({"fused": 1.0} | extra if row["contender"] == "fused" else
                             {row["contender"]: SPEED[row["contender"]]}).items():  # fmt: skip
            ms = 1.2 * products * factor
            yield row | percentiles(ms, "ms") | {
                "contender": name, "samples": 54, "to_gemm": f"{1.2 * factor:.3f}",
                "speedup": f"{SPEED['plain'] / factor:.3f}", "images_per_second": f"{1e3 * row['batch'] / ms:.0f}",
            }  # fmt: skip


def phases(gpu: bool):
    for row, products in steps(gpu, MODELS, (256, 512)):
        for phase, share in SHARE.items():
            ms = 1.2 * products * SPEED[row["contender"]] * share
            yield row | {"phase": phase, "samples": 54} | percentiles(ms, "ms")


def epoch(gpu: bool):
    for row, products in steps(gpu, ("m1",), (512,)):
        seconds = 1107 * 1.2e-3 * products * SPEED[row["contender"]]
        yield row | {"data": "synthetic bytes", "images": 566667, "samples": 3, "seconds": f"{seconds:.3f}",
                     "images_per_second": f"{566667 / seconds:.0f}",
                     "speedup": f"{SPEED['plain'] / SPEED[row['contender']]:.3f}"}  # fmt: skip


def sweep(gpu: bool):
    def rows(kind, layers, batch, width, precision):
        flops, moved = work(layers, batch)
        for name in list(SPEED) if gpu else list(SPEED)[:3]:
            ms = 1.2 * gemms_ms(layers, batch, gpu, precision) * SPEED[name]
            yield {"sweep": kind, "contender": name, "model": "m1", "layers": "-".join(map(str, layers)),
                   "batch": batch, "width": width, "precision": precision, "samples": 20, "flops": flops,
                   "bytes": moved, "gflop_per_s": f"{flops / ms / 1e6:.2f}",
                   "images_per_second": f"{1e3 * batch / ms:.0f}"} | percentiles(ms, "ms")  # fmt: skip

    for precision in ("float32", "tf32") if gpu else ("float32",):
        for power in range(4, 15 if gpu else 13):
            yield from rows("batch", MODELS["m1"], 2**power, "", precision)
        for power in range(6, 13 if gpu else 12):
            yield from rows("width", (784, *3 * (2**power,), 47), 512, 2**power, precision)


def ceilings(gpu: bool):
    yield {"name": "matrix product 8192" if gpu else "matrix product 2048", "precision": "float32",
           "value": 51234.5 if gpu else 210.3, "unit": "GFLOP/s"}  # fmt: skip
    if gpu:
        yield {"name": "matrix product 8192", "precision": "tf32", "value": 389012.3, "unit": "GFLOP/s"}
    yield {"name": "copy 1 GiB" if gpu else "copy 64 MiB", "precision": "float32",
           "value": 2931.4 if gpu else 21.2, "unit": "GB/s"}  # fmt: skip


LADDER = {  # rung: (precision, launches, factor of the products' time in float32, kind of its cost)
    "plain": ("float32", 171, 11.0, "launches"), "arena Adam": ("float32", 80, 6.0, "launches"),
    "resident data": ("float32", 89, 4.4, "launches"), "fused ops": ("float32", 23, 2.1, "launches"),
    "graph": ("float32", 23, 1.3, "flops"), "graph, 16 steps per launch": ("float32", 23, 1.15, "flops"),
    "TF32": ("tf32", 23, 0.52, "nodes"), "epilogues": ("tf32", 16, 0.4, "nodes"),
    "own GEMM": ("tf32", 16, 0.35, "nodes"), "bf16": ("bf16", 25, 0.47, "nodes"),
    "torch eager, fused optimizer": ("float32", "", 4.0, ""),
    "torch CUDA graph, fused optimizer": ("float32", "", 1.9, ""),
}  # fmt: skip
ON_CPU = ("plain", "arena Adam", "fused ops", "torch eager, fused optimizer")


def ladder(gpu: bool):
    unit, before = 1e3 * gemms_ms(MODELS["m1"], 512, gpu, "float32"), None
    for rung in LADDER if gpu else ON_CPU:
        precision, launches, factor, bound = LADDER[rung]
        factor = factor if gpu else 1 + factor / 20
        row = {"rung": rung, "what": f"the change of {rung}", "precision": precision, "samples": 10,
               "speedup": f"{(11.0 if gpu else 1.55) / factor:.3f}", "note": ""}  # fmt: skip
        row |= percentiles(unit * factor, "us")
        if not launches:
            yield row | {"note": "not a rung; its launches are not counted"}
            continue
        before = before or factor
        yield row | {
            "launches": launches, "bytes": 39027460, "flops": 1042964480, "predicted_us": f"{unit * factor * 0.8:.3f}",
            "bound": bound, "gain": f"{before / factor:.3f}", "note": "all separate" if rung == "epilogues" else "",
        }  # fmt: skip
        before = factor


def costs(gpu: bool):
    yield {"name": "launch", "value": 3.71 if gpu else 0.53, "unit": "us"}
    yield {"name": "matrix product 2048, float32", "value": 201.4, "unit": "GFLOP/s"}


def launches(gpu: bool):
    for power in range(7):
        yield {"contender": "graph", "precision": "float32", "steps": 2**power, "samples": 10} | (
            percentiles(60 + 8 / 2**power, "us"))  # fmt: skip


def torture(gpu: bool):
    empty = dict.fromkeys(("kills", "resumes", "inputs", "executions"), "")
    yield {"trial": "kill -9: m1"} | empty | {"kills": 50, "resumes": 48, "losses": 0}
    yield {"trial": "fuzz: idx reader"} | empty | {"executions": 31234, "losses": 0}


FUNCTIONS = (kernels, step, phases, epoch, sweep, ceilings, ladder, costs, launches, torture)
FILES = {f"{function.__name__}.csv": function for function in FUNCTIONS}


def write(folder: Path, gpu: bool = False, files=tuple(FILES), **machine) -> Path:
    """Write `files` for a CPU or a GPU into a new folder; `machine` replaces values of its last columns."""
    folder.mkdir(parents=True)
    for name in files:
        rows = [row | (GPU if gpu else CPU) | machine for row in FILES[name](gpu)]
        with open(folder / name, "w", newline="") as file:
            writer = csv.DictWriter(file, max(rows, key=len))  # a row that could not be measured has fewer columns
            writer.writeheader()
            writer.writerows(rows)
    return folder
