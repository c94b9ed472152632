"""python -m mlp study: every model, plain and fused, over several seeds, and what each refinement is worth.

Every run is a process of its own, one after another, so that its seconds are those of a machine at rest. What has been
run is not run again: a study that was interrupted goes on where it was.
"""

import json
import multiprocessing
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from . import InputError, configs, study_report
from .configs import Config
from .files import file_name, make_folder

# What is trained, by name: a preset, and what is changed in it. On further data sets only those of ROBUST.
MODELS = {
    "m0": ("m0", {}),
    "m0 fused": ("m0", dict(fused=True)),
    "m1": ("m1", {}),
    "m1 fused": ("m1", dict(fused=True)),
    "m2": ("m2", {}),
    "m2 fused": ("m2", dict(fused=True)),
    "m3": ("m3", {}),
    "m3 fused": ("m3", dict(fused=True)),
    "m3 from scratch, fused": ("m3", dict(backend="scratch", fused=True)),
    "robust fused": ("robust", dict(fused=True)),
}
ROBUST = ("m3", "robust fused")
# What each refinement is worth to m1, alone.
REFINEMENTS = {
    study_report.BASE: {},
    "label smoothing 0.1": dict(label_smoothing=0.1),
    "cosine schedule, warm-up": dict(schedule="cosine", warmup=1, patience=None),
    "decoupled weight decay 0.05": dict(l2=0.05, decoupled=True),
    "average of parameters 0.999": dict(ema=0.999),
    "class-balanced loss 0.999": dict(class_balance=0.999),
    "noise up to 0.5": dict(train_noise=0.5),
    "augmentation": dict(augment=1.0),
}


@dataclass(frozen=True)
class Job:
    """A run of the study: the name of its row, its configuration and its folder."""

    name: str
    config: Config
    folder: Path


@dataclass(frozen=True)
class Part:
    """What is done with one data set."""

    models: list[Job]
    refinements: list[Job]


def run(args) -> int:
    """Execute what has not been, and write report.md with its plots and results.json into --out."""
    if args.seeds < 1:
        raise InputError(f"--seeds {args.seeds} is not possible; give a whole number of at least 1")
    folder, began = make_folder(args.out), time.perf_counter()
    sources = [args.data, *args.also]
    rows = [MODELS, *[ROBUST] * len(args.also)]
    parts = [plan(source, args.seeds, args.runs, names) for source, names in zip(sources, rows)]
    jobs = {job.folder: job for part in parts for job in (*part.models, *part.refinements)}
    execute(list(jobs.values()))
    study_report.write(folder, parts)
    print(f"{len(jobs)} runs, {(time.perf_counter() - began) / 60:.1f} minutes; {folder / 'report.md'}")
    return 0


def plan(source: str, seeds: int, root: Path, names) -> Part:
    """The runs of these MODELS on the data set `source` with the seeds 0, 1, ..."""
    rows = {name: configs.preset(MODELS[name][0], **MODELS[name][1]) for name in names}
    m1 = configs.preset("m1", fused=True)
    refined = {name: replace(m1, **changes) for name, changes in REFINEMENTS.items()}
    return Part(*(
        [_job(name, config, source, seed, root) for seed in range(seeds) for name, config in of.items()]
        for of in (rows, refined)
    ))  # fmt: skip


def _job(name: str, config: Config, source: str, seed: int, root: Path) -> Job:
    """The same configuration is the same folder, whatever it is a row of."""
    run_name = "m1 fused" if name == study_report.BASE else name
    folder = root / file_name(f"{run_name} {Path(source).name} seed{seed}")
    return Job(name, replace(config, data=source, seed=seed), folder)


def execute(jobs: list[Job]) -> None:
    """Run what has not been run, each in a process of its own that writes <folder>.log. InputError where one fails, or
    a folder holds a run of another configuration."""
    context = multiprocessing.get_context("spawn")
    for number, job in enumerate(jobs, 1):
        if _is_done(job):
            continue
        print(f"[{number}/{len(jobs)}] {job.name}, seed {job.config.seed}, {job.config.data}", flush=True)
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        process = context.Process(target=_train, args=(job.config, job.folder, _log(job)))
        process.start()
        process.join()
        if process.exitcode:
            lines = _log(job).read_text().splitlines() if _log(job).exists() else []
            last = lines[-1].removeprefix("error: ") if lines else "no output"
            raise InputError(f"{job.name} ended with status {process.exitcode} ({last}); see {_log(job)}")


def _log(job: Job) -> Path:
    return job.folder.with_name(job.folder.name + ".log")


def _is_done(job: Job) -> bool:
    """Whether the folder holds this run; what an interrupted one has left there is no run."""
    try:
        held = json.loads((job.folder / "config.json").read_text())
        outcome = json.loads((job.folder / "metrics.json").read_text())["outcome"]
    except (OSError, ValueError, KeyError):
        if job.folder.exists():
            job.folder.rename(_free_name(job.folder))
        return False
    wanted = json.loads(json.dumps(asdict(job.config)))
    if any(held.get(name) != value for name, value in wanted.items()):
        raise InputError(f"{job.folder} holds a run of another configuration; move it away or give another --runs")
    if outcome in ("interrupted", "diverged"):
        job.folder.rename(_free_name(job.folder))
        return False
    return True


def _free_name(folder: Path) -> Path:
    """A name beside the folder that nothing has."""
    number = 1
    while (name := folder.with_name(f"{folder.name}.unfinished{number}")).exists():
        number += 1
    return name


def _train(config: Config, folder: Path, log: Path) -> None:
    from . import run

    with open(log, "w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        try:
            status = run.train(config, folder)
        except InputError as error:
            print(f"error: {error}")
            status = 2
    sys.exit(status)
