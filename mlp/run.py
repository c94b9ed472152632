"""A run from a configuration to a finished folder: load, train, judge, write."""

import csv
import json
import platform
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np

from . import InputError, checkpoint, data, plots, products, ranges, tuning
from .configs import Config, describe
from .device import select
from .evaluate import NOISE_SIGMA, Evaluation
from .explain import explain as explain_step
from .files import file_name, make_folder
from .loop import EpochRow, History, Reporter, fit
from .scratch import ScratchLearner


class ConsoleReporter(Reporter):
    """A progress bar on a terminal, and a line per epoch everywhere."""

    def begin_epoch(self, epoch, epochs, images):
        from tqdm import tqdm

        self._bar = tqdm(
            total=images, desc=f"epoch {epoch}/{epochs}", unit=" images", unit_scale=True, leave=False, disable=None
        )
        self.wants_readings = not self._bar.disable

    def advance(self, images):
        self._bar.update(images)

    def reading(self, loss, accuracy):
        self._bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.2%}", refresh=False)

    def end_epoch(self, row, best):
        self._bar.close()
        print(
            f"epoch {row.epoch:3d}  lr {row.lr:.2e}  train {row.train_loss:.4f} {row.train_accuracy:7.2%}  "
            f"val {row.val_loss:.4f} {row.val_accuracy:7.2%}  {row.seconds:6.2f} s  "
            f"{row.images_per_second:9,.0f} images/s{'  *' if best else ''}",
            flush=True,
        )


def train(
    config: Config, out: Path | None = None, *, nvtx: bool = False, tune: bool = False, explain: bool = False
) -> int:
    """Train `config`, judge it and write the run's folder (`out`, or a new one under runs/).

    nvtx: mark the phases for Nsight Systems. tune: time the forms of the layers first, see tuning.py. explain: print
    what a step does instead of training.

    Prints as it goes. Returns the exit status: 0, 130 after Ctrl-C, 1 where the loss became NaN or infinite;
    in each case the folder holds the results of the best epoch. InputError for whatever the user can mend.
    """
    began = time.perf_counter()
    _refuse_used_folder(out)  # before a download of half a gigabyte
    annotate = ranges.nvtx_annotate() if nvtx else nullcontext
    device = select_device(config)
    if config.backend == "torch" and (tune or explain):
        raise InputError(f"--{'tune' if tune else 'explain'} belongs to --backend scratch; leave it out")
    dataset = data.load(config.data)
    split = data.stratified_split(dataset.labels)
    learner, entry = make_learner(config, dataset, device, len(split.train), tune)
    if explain:
        learner.begin_epoch(split.train)
        print(explain_step(learner, entry))
        return 0
    if nvtx:
        ranges.attach(learner, annotate)
    folder = _make_folder(out, config, dataset.name)  # last: whatever is refused leaves no folder behind
    for notice in filter(None, (dataset.notice, learner.notice)):
        print(f"\n*** {notice} ***\n")
    _write_json(folder / "config.json", _provenance(learner, dataset, device))
    kernels = "fused kernels" if config.fused else "torch" if config.backend == "torch" else "plain array code"
    print(
        f"{config.model} ({kernels}) on {dataset.name}: {len(split.train):,} / {len(split.val):,} / "
        f"{len(split.test):,} images to train / validate / test, {len(dataset.class_names)} classes\n"
        f"{describe(config)}; {learner.parameter_count:,} parameters\ndevice: {device.name}"
    )
    with np.errstate(over="ignore", invalid="ignore"):  # a loss that diverges is reported once, as such
        history = fit(learner, split, config, ConsoleReporter(), lambda h: _write_history(folder, h.rows), annotate)
    return _finish(config, dataset, device, split, learner, history, folder, began)


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


def make_learner(config: Config, dataset: data.Dataset, device, train_rows: int, tune: bool = False):
    """The learner for `config` on select_device()'s device; one from scratch has its layers in the forms that are the
    fastest as far as it is known. Beside it what tuning.plan() knows of them."""
    if config.backend == "torch":
        return _torch_models().TorchLearner(config, dataset, device.kind, train_rows), {}
    chosen = products.select(config, device)
    sizes = (dataset.images.shape[1], *config.hidden, len(dataset.class_names))
    batch = config.batch_of(train_rows)
    plan, entry = tuning.plan(config, device, chosen, sizes, min(batch, device.chunk_rows), tune)
    return ScratchLearner(config, dataset, device, train_rows, chosen, plan), entry


def _finish(config, dataset, device, split, learner, history: History, folder: Path, began: float) -> int:
    """Judge the best parameters and write everything that is left to write."""
    _write_history(folder, history.rows)
    checkpoint.save(folder / "checkpoint.npz", learner.arrays(), config, dataset.class_names, dataset.name)
    val, test = learner.evaluate(split.val), learner.evaluate(split.test)
    noise = {sigma: learner.evaluate(split.test, sigma) if sigma else test for sigma in NOISE_SIGMA}
    title = f"{config.model}{' fused' if config.fused else ''} on {dataset.name}"
    labelled = ([name, *row] for name, row in zip(dataset.class_names, test.confusion.tolist()))
    _write_csv(folder / "confusion.csv", ["label \\ predicted", *dataset.class_names], labelled)
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
        "device": device.name,
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
    _write_json(folder / "metrics.json", metrics)
    _print_summary(metrics, val, test, noise, folder)
    if history.outcome == "diverged":
        print("error: the loss became NaN or infinite; try a lower --lr", file=sys.stderr)
    return {"interrupted": 130, "diverged": 1}.get(history.outcome, 0)


def _print_summary(metrics: dict, val: Evaluation, test: Evaluation, noise: dict, folder: Path) -> None:
    print(f"\n{metrics['outcome']} after {metrics['epochs']} epochs; kept epoch {metrics['best_epoch']}")
    print(f"{'':12}{'images':>9}{'accuracy':>11}{'macro F1':>11}{'cross-entropy':>16}")
    for name, part in (("validation", val), ("test", test)):
        print(f"{name:12}{part.n:9,}{part.accuracy:11.2%}{part.macro_f1:11.2%}{part.cross_entropy:16.4f}")
    print(f"{'noise sigma':12}" + "".join(f"{sigma:9.1f}" for sigma in noise))
    print(f"{'accuracy':12}" + "".join(f"{e.accuracy:9.2%}" for e in noise.values()))
    print(f"{'macro F1':12}" + "".join(f"{e.macro_f1:9.2%}" for e in noise.values()))
    per_epoch = metrics["seconds_per_epoch"]
    print((f"{per_epoch:.2f} s per epoch; " if per_epoch else "") + f"results in {folder}")


def _refuse_used_folder(out: Path | None) -> None:
    try:
        used = out is not None and (out / "config.json").exists()
    except OSError as error:
        raise InputError(f"--out {out} cannot be used ({error.strerror}); give another folder") from None
    if used:
        raise InputError(f"--out {out} already holds a run; give another folder")


def _make_folder(out: Path | None, config: Config, data_name: str) -> Path:
    """Create the run's folder and see that it can be written."""
    if out is None:
        name = f"{config.model}{'-fused' if config.fused else ''}-{file_name(data_name)}"
        out = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        while out.exists():  # another run of the same second
            out = out.with_name(out.name + "x")
    return make_folder(out)


def _provenance(learner, dataset: data.Dataset, device) -> dict:
    """The configuration, and what else decides the result."""
    return asdict(learner.config) | {
        **learner.provenance(),
        "data_name": dataset.name,
        "data_sha256": dataset.checksum,
        "class_names": dataset.class_names,
        "device_name": device.name,
        "command": sys.argv,
        "versions": {"python": platform.python_version()} | {m.__name__: m.__version__ for m in learner.modules()},
    }


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_history(folder: Path, rows: list[EpochRow]) -> None:
    names = [field.name for field in fields(EpochRow)]
    _write_csv(folder / "history.csv", names, ([getattr(row, name) for name in names] for row in rows))


def _write_csv(path: Path, header, rows) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
