"""Time the whole training step and the whole epoch: array code, fused kernels, PyTorch, and the GEMMs alone.

    python profile/bench_step.py                         # on the GPU where there is one, else on the CPU
    python profile/bench_step.py --parts step,phases --out folder

Parts, each a result file: `ceilings`, the machine's fastest matrix product and copy; `step`, a step of m0 and m1;
`phases`, where its time goes; `epoch`, a whole epoch of as many images as EMNIST ByMerge trains on; `sweep`, batch and
width, for the roofline. The images are synthetic bytes. On a GPU all is measured in float32 and with TF32 products.
"""

import argparse
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import machine
import measure
import numpy as np
import step_contenders as contenders
from measure import Contender
from phase_clock import PhaseClock
from result_files import MACHINE
from step_contenders import GEMM_ONLY

from kernels import BackendError
from mlp import InputError, configs
from mlp.device import Device, select
from mlp.ranges import attach

IMAGES = 566_667  # 70 % of ByMerge
BATCHES, WIDTHS = (64, 256, 1024, 4096, 16384, 65536), (64, 256, 1024, 4096)
CEILINGS = {"cpu": (2048, 64), "cuda": (8192, 1024)}  # order of the matrices, MB of the copied array
EPOCH_PARTS = 10
PRECISIONS = {"cpu": ("float32",), "cuda": ("float32", "tf32")}


class Bench:
    """The device, the data and the clock of one run; a method per part gives the rows of its result file."""

    def __init__(self, args, device: Device):
        self.args, self.device = args, device
        self.data = contenders.synthetic_data(args.images)
        self.stream = device.xp.cuda.Stream(non_blocking=True) if device.kind == "cuda" else None
        self.clock = measure.host_clock(device)
        passes, rounds, block = (15, 1, 0.06) if device.kind == "cpu" else (1, 5, 0.02)
        self.passes = args.passes or passes
        self.times = {"rounds": args.rounds or rounds, "block": args.block or block, "settle": args.settle}
        self.times["rest"] = 4 * args.settle
        self.failed = False  # whether a contender could not be built

    def config(self, model: str, **changes):
        return configs.preset(model, device=self.device.kind, fused=True, **changes)

    def in_turns(self, builders, what: str, blocks=1, **times) -> dict[str, np.ndarray]:
        table, failed = measure.built(builders, what)
        self.failed |= bool(failed)
        return measure.in_turns(table, self.clock, blocks=blocks, **self.times | times)

    def common(self, config, precision: str) -> dict:
        layers = "-".join(map(str, contenders.sizes(config)))
        return {"model": config.model, "layers": layers, "batch": config.batch_size, "precision": precision}

    def ceilings(self, precision):
        """The largest rates that this machine gives: of a large matrix product and, in float32, of a large copy. Each
        pass has new arrays, because where they lie decides how fast they are copied."""
        samples = {}
        for _ in range(self.passes):
            measure.merge(samples, self.in_turns(self.ceiling_builders(precision), "ceilings"))
        n, megabytes = CEILINGS[self.device.kind]
        work = {"matrix": (2 * n**3, "GFLOP/s"), "copy": (2 * megabytes * 2**20, "GB/s")}
        for name, times in samples.items():
            amount, unit = work[name.split()[0]]
            value = measure.significant(amount / measure.quiet(times) / 1e9)
            yield {"name": name, "precision": precision, "value": value, "unit": unit}

    def ceiling_builders(self, precision):
        xp, on_cpu = self.device.xp, self.device.kind == "cpu"
        n, megabytes = CEILINGS[self.device.kind]
        a, b = (xp.asarray(np.random.default_rng(k).random((n, n), np.float32)) for k in range(2))
        out, source = xp.empty_like(a), xp.ones(megabytes * 2**18, np.float32)
        target = xp.empty_like(source)
        table = {f"matrix product {n}": lambda: Contender(lambda k: xp.matmul(a, b, out=out))}
        if precision == "float32":
            table[f"copy {megabytes} MB"] = lambda: Contender(lambda k: xp.copyto(target, source))
        if on_cpu and contenders.torch_can("cpu"):
            import torch

            to, of = torch.from_numpy(target), torch.from_numpy(source)
            table[f"copy {megabytes} MB, torch"] = lambda: Contender(lambda k: to.copy_(of))
        return table

    def step(self, precision):
        """A step of each model at its own batch size."""
        samples = {model: {} for model in self.args.models}
        for _ in range(self.passes):
            for model in self.args.models:
                builders = contenders.builders(self.config(model), self.data, self.device, self.stream)
                measure.merge(samples[model], self.in_turns(builders, f"step of {model} in {precision}", blocks=2))
        for model, by_name in samples.items():
            config = self.config(model)
            gemm = min((by_name[name] for name in by_name if name.startswith(GEMM_ONLY)), key=measure.quiet)
            for name, times in by_name.items():
                yield {"contender": name} | self.common(config, precision) | measure.percentiles(times, "ms") | {
                    "to_gemm": measure.ratio(times, gemm),
                    "speedup": measure.ratio(by_name["plain"], times),
                    "images_per_second": f"{config.batch_size / np.median(times):.0f}",
                }  # fmt: skip

    def phases(self, precision):
        """Where a step's time goes: the ranges of --nvtx, with a clock in the place of NVTX."""
        for model in self.args.models:
            config, table = self.config(model), {}
            recorders = {name: PhaseClock(self.device) for name in contenders.learner_names(self.device)}
            for name, recorder in recorders.items():
                learner = contenders.learner(name, config, self.data, self.device)
                attach(learner, recorder)
                run = contenders.steps(learner, len(self.data.labels))
                table[name] = contenders.contender(name, self.device, run)
            rounds = self.passes * self.times["rounds"]
            measure.in_turns(table, self.clock, blocks=1, **self.times | {"rounds": rounds})
            for name, recorder in recorders.items():
                for phase, seconds in recorder.by_phase().items():
                    row = {"contender": name} | self.common(config, precision) | {"phase": phase}
                    yield row | measure.percentiles(seconds, "ms")

    def epoch(self, precision):
        """An epoch from its order of images to its loss on the host, without validation. The contenders take turns in
        parts of it, and an epoch's time is the sum of its parts."""
        n = len(self.data.labels)
        order = np.random.default_rng(2).permutation(n).astype(np.int32)
        samples = {model: {} for model in self.args.models}
        for _ in range(self.args.epochs):
            for model in self.args.models:
                config = self.config(model)
                names = contenders.learner_names(self.device)
                learners = {name: contenders.learner(name, config, self.data, self.device) for name in names}
                seconds = dict.fromkeys(names, 0.0)
                starts = np.arange(0, n, config.batch_size)
                for part in np.array_split(starts, min(EPOCH_PARTS, len(starts))):
                    table = {name: contenders.contender(name, self.device, partial(part_of_epoch, learner, order, part))
                             for name, learner in learners.items()}  # fmt: skip
                    once = self.times | {"rounds": 1, "settle": 0}
                    for name, times in measure.in_turns(table, self.clock, blocks=1, **once).items():
                        seconds[name] += times
                measure.merge(samples[model], seconds)
        for model, by_name in samples.items():
            for name, times in by_name.items():
                row = {"contender": name} | self.common(self.config(model), precision)
                yield row | {
                    "data": self.data.name, "images": n, "samples": times.size,
                    "seconds": measure.significant(np.median(times)),
                    "images_per_second": f"{n / np.median(times):.0f}",
                    "speedup": measure.ratio(by_name["plain"], times),
                }  # fmt: skip

    def sweep(self, precision):
        """The step of m1 as the batch grows, and as its hidden layers grow."""
        points = [("batch", {"batch_size": batch}) for batch in BATCHES if batch <= self.args.images // 2]
        points += [("width", {"hidden": (width,) * 3}) for width in WIDTHS]
        names = [*contenders.learner_names(self.device), contenders.CAPTURED]
        for kind, changes in points:
            config = self.config("m1", **changes)
            builders = contenders.builders(config, self.data, self.device, self.stream)
            samples = self.in_turns(
                {name: builders[name] for name in names if name in builders}, f"sweep of {changes}", rounds=3
            )
            flops, moved = work(config)
            for name, times in samples.items():
                width = config.hidden[0] if kind == "width" else ""
                yield {"sweep": kind, "contender": name} | self.common(config, precision) | {"width": width} | (
                    measure.percentiles(times, "ms")) | {
                    "flops": flops, "bytes": moved, "gflop_per_s": measure.significant(flops / np.median(times) / 1e9),
                    "images_per_second": f"{config.batch_size / np.median(times):.0f}",
                }  # fmt: skip


def part_of_epoch(learner, order, starts, _=0) -> None:
    """Train on the batches that begin at `starts`; the first begins the epoch, the last reads its loss."""
    if starts[0] == 0:
        learner.begin_epoch(order)
    batch, n = learner.batch_size, len(order)
    for start in starts.tolist():
        learner.train_step(start, min(start + batch, n), learner.config.lr)
    if starts[-1] + batch >= n:
        learner.totals()


def work(config) -> tuple[int, int]:
    """The floating-point operations of a step's matrix products, and the bytes that it must move at least: parameters
    and moments read and written by the optimizer, pixels read, activations written once and read once."""
    widths, batch = contenders.sizes(config), config.batch_size
    weights = [n * m for n, m in pairwise(widths)]
    flops = 2 * batch * (3 * sum(weights) - weights[0])  # forward, weight gradients, input gradients but the first
    parameters = sum(weights) + sum(widths[1:])
    moved = parameters * (24 if config.optimizer == "adam" else 8) + batch * (widths[0] + 8 * sum(widths[1:]))
    return flops, moved


def print_rows(part: str, rows: list[dict]) -> None:
    hidden = {*MACHINE, "layers", "data", "images", "flops", "bytes", "samples"}
    names = [name for name in rows[0] if name not in hidden]
    widths = [max(len(name), *(len(str(row[name])) for row in rows)) + 2 for name in names]
    print(f"\n{part}: {rows[0]['device']}, {rows[0]['cores']} cores")
    for row in [dict(zip(names, names)), *rows]:
        print("".join(str(row[name]).ljust(width) for name, width in zip(names, widths)).rstrip(), flush=True)


def parser() -> argparse.ArgumentParser:
    parts = ["ceilings", "step", "phases", "epoch", "sweep"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=parts, help=f"of {','.join(parts)}")
    parser.add_argument("--models", type=lambda text: text.split(","), default=["m0", "m1"], help="default: m0,m1")
    parser.add_argument("--images", type=int, default=IMAGES, help=f"in the data set (default: {IMAGES})")
    parser.add_argument("--passes", type=int, help="times that all is measured (default: 15, on a GPU 1)")
    parser.add_argument("--rounds", type=int, help="turns of each contender in a pass (default: 1, on a GPU 5)")
    parser.add_argument("--block", type=float, help="seconds of a sample, at least (default: 0.06, on a GPU 0.02)")
    parser.add_argument("--settle", type=float, default=0.05, help="untimed seconds before a turn (default: 0.05)")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of each contender (default: 2)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: profile/results/<device>)")
    return parser


def check(args) -> None:
    known = parser().get_default("parts")
    if unknown := set(args.parts) - set(known):
        raise InputError(f"--parts {', '.join(sorted(unknown))} is unknown; choose of {', '.join(known)}")
    if args.images < 1024 or args.epochs < 1:
        raise InputError("--images must be at least 1024 and --epochs at least 1")
    measure.check_times(args)
    for model in args.models:
        configs.preset(model)


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    try:
        check(args)
        device, part = select(args.device, fused=True), "the data set"
        bench = Bench(args, device)
        facts = machine.facts(device.name, device.kind)
        folder = args.out or machine.results_folder(device.name, facts["cores"] if device.kind == "cpu" else None)
        for part in args.parts:
            rows = []
            for precision in PRECISIONS[device.kind]:
                contenders.set_precision(device, precision)
                rows += [row | facts for row in getattr(bench, part)(precision)]
            print_rows(part, rows)
            machine.write_csv(folder / f"{part}.csv", rows)
        print(f"written to {folder}")
    except (InputError, BackendError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:  # CuPy's OutOfMemoryError is one too; the parts before it are written
        print(f"error: {part} does not fit into memory ({error}); give --parts without it", file=sys.stderr)
        return 2
    return int(bench.failed)


if __name__ == "__main__":
    sys.exit(main())
