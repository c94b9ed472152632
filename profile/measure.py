"""What the measuring scripts share: clocks, turns, CUDA graphs, the facts of the machine, and result files.

Contenders are timed in turns, because a shared machine changes its speed within seconds: a round gives every
contender one turn, a turn is a few blocks of calls, a sample is a block's mean. Percentiles are those of all
samples; a ratio of two contenders is the median over the rounds of the ratio within a round.
"""

import csv
import importlib.metadata
import itertools
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from result_files import COLUMNS  # noqa: E402

from kernels import host  # noqa: E402
from mlp.device import Device  # noqa: E402


@dataclass
class Contender:
    """`run(k)` makes call number k, which does the work `repeats` times. shared: on a CPU, NumPy's BLAS runs on the
    fused library's threads meanwhile, as it does wherever that library is used."""

    run: Callable[[int], object]
    shared: bool = False
    repeats: int = 1


def built(builders: dict[str, Callable[[], Contender]], what: str) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders that could be built, after a first call, and by name why the others could not: one that fails is
    reported and must not cost the others."""
    table, failed = {}, {}
    for name, build in builders.items():
        try:
            contender = build()
            contender.run(0)
            table[name] = contender
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            print(f"error: {what}, {name}: {failed[name]}", file=sys.stderr)
    return table, failed


def synchronize(device: Device) -> None:
    """Wait for all streams of a GPU; nothing on a CPU."""
    if device.kind == "cuda":
        device.xp.cuda.Device().synchronize()


def host_clock(device: Device):
    """clock(run, first, n): seconds that n calls take, until the device has done their work."""

    def clock(run, first, n):
        began = time.perf_counter()
        for k in range(first, first + n):
            run(k)
        synchronize(device)
        return time.perf_counter() - began

    return clock


def event_clock(stream):
    """The same by CUDA events around the calls on `stream`, without the time that the host takes to begin."""
    import cupy

    begin, end = cupy.cuda.Event(), cupy.cuda.Event()

    def clock(run, first, n):
        begin.record(stream)
        for k in range(first, first + n):
            run(k)
        end.record(stream)
        end.synchronize()
        return cupy.cuda.get_elapsed_time(begin, end) * 1e-3

    return clock


def in_turns(table: dict[str, Contender], clock, *, rounds, blocks, block, settle, rest=0.0) -> dict[str, np.ndarray]:
    """By contender: seconds per unit of work (rounds, blocks), every other round in reverse order.

    block: at least so many seconds per block. rest: seconds before each turn on a CPU, in which the threads of the
    others go to sleep; OpenBLAS's look for work for a tenth of a second. settle: untimed seconds of calls after it,
    which also tell how many calls make a block; without them it is one.
    """
    samples = {name: [] for name in table}
    on_cpu = any(c.shared for c in table.values())
    for turn_order in itertools.islice(itertools.cycle((list(table.items()), list(table.items())[::-1])), rounds):
        for name, contender in turn_order:
            if on_cpu:
                host.share_blas_threads(contender.shared)
                time.sleep(rest)
            spent, calls = 0.0, 0
            while spent < settle:
                spent += clock(contender.run, calls, 1)
                calls += 1
            n = max(1, round(block * calls / spent)) if calls else 1
            turn = []
            for _ in range(blocks):
                turn.append(clock(contender.run, calls, n) / (n * contender.repeats))
                calls += n
            samples[name].append(turn)
    return {name: np.array(turns) for name, turns in samples.items()}


def ratio(a: np.ndarray, b: np.ndarray) -> str:
    """How many times as long a takes as b, from samples (rounds, blocks) of the same rounds."""
    return significant(np.median(np.median(a, axis=1) / np.median(b, axis=1)))


def percentiles(samples: np.ndarray, unit: str) -> dict:
    """samples and p20, p50, p80 for a row of a result file; unit "us" or "ms"."""
    scale = {"us": 1e6, "ms": 1e3}[unit]
    columns = {f"p{q}_{unit}": significant(np.percentile(samples, q) * scale) for q in (20, 50, 80)}
    return {"samples": samples.size} | columns


def significant(value: float) -> str:
    """Four significant digits, never with an exponent."""
    return np.format_float_positional(value, precision=4, unique=False, fractional=False, trim="-")


def cupy_graph(launches, stream):
    """Capture the calls into a CUDA graph and return run(k), which launches it on `stream`.

    Each is called once before, so that everything is compiled and allocated. What they allocate lies in a pool of
    its own, which lives as long as the graph that keeps its addresses.
    """
    import cupy

    cupy.cuda.Device().synchronize()  # `stream` does not wait for the one that has filled the arrays
    pool = cupy.cuda.MemoryPool()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        for launch in launches:
            launch()
        stream.begin_capture()
        for launch in launches:
            launch()
        graph = stream.end_capture()
    graph.upload(stream)

    def run(_, pool=pool):  # holds the pool
        graph.launch(stream)

    return run


def torch_graph(launches, stream):
    """The same for torch, whose graphs have such a pool themselves."""
    import torch

    own = torch.cuda.ExternalStream(stream.ptr)
    torch.cuda.synchronize()
    with torch.cuda.stream(own):
        for launch in launches:
            launch()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=own):
        for launch in launches:
            launch()

    def run(_):
        with torch.cuda.stream(own):
            graph.replay()

    return run


def has_torch() -> bool:
    """Whether torch can be imported."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


def machine(name: str, kind: str, *sources: str) -> dict:
    """The last columns of every result file, for a device of this name, "cpu" or "cuda". Makes no CUDA context.

    A revision ends in + where the kernels, mlp or `sources` differ from the commit.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": name, "cores": cores, "driver": "" if kind == "cpu" else _driver(), "versions": _versions(),
        "date": date.today().isoformat(), "revision": _revision(["kernels", "mlp", "CMakeLists.txt", *sources]),
    }  # fmt: skip


def _driver() -> str:
    """The GPU's driver as nvidia-smi names it, with the CUDA version that it supports."""
    import cupy

    version = cupy.cuda.runtime.driverGetVersion()
    supports = f"CUDA {version // 1000}.{version % 1000 // 10}"
    name = last_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return f"{name} ({supports})" if name else supports


def _versions() -> str:
    packages = {"cupy-cuda12x", "cupy-cuda13x", "cupy", "numpy", "nvtx", "torch"}
    found = {d.name: d.version for d in importlib.metadata.distributions() if d.name in packages}
    return ", ".join([f"python {platform.python_version()}", *(f"{name} {found[name]}" for name in sorted(found))])


def _revision(sources: list[str]) -> str:
    if "REVISION" in os.environ:  # where the tree was copied without its history
        return os.environ["REVISION"]
    head = last_line("git", "-C", ROOT, "rev-parse", "--short=12", "HEAD")
    changed = last_line("git", "-C", ROOT, "status", "--porcelain", "--", *sources)
    return head + ("+" if changed else "") if head else "unknown"


def last_line(*command) -> str:
    """The last line that a program prints, or nothing where it cannot be run."""
    try:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return next((line.strip() for line in reversed(done.stdout.splitlines()) if line.strip()), "")


def results_folder(name: str, cores: int | None = None) -> Path:
    """profile/results/<device>; a CPU's with the number of cores, which decides its speed."""
    name += f" {cores} cores" if cores else ""
    return ROOT / "profile" / "results" / "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write a result file, whose name says which columns it has. What a row lacks is left empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS[path.name], restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)
