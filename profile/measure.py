"""What the measuring scripts share: clocks, turns and CUDA graphs.

Contenders are timed in turns, because a shared machine changes its speed within seconds: a round gives every
contender one turn, a turn is a few blocks of calls, a sample is a block's mean. On a CPU all is measured in several
passes, at different times and on new arrays, because where these lie in memory matters, too. Percentiles are those of
all samples. Ratios are those of 20th percentiles: whatever else the machine does can only add to a time.
"""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from result_files import MACHINE  # noqa: E402

from kernels import host  # noqa: E402
from mlp import InputError  # noqa: E402
from mlp.device import Device  # noqa: E402


@dataclass
class Contender:
    """`run(k)` makes call number k, which does the work `repeats` times. shared: on a CPU, NumPy's BLAS runs on the
    fused library's threads meanwhile, as it does wherever that library is used."""

    run: Callable[[int], object]
    shared: bool = False
    repeats: int = 1


def first_call(contender: Contender) -> None:
    contender.run(0)


def built(builders: dict[str, Callable], what: str, first=first_call) -> tuple[dict, dict[str, str]]:
    """What could be built, by name, after first() of it, and by name why the others could not: one that fails is
    reported and must not cost the others."""
    table, failed = {}, {}
    for name, build in builders.items():
        try:
            table[name] = build()
            first(table[name])
        except Exception as error:
            table.pop(name, None)
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            print(f"error: {what}, {name}: {failed[name]}", file=sys.stderr)
    return table, failed


def host_clock(device: Device):
    """clock(run, first, n): seconds that n calls take, until the device has done their work."""

    def clock(run, first, n):
        began = time.perf_counter()
        for k in range(first, first + n):
            run(k)
        device.synchronize()
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
    """By contender: seconds per unit of work (rounds * blocks,), every other round in reverse order.

    block: at least so many seconds per block. rest: seconds before each turn on a CPU, in which the threads of the
    others go to sleep; OpenBLAS's look for work for a tenth of a second. settle: untimed seconds of calls after it,
    which also tell how many calls make a block; without them it is one.
    """
    samples = {name: [] for name in table}
    on_cpu = any(c.shared for c in table.values())
    for number in range(rounds):
        for name, contender in list(table.items())[:: -1 if number % 2 else 1]:
            if on_cpu:
                host.share_blas_threads(contender.shared)
                time.sleep(rest)
            spent, calls = 0.0, 0
            while spent < settle:
                spent += clock(contender.run, calls, 1)
                calls += 1
            n = max(1, round(block * calls / spent)) if calls else 1
            for _ in range(blocks):
                samples[name].append(clock(contender.run, calls, n) / (n * contender.repeats))
                calls += n
    return {name: np.array(times) for name, times in samples.items()}


class Turns:
    """The clock of a script that measures whole steps, how often and how long it does by its options, and whether a
    contender `failed`."""

    DEFAULTS = {"cpu": (15, 1, 0.06), "cuda": (1, 5, 0.02)}  # passes, rounds, seconds of a block

    def __init__(self, args, device: Device):
        passes, rounds, block = self.DEFAULTS[device.kind]
        self.clock, self.passes, self.failed = host_clock(device), args.passes or passes, False
        self.times = {"rounds": args.rounds or rounds, "block": args.block or block, "settle": args.settle}
        self.times["rest"] = 4 * args.settle

    @classmethod
    def add_options(cls, parser) -> None:
        (passes, rounds, block), (on_gpu, turns, short) = cls.DEFAULTS.values()
        add = parser.add_argument
        add("--passes", type=int, help=f"times that all is measured (default: {passes}, on a GPU {on_gpu})")
        add("--rounds", type=int, help=f"turns of each contender in a pass (default: {rounds}, on a GPU {turns})")
        add("--block", type=float, help=f"seconds of a sample, at least (default: {block}, on a GPU {short})")
        add("--settle", type=float, default=0.05, help="untimed seconds before a turn (default: 0.05)")

    def built(self, builders, what: str, first=first_call) -> dict:
        """What could be built; see the function of this name."""
        table, failed = built(builders, what, first)
        self.failed |= bool(failed)
        return table

    def measured(self, table: dict[str, Contender], blocks=1, **times) -> dict[str, np.ndarray]:
        """in_turns() with the script's clock and times, but for those given."""
        return in_turns(table, self.clock, blocks=blocks, **self.times | times)


def merge(collected: dict[str, np.ndarray], samples: dict[str, np.ndarray]) -> None:
    """Add the samples of one pass to those of the passes before."""
    for name, times in samples.items():
        collected[name] = np.concatenate([collected[name], times]) if name in collected else times


def quiet(samples: np.ndarray) -> float:
    """The time that ratios are made of: the 20th percentile."""
    return np.percentile(samples, 20)


def ratio(a: np.ndarray, b: np.ndarray) -> str:
    """How many times as long a takes as b."""
    return significant(quiet(a) / quiet(b))


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
    its own, which lives as long as the graph that keeps its addresses; so does what the calls work on.
    """
    import cupy

    cupy.cuda.Device().synchronize()  # `stream` does not wait for the one that has filled the arrays
    pool = cupy.cuda.MemoryPool()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        for launch in launches:
            launch()
        stream.begin_capture()
        try:
            for launch in launches:
                launch()
        except Exception:
            with suppress(cupy.cuda.runtime.CUDARuntimeError):
                stream.end_capture()  # or the next contender could not use the stream
            raise
        graph = stream.end_capture()
    graph.upload(stream)

    def run(_, kept=(pool, launches)):  # whose memory the graph reads and writes
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
        results = [launch() for launch in launches]  # all kept, or they would share memory, and that the cache

    def run(_, kept=(launches, results)):
        with torch.cuda.stream(own):
            graph.replay()

    return run


def print_rows(title: str, rows: list[dict], hidden=()) -> None:
    """The rows of a result file as a table, without the columns `hidden` and those of the machine."""
    names = [name for name in rows[0] if name not in (*MACHINE, *hidden)]
    widths = [max(len(name), *(len(str(row.get(name, ""))) for row in rows)) + 2 for name in names]
    print(f"\n{title}: {rows[0]['device']}, {rows[0]['cores']} cores")
    for row in [dict(zip(names, names)), *rows]:
        line = "".join(str(row.get(name, "")).ljust(width) for name, width in zip(names, widths))
        print(line.rstrip(), flush=True)


def check_times(args) -> None:
    """Raise InputError for impossible --passes, --rounds, --blocks, --block and --settle."""
    for name in ("passes", "rounds", "blocks"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value} is not possible; give a whole number from 1")
    if not args.settle >= 0 or (args.block is not None and not args.block > 0):
        raise InputError("--settle must be at least 0 and --block above 0")


def has_torch() -> bool:
    """Whether torch can be imported."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True
