"""What a run prints."""

from pathlib import Path

from .configs import describe
from .evaluate import Evaluation
from .loop import Reporter


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


def print_setting(setting) -> None:
    """What is trained on what; setting: a run.Setting."""
    config, dataset, split, learner = setting.config, setting.dataset, setting.split, setting.learner
    for notice in filter(None, (dataset.notice, learner.notice)):
        print(f"\n*** {notice} ***\n")
    kernels = "fused kernels" if config.fused else "torch" if config.backend == "torch" else "plain array code"
    processes = f", {setting.job.size} processes" if setting.job.size > 1 else ""
    print(
        f"{config.model} ({kernels}) on {dataset.name}: {len(split.train):,} / {len(split.val):,} / "
        f"{len(split.test):,} images to train / validate / test, {len(dataset.class_names)} classes\n"
        f"{describe(config)}; {learner.parameter_count:,} parameters\ndevice: {setting.device.name}{processes}"
    )


def print_summary(metrics: dict, val: Evaluation, test: Evaluation, noise: dict, folder: Path) -> None:
    print(f"\n{metrics['outcome']} after {metrics['epochs']} epochs; kept epoch {metrics['best_epoch']}")
    print(f"{'':12}{'images':>9}{'accuracy':>11}{'macro F1':>11}{'cross-entropy':>16}")
    for name, part in (("validation", val), ("test", test)):
        print(f"{name:12}{part.n:9,}{part.accuracy:11.2%}{part.macro_f1:11.2%}{part.cross_entropy:16.4f}")
    print(f"{'noise sigma':12}" + "".join(f"{sigma:9.1f}" for sigma in noise))
    print(f"{'accuracy':12}" + "".join(f"{e.accuracy:9.2%}" for e in noise.values()))
    print(f"{'macro F1':12}" + "".join(f"{e.macro_f1:9.2%}" for e in noise.values()))
    per_epoch = metrics["seconds_per_epoch"]
    print((f"{per_epoch:.2f} s per epoch; " if per_epoch else "") + f"results in {folder}")
