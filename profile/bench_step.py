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
from phase_clock import PhaseClock
from step_contenders import GEMM_ONLY, IMAGES

from kernels import BackendError
from mlp import InputError, configs
from mlp.device import Device, select
from mlp.ranges import attach

BATCHES, WIDTHS = (64, 256, 1024, 4096, 16384, 65536), (64, 256, 1024, 4096)
EPOCH_PARTS = 10
HIDDEN = ("layers", "data", "images", "flops", "bytes", "samples")  # columns that are not printed
PRECISIONS = {"cpu": ("float32",), "cuda": ("float32", "tf32")}


class Bench:
    """The device, the data and the clock of one run; a method per part gives the rows of its result file."""

    def __init__(self, args, device: Device):
        self.args, self.device = args, device
        self.data = contenders.synthetic_data(args.images)
        self.stream = device.xp.cuda.Stream(non_blocking=True) if device.kind == "cuda" else None
        self.turns = measure.Turns(args, device)

    def config(self, model: str, precision: str, **changes):
        changes |= {"fused": True, "precision": contenders.PRECISIONS[precision]}
        return configs.preset(model, device=self.device.kind, **changes)

    def in_turns(self, builders, what: str, **times) -> dict[str, np.ndarray]:
        return self.turns.measured(self.turns.built(builders, what), **times)

    def common(self, config, precision: str) -> dict:
        layers = "-".join(map(str, contenders.sizes(config)))
        return {"model": config.model, "layers": layers, "batch": config.batch_size, "precision": precision}

    def ceilings(self, precision):
        """Each pass has new arrays, because where they lie decides how fast they are copied."""
        samples = {}
        for _ in range(self.turns.passes):
            measure.merge(samples, self.in_turns(contenders.ceilings(self.device, precision), "ceilings"))
        for name, times in samples.items():
            value, unit = contenders.rate(name, self.device, times)
            yield {"name": name, "precision": precision, "value": measure.significant(value), "unit": unit}

    def step(self, precision):
        """A step of each model at its own batch size."""
        samples = {model: {} for model in self.args.models}
        for _ in range(self.turns.passes):
            for model in self.args.models:
                builders = contenders.builders(self.config(model, precision), self.data, self.device, self.stream)
                measure.merge(samples[model], self.in_turns(builders, f"step of {model} in {precision}", blocks=2))
        for model, by_name in samples.items():
            config = self.config(model, precision)
            gemm = min((by_name[name] for name in by_name if name.startswith(GEMM_ONLY)), key=measure.quiet)
            for name, times in by_name.items():
                yield {"contender": name} | self.common(config, precision) | measure.percentiles(times, "ms") | {
                    "to_gemm": measure.ratio(times, gemm),
                    "speedup": measure.ratio(by_name["plain"], times),
                    "images_per_second": f"{config.batch_size / np.median(times):.0f}",
                }  # fmt: skip

    def phases(self, precision):
        """Where a step's time goes: the ranges of --nvtx, with a clock in the place of NVTX. A graph has none."""
        for model in self.args.models:
            config, table = self.config(model, precision), {}
            names = [name for name in contenders.learner_names(self.device) if name != contenders.GRAPH]
            recorders = {name: PhaseClock(self.device) for name in names}
            for name, recorder in recorders.items():
                learner = contenders.learner(name, config, self.data, self.device)
                attach(learner, recorder)
                table[name] = contenders.stepping(learner, len(self.data.labels), self.device)
            self.turns.measured(table, rounds=self.turns.passes * self.turns.times["rounds"])
            for name, recorder in recorders.items():
                for phase, seconds in recorder.by_phase().items():
                    row = {"contender": name} | self.common(config, precision) | {"phase": phase}
                    yield row | measure.percentiles(seconds, "ms")

    def epoch(self, precision):
        """An epoch from its order of images to its loss on the host, without validation. The contenders take turns in
        parts of it, and an epoch's time is the sum of its parts."""
        n, samples = len(self.data.labels), {model: {} for model in self.args.models}
        for number in range(1, self.args.epochs + 1):
            for model in self.args.models:
                measure.merge(samples[model], self.one_epoch(self.config(model, precision), number))
        for model, by_name in samples.items():
            for name, times in by_name.items():
                row = {"contender": name} | self.common(self.config(model, precision), precision)
                yield row | {
                    "data": self.data.name, "images": n, "samples": times.size,
                    "seconds": measure.significant(np.median(times)),
                    "images_per_second": f"{n / np.median(times):.0f}",
                    "speedup": measure.ratio(by_name["plain"], times),
                }  # fmt: skip

    def one_epoch(self, config, number: int) -> dict[str, np.ndarray]:
        """Seconds (1,) of the epoch `number`, by contender."""
        index = np.arange(len(self.data.labels), dtype=np.int32)
        builders = {name: partial(contenders.learner, name, config, self.data, self.device)
                    for name in contenders.learner_names(self.device)}  # fmt: skip
        learners = self.turns.built(builders, f"epoch of {config.model}", partial(warm_up, index=index))
        seconds = dict.fromkeys(learners, 0.0)
        for part in range(EPOCH_PARTS):
            table = {name: contenders.contender(learner, self.device, part_of_epoch(learner, index, number, part))
                     for name, learner in learners.items()}  # fmt: skip
            for name, times in self.turns.measured(table, rounds=1, settle=0).items():
                seconds[name] += times
        return seconds

    def sweep(self, precision):
        """The step of m1 as the batch grows, and as its hidden layers grow."""
        points = [("batch", {"batch_size": batch}) for batch in BATCHES if batch <= self.args.images // 2]
        points += [("width", {"hidden": (width,) * 3}) for width in WIDTHS]
        names = [*contenders.learner_names(self.device), contenders.CAPTURED]
        for kind, changes in points:
            config = self.config("m1", precision, **changes)
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


def warm_up(learner, index) -> None:
    """Train on what has every shape of an epoch: one launch, one step, and the rest of the images."""
    batch = learner.batch_size
    some = index[: batch * (learner.steps_per_launch + 1) + len(index) % batch]
    learner.begin_epoch(some, 0)
    learner.train(0, len(some), learner.config.lr)
    learner.totals()


def part_of_epoch(learner, index, number: int, part: int):
    """run(k): a part of an epoch on `index`, in whole launches; the first part puts the images in the order of the
    epoch `number`, the last one takes the rest and reads the loss."""
    n, stride = len(index), learner.batch_size * learner.steps_per_launch
    begin, end = (min(n, p * (n // stride) // EPOCH_PARTS * stride) for p in (part, part + 1))
    last = part == EPOCH_PARTS - 1

    def run(_=0):
        if part == 0:
            learner.begin_epoch(index, number)
        learner.train(begin, n if last else end, learner.config.lr)
        if last:
            learner.totals()

    return run


def work(config) -> tuple[int, int]:
    """The floating-point operations of a step's matrix products, and the bytes that it must move at least: parameters
    and moments read and written by the optimizer, pixels read, activations written once and read once."""
    widths, batch = contenders.sizes(config), config.batch_size
    weights = [n * m for n, m in pairwise(widths)]
    flops = 2 * batch * (3 * sum(weights) - weights[0])  # forward, weight gradients, input gradients but the first
    parameters = sum(weights) + sum(widths[1:])
    moved = parameters * (24 if config.optimizer == "adam" else 8) + batch * (widths[0] + 8 * sum(widths[1:]))
    return flops, moved


def parser() -> argparse.ArgumentParser:
    parts = ["ceilings", "step", "phases", "epoch", "sweep"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=parts, help=f"of {','.join(parts)}")
    parser.add_argument("--models", type=lambda text: text.split(","), default=["m0", "m1"], help="default: m0,m1")
    parser.add_argument("--images", type=int, default=IMAGES, help=f"in the data set (default: {IMAGES})")
    measure.Turns.add_options(parser)
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
        with contenders.private_cache():
            for part in args.parts:
                rows = []
                for precision in PRECISIONS[device.kind]:
                    contenders.set_torch_precision(device, precision)
                    rows += [row | facts for row in getattr(bench, part)(precision)]
                measure.print_rows(part, rows, HIDDEN)
                machine.write_csv(folder / f"{part}.csv", rows)
        print(f"written to {folder}")
    except (InputError, BackendError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:  # CuPy's OutOfMemoryError is one too; the parts before it are written
        print(f"error: {part} does not fit into memory ({error}); give --parts without it", file=sys.stderr)
        return 2
    return int(bench.turns.failed)


if __name__ == "__main__":
    sys.exit(main())
