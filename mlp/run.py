"""A run from a configuration to a finished folder: load, train, judge, write; or go on with one that was cut short."""

import signal
import sys
import time
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import (
    InputError, LostProcess, checkpoint, data, distributed, forms, plots, products, provenance, ranges, run_folder, tuning,
)  # fmt: skip
from .configs import Config
from .console import ConsoleReporter, print_setting, print_summary
from .device import select
from .evaluate import NOISE_SIGMA
from .explain import explain as explain_step
from .flags import Interval
from .loop import Reporter, fit
from .progress import History, Keeper
from .scratch import ScratchLearner


@dataclass(frozen=True)
class Options:
    """What of a command changes no result. nvtx: mark the phases for Nsight Systems. tune: time the forms of the layers
    first, see tuning.py. explain: print what a step does instead of training. interval: of the checkpoints."""

    nvtx: bool = False
    tune: bool = False
    explain: bool = False
    interval: Interval = Interval()


@dataclass
class Setting:
    """What a run has before it begins."""

    config: Config
    options: Options
    job: distributed.Job
    device: object
    dataset: data.Dataset
    split: data.Split
    learner: object
    entry: dict  # what tuning.plan() knows of the learner's layers
    annotate: object  # see ranges.py

    @property
    def title(self) -> str:
        return f"{self.config.model}{' fused' if self.config.fused else ''} on {self.dataset.name}"


def train(
    config: Config, out: Path | None = None, options: Options = Options(), then: dict | None = None  # noqa: B008
) -> int:
    """Train `config`, judge it and write the run's folder (`out`, or a new one under runs/).

    Prints as it goes. Returns the exit status: 0, 130 after Ctrl-C, 143 after SIGTERM, 1 where something became NaN or
    infinite; but after SIGTERM the folder holds the results of the best epoch, and if the run was cut short, what
    resume() needs. InputError for whatever the user can mend.
    then: the config.json of a run that is made again: on the same data, with the layers in the same forms.
    """
    began = time.perf_counter()
    run_folder.refuse_used(out)  # before a download of half a gigabyte
    if config.backend == "torch" and (options.tune or options.explain):
        raise InputError(f"--{'tune' if options.tune else 'explain'} belongs to --backend scratch; leave it out")
    with _setting(config, options, then) as setting, ExitStack() as locks:
        if options.explain:
            setting.learner.begin_epoch(setting.split.train)
            if setting.job.rank == 0:
                print(explain_step(setting.learner, setting.entry))
            return 0
        content = provenance.of(setting.learner, setting.dataset, setting.device)

        def begin():  # last: whatever is refused leaves no folder behind
            folder = run_folder.make(out, config, setting.dataset.name)
            locks.enter_context(run_folder.locked(folder))
            run_folder.refuse_used(folder)  # once more, now that nobody else can begin one
            with _writing(folder):
                run_folder.write_json(folder / "config.json", content)
            return folder

        return _train(setting, setting.job.lead(begin), began)


def resume(folder: Path, options: Options = Options()) -> int:  # noqa: B008
    """Go on with the run in `folder` from its last checkpoint, or from the start where it has none: parameters, history
    and results are, bit for bit, those of a run that was never interrupted. Returns as train()."""
    began = time.perf_counter()
    config, content = run_folder.read_config(folder)
    outcome = run_folder.outcome(folder)
    if outcome == "diverged":
        raise InputError(f"{folder} holds a run that diverged, and would again; begin a new one with a lower --lr")
    if outcome not in ("", "interrupted"):
        if distributed.is_first():
            print(f"the run in {folder} is over ({outcome}); there is nothing to go on with")
        return 0
    with _setting(config, options, content) as setting, ExitStack() as locks:
        now = provenance.of(setting.learner, setting.dataset, setting.device)
        notices = provenance.differences(content, now)

        def lock():
            locks.enter_context(run_folder.locked(folder))
            if run_folder.outcome(folder) != outcome:
                raise InputError(f"the run in {folder} has just been ended by another process; look at its results")

        setting.job.lead(lock)
        progress = setting.job.together(lambda: _keeper(setting, folder).load(setting.learner))

        def note():
            resumed = {name: now[name] for name in ("command", "revision", "versions", "device_name", "processes")}
            resumed |= {"epoch": progress.epoch if progress else 1, "images": progress.done if progress else 0}
            with _writing(folder):
                content.setdefault("resumed", []).append(resumed)
                run_folder.write_json(folder / "config.json", content)
            if notices:
                print(f"\n*** not bit for bit as if never interrupted: {'; '.join(notices)} ***\n")
            print(f"resumed in epoch {resumed['epoch']}, after {resumed['images']:,} of its images")
            return folder

        return _train(setting, setting.job.lead(note), began, progress)


@contextmanager
def _setting(config: Config, options: Options, then: dict | None = None):
    """Everything that `config` needs; then: the config.json of the run that is gone on with."""
    annotate = ranges.nvtx_annotate() if options.nvtx else nullcontext
    job = distributed.join(config.device)
    try:
        device = job.together(lambda: select_device(config))
        job.check_device(device.kind)
        dataset = job.first(lambda: data.load(config.data))
        if then is not None and dataset.checksum != then["data_sha256"]:
            raise InputError(
                f"the run was trained on {then['data_name']}, and --data {config.data} is {dataset.name} with other "
                "images now; put the data back, or begin a new run"
            )
        split = data.stratified_split(dataset.labels)
        plan = None if then is None else then.get("plan")
        learner, entry = job.together(
            lambda: make_learner(config, dataset, device, len(split.train), options.tune, job, plan)
        )
        if options.nvtx:
            ranges.attach(learner, annotate)
        yield Setting(config, options, job, device, dataset, split, learner, entry, annotate)
    except LostProcess:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # with which the launcher ends the others, before they can say why
        raise
    finally:
        job.close()


def _keeper(setting: Setting, folder: Path) -> Keeper:
    return Keeper(folder, setting.config, setting.dataset.checksum, setting.options.interval)


def _train(setting: Setting, folder: Path | None, began: float, progress=None) -> int:
    """folder: None but in the process that writes it."""
    config, learner, split = setting.config, setting.learner, setting.split
    reporter, on_epoch, keeper = Reporter(), lambda history: None, None
    if folder:
        reporter, keeper = ConsoleReporter(), _keeper(setting, folder)
        on_epoch = lambda history: run_folder.write_history(folder, history.rows)  # noqa: E731
        print_setting(setting)
    with np.errstate(over="ignore", invalid="ignore"), _writing(folder):  # what is not finite is reported once
        history = fit(learner, split, config, reporter, on_epoch, setting.annotate, progress=progress, keeper=keeper)
        if history.outcome != "terminated":
            _finish(setting, history, folder, began)
    if folder and history.outcome == "terminated":
        print(f"error: terminated; go on with --resume {folder}", file=sys.stderr)
    if folder and history.outcome == "diverged":
        print(
            f"error: {history.fault} became NaN or infinite; the last good checkpoint is {keeper.path}, of "
            f"{keeper.place}; try a lower --lr", file=sys.stderr,
        )  # fmt: skip
    setting.job.all(None)  # the first process of a job to leave with an error ends the others, which may be writing
    return {"interrupted": 128 + signal.SIGINT, "terminated": 128 + signal.SIGTERM, "diverged": 1}.get(history.outcome, 0)


@contextmanager
def _writing(folder: Path | None):
    """What the system says of a file that cannot be written, in a sentence."""
    try:
        yield
    except OSError as error:
        what = error.filename or folder
        raise InputError(
            f"{what} cannot be written ({error.strerror or error}); make room, then go on with --resume {folder}"
        ) from None


def select_device(config: Config):
    """The Device, or torch's, of `config`. InputError where it cannot be had."""
    if config.backend == "torch":
        return _torch_models().select(config.device, config.fused)
    return select(config.device, config.fused)


def _torch_models():
    try:
        from . import torch_models
    except (ImportError, OSError) as error:  # or one of its libraries does not load
        raise InputError(f"--backend torch is not possible ({error}); run `pip install torch`") from None
    return torch_models


def make_learner(
    config: Config, dataset: data.Dataset, device, train_rows: int, tune: bool = False, job=None, plan: dict | None = None
):
    """The learner for `config` on select_device()'s device; one from scratch has its layers in the forms of `plan`
    (forms.as_plan()), or in those that are the fastest as far as it is known. Beside it what tuning.plan() knows."""
    job = job or distributed.Job()
    if config.backend == "torch":
        return _torch_models().TorchLearner(config, dataset, device.kind, train_rows, job), {}
    chosen = products.select(config, device)
    sizes = (dataset.images.shape[1], *config.hidden, len(dataset.class_names))
    if plan is not None and device.kind == "cuda":
        return ScratchLearner(config, dataset, device, train_rows, chosen, forms.as_plan(plan), job), {}
    batch = -(-config.batch_of(train_rows) // job.size)
    # One plan for all processes of a job: it decides how the parameters lie in memory, and so what is added to what.
    rows = min(batch, device.chunk_rows)
    best, entry = job.all(job.lead(lambda: tuning.plan(config, device, chosen, sizes, rows, tune)))[0]
    return ScratchLearner(config, dataset, device, train_rows, chosen, best, job), entry


def _finish(setting: Setting, history: History, folder: Path | None, began: float) -> None:
    """Judge the best parameters and write everything that is left to write; metrics.json comes last."""
    config, dataset, split, learner = setting.config, setting.dataset, setting.split, setting.learner
    val, test = learner.evaluate(split.val), learner.evaluate(split.test)
    noise = {sigma: learner.evaluate(split.test, sigma) if sigma else test for sigma in NOISE_SIGMA}
    if not folder:
        return
    run_folder.write_history(folder, history.rows)
    checkpoint.save(folder / "checkpoint.npz", learner.arrays(), config, dataset.class_names, dataset.name)
    labelled = ([name, *row] for name, row in zip(dataset.class_names, test.confusion.tolist()))
    run_folder.write_csv(folder / "confusion.csv", ["label \\ predicted", *dataset.class_names], labelled)
    title = setting.title
    plots.training(folder / "training.png", history.rows, history.best_epoch, title)
    plots.confusion(
        folder / "confusion.png", test.confusion, dataset.class_names, f"{title}: test accuracy {test.accuracy:.2%}"
    )
    plots.noise(folder / "noise.png", noise, len(dataset.class_names), f"{title}: Gaussian noise")
    seconds = [row.seconds for row in history.rows]
    metrics = {
        "model": config.model,
        "backend": config.backend,
        "fused": config.fused,
        "data": dataset.name,
        "device": setting.device.name,
        "outcome": history.outcome,
        "epochs": len(history.rows),
        "best_epoch": history.best_epoch,
        "parameters": learner.parameter_count,
        "seconds_per_epoch": float(np.median(seconds)) if seconds else None,
        "seconds": time.perf_counter() - began,
        "val": val.summary(),
        "test": test.summary(),
        "noise": {str(sigma): {"accuracy": e.accuracy, "macro_f1": e.macro_f1} for sigma, e in noise.items()},
    }
    run_folder.write_json(folder / "metrics.json", metrics)
    if history.outcome in ("finished", "stopped early"):
        run_folder.forget_state(folder)
    print_summary(metrics, val, test, noise, folder)
