"""Climb from array code to the fastest training step, one change at a time, and hold each rung against a prediction.

    python profile/ladder.py                         # on the GPU where there is one, else on the CPU
    python profile/ladder.py --model m1 --out folder

All rungs train the same model on the same batches, and take turns in one run. ladder.csv has a row per rung: its time,
and what its launches, bytes and flops should cost by step_costs.py, from costs that the same run measures (costs.csv).
`gain` is over the rung before, but `own GEMM` and `bf16` are each a change of `epilogues`, and `tuned` is beside the
way: --tune in float32. torch stands beside them. launches.csv, on a GPU: the captured step with more and more steps in
a launch. The images are synthetic.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import machine
import measure
import numpy as np
import step_contenders as contenders
import step_costs
from array_trainer import ArrayTrainer
from measure import Contender
from step_costs import Work

from kernels import BackendError
from mlp import InputError, configs, products, tuning
from mlp.device import Device, select
from mlp.forms import KINDS, SEPARATE, Plan
from mlp.scratch import STEPS_PER_LAUNCH, ScratchLearner

STEPS, LAUNCHED = (1, 2, 4, 8, 16, 32, 64), ("graph", "epilogues")  # in a launch; of which rungs
COMPARED = "not a rung; its launches are not counted"


@dataclass(frozen=True)
class Rung:
    """build(rung) makes the contender ready. gains: whether the next rung is one change more than this one."""

    name: str
    what: str
    precision: str
    build: Callable[["Rung"], Contender]
    gains: bool = True

    @property
    def key(self) -> str:
        return f"{self.name}, {self.precision}"


@dataclass(frozen=True)
class Known:
    """What is known of a rung that could be built. steps: in a launch of its graph, 0 where there is none."""

    learner: object = None
    work: Work | None = None
    steps: int = 0
    note: str = ""


class Ladder:
    """The device, the data and the clock of one run."""

    def __init__(self, args, device: Device):
        self.device, self.gpu = device, device.kind == "cuda"
        self.config = configs.preset(args.model, device=device.kind, fused=True)
        self.data = self.resident = contenders.synthetic_data(args.images)
        if self.gpu:  # one copy for all learners, which would make one each
            images, labels = (device.xp.asarray(array) for array in (self.data.images, self.data.labels))
            self.resident = replace(self.data, images=images, labels=labels)
        self.stream = device.xp.cuda.Stream(non_blocking=True) if self.gpu else None
        self.turns = measure.Turns(args, device)
        self.known, self.samples = {}, {}  # of rungs, and seconds of rungs and costs, by key

    def rungs(self) -> list[Rung]:
        copied = " and copied to the GPU" if self.gpu else ""
        n, tuned = STEPS_PER_LAUNCH, "; each product in its fastest form"
        rungs = [
            Rung("plain", f"array code; batches gathered in host memory{copied}", "float32", self.array_code),
            Rung("arena Adam", "one Adam for all parameters", "float32", partial(self.array_code, one_adam=True)),
        ]
        if self.gpu:
            resident = partial(self.array_code, one_adam=True, resident=True)
            rungs.append(Rung("resident data", "images stay on the GPU and are gathered there", "float32", resident))
        rungs.append(Rung("fused ops", "one kernel per op", "float32", self.fused))
        if self.gpu:
            own = partial(self.graph, gemm="own")
            rungs += [
                Rung("graph", "the step is one launch; cuBLASLt's products", "float32", partial(self.graph, steps=1)),
                Rung(f"graph, {n} steps per launch", f"{n} steps are one launch", "float32", self.graph),
                Rung("tuned", f"ops fused to products{tuned}", "float32", partial(self.graph, tune=True), False),
                Rung("TF32", "factors of products rounded to TF32", "tf32", self.graph),
                Rung("epilogues", f"ops fused to products{tuned}", "tf32", partial(self.graph, tune=True)),
                Rung("own GEMM", "our kernel for all products and what follows them", "tf32", own, False),
                Rung("bf16", f"factors rounded to bfloat16{tuned}", "bf16", partial(self.graph, tune=True), False),
            ]
        return rungs

    def compared(self) -> list[Rung]:
        if not contenders.torch_can(self.device.kind):
            return []
        kinds = [(contenders.EAGER, "op by op", self.torch_eager)]
        kinds += [(contenders.CAPTURED, "a step is one launch", self.torch_graph)] if self.gpu else []
        precisions = ("float32", "tf32") if self.gpu else ("float32",)
        return [Rung(*kind[:2], precision, kind[2], False) for precision in precisions for kind in kinds]

    # ---- what makes a rung ready

    def timed(self, rung: Rung, known: Known) -> Contender:
        self.known[rung.key] = known
        return contenders.stepping(known.learner, len(self.data.labels), self.device, known.steps or None)

    def array_code(self, rung: Rung, **how) -> Contender:
        trainer = ArrayTrainer(self.config, self.data, select(self.device.kind, fused=False), **how)
        return self.timed(rung, Known(trainer, step_costs.of_trainer(trainer)))

    def fused(self, rung: Rung) -> Contender:
        learner = contenders.learner("fused", self.config, self.resident, self.device)
        return self.timed(rung, Known(learner, self.counted(learner)))

    def graph(self, rung: Rung, steps=STEPS_PER_LAUNCH, gemm="cublaslt", tune=False) -> Contender:
        """A learner that launches its steps as graphs; tune: with every product in its fastest form, of all there are."""
        gemm = "auto" if tune else gemm
        config = replace(self.config, precision=contenders.PRECISIONS[rung.precision], gemm=gemm)
        chosen, images, plan = products.select(config, self.device), len(self.data.labels), None
        if not chosen.captures:
            raise InputError(chosen.notice)
        if tune:
            plan, _ = tuning.plan(config, self.device, chosen, contenders.sizes(config), config.batch_size, tune=True)
        learner = ScratchLearner(config, self.resident, self.device, images, chosen, plan)
        return self.timed(rung, Known(learner, self.counted(learner), steps, forms(plan) if plan else ""))

    def counted(self, learner) -> Work:
        """The work of the learner's step."""
        learner.begin_epoch(np.arange(len(self.data.labels), dtype=np.int32))
        (program,) = learner.programs().values()
        return step_costs.of_program(program)

    def torch_eager(self, rung: Rung) -> Contender:
        learner = contenders.learner(contenders.EAGER, self.config, self.data, self.device)
        contender = self.timed(rung, Known(learner, note=COMPARED))

        def run(k, step=contender.run):
            contenders.set_torch_precision(self.device, rung.precision)
            step(k)

        return replace(contender, run=run)

    def torch_graph(self, rung: Rung) -> Contender:
        self.known[rung.key] = Known(note=COMPARED)
        contenders.set_torch_precision(self.device, rung.precision)  # a graph keeps the one that it was captured with
        return Contender(contenders.torch_captured(self.config, self.data, self.stream))

    # ---- result files

    def measure(self) -> dict[str, list[dict]]:
        """The rows of ladder.csv and costs.csv."""
        rungs, beside = self.rungs(), self.compared()
        precisions = dict.fromkeys(rung.precision for rung in rungs)
        for _ in range(self.turns.passes):  # each on new arrays
            table = {rung.key: partial(rung.build, rung) for rung in (*rungs, *beside)}
            table |= step_costs.builders(self.device, self.config, precisions, self.stream)
            measure.merge(self.samples, self.turns.measured(self.turns.built(table, "the ladder"), blocks=2))
        paid = {name: times for name, times in self.samples.items() if name not in self.known}
        costs, rows = step_costs.measured(paid, self.device)
        return {"ladder.csv": list(self.rows(rungs, beside, costs)), "costs.csv": rows}

    def rows(self, rungs, beside, costs):
        before = None  # the times of the rung that the next is a change of
        for rung in (*rungs, *beside):
            if rung.key not in self.samples:
                continue
            times, known = self.samples[rung.key], self.known[rung.key]
            row = {"rung": rung.name, "what": rung.what, "precision": rung.precision}
            found = {"speedup": measure.ratio(self.samples[rungs[0].key], times)}
            if known.work:
                row |= {"launches": known.work.launches, "bytes": known.work.bytes, "flops": known.work.flops}
                row |= costs.predicted(known.work, rung.precision, known.steps)
                found["gain"] = measure.ratio(times if before is None else before, times)
            yield row | measure.percentiles(times, "us") | found | {"note": row.get("note", known.note)}
            if rung.gains:
                before = times

    def launches(self) -> dict[str, list[dict]]:
        """The rows of launches.csv: the step as it is first captured, and as it ends, by the steps in a launch. Nothing
        where no step was captured."""
        images, builders = len(self.data.labels), {}
        for rung in self.rungs():
            if rung.name in LAUNCHED and rung.key in self.samples:
                stepping = partial(contenders.stepping, self.known[rung.key].learner, images, self.device)
                for steps in (n for n in STEPS if n * self.config.batch_size <= images):
                    builders[rung.name, rung.precision, steps] = partial(stepping, steps)
        samples = self.turns.measured(self.turns.built(builders, "launches"), blocks=2)
        rows = [{"contender": name, "precision": precision, "steps": steps} | measure.percentiles(times, "us")
                for (name, precision, steps), times in samples.items()]  # fmt: skip
        return {"launches.csv": rows} if rows else {}


def forms(plan: Plan) -> str:
    """'forward of layers 0, 1: epilogue; last layer padded', or how else a plan differs from one that is not tuned."""
    places = {}
    for layer, form in enumerate(plan.forms):
        for kind in KINDS:
            places.setdefault((kind, getattr(form, kind)), []).append(str(layer))
    parts = [f"{kind} of layers {', '.join(of)}: {form}" for (kind, form), of in places.items() if form != SEPARATE]
    return "; ".join(parts + ["last layer padded"] * plan.padded) or "all separate"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--model", default="m1", help="a preset of train.py with relu and Adam (default: m1)")
    parser.add_argument("--images", type=int, default=contenders.IMAGES,
                        help=f"in the data set (default: {contenders.IMAGES})")  # fmt: skip
    measure.Turns.add_options(parser)
    parser.add_argument("--out", type=Path, help="folder of the results (default: profile/results/<device>)")
    return parser


def check(args) -> None:
    config = configs.preset(args.model)
    if config.optimizer != "adam" or config.l2 or config.activation != "relu":
        raise InputError(f"--model {args.model} is not possible: the first rungs are relu and Adam without L2; give m1")
    least = STEPS_PER_LAUNCH * config.batch_size
    if args.images < least:
        raise InputError(f"--images must be at least {least}, those of one launch, got {args.images}")
    measure.check_times(args)


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    try:
        check(args)
        device = select(args.device, fused=True)
        facts = machine.facts(device.name, device.kind)
        folder = args.out or machine.results_folder(device.name, facts["cores"] if device.kind == "cpu" else None)
        ladder = Ladder(args, device)
        with contenders.private_cache():
            for part in (ladder.measure, ladder.launches):
                for name, rows in part().items():
                    rows = [row | facts for row in rows]
                    measure.print_rows(name, rows, ("what", "bytes", "flops", "samples"))
                    machine.write_csv(folder / name, rows)
        print(f"written to {folder}")
    except (InputError, BackendError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:  # CuPy's OutOfMemoryError is one too
        print(f"error: the ladder does not fit into memory ({error}); give fewer --images", file=sys.stderr)
        return 2
    return int(ladder.turns.failed)


if __name__ == "__main__":
    sys.exit(main())
