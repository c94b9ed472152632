"""Where a training stands: everything that the rest of it depends on, kept in a run's folder and read back."""

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import InputError, archive, one_line
from .configs import Config
from .flags import Interval

STATE = "state.npz"


@dataclass(frozen=True)
class EpochRow:
    """A row of history.csv. Training loss and accuracy are those of the batches as they were trained on."""

    epoch: int  # from 1
    lr: float  # in the middle of the epoch
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float  # training only, without the validation
    images_per_second: float


@dataclass
class History:
    rows: list[EpochRow] = field(default_factory=list)
    best_epoch: int = 0  # whose parameters the learner ends with; 0: the initial ones
    outcome: str = "finished"  # or "stopped early", "interrupted", "terminated", "diverged"
    fault: str = ""  # where it diverged, for people


@dataclass
class Progress:
    """state: what the learner's next step depends on (learner.state()); best: its best parameters (snapshot()). The
    order of the images, the noise and the dropout follow from the seed and the place, which is `epoch` and `done`."""

    state: dict
    best: dict
    history: History = field(default_factory=History)
    best_loss: float = math.inf
    epoch: int = 1  # the one that is trained now
    done: int = 0  # how many of its images have been trained on
    seconds: float = 0.0  # what that took


class Keeper:
    """Writes a run's progress into its folder, as often as `interval` says."""

    def __init__(self, folder: Path, config: Config, data_sha256: str, interval: Interval):
        self.path, self.interval = folder / STATE, interval
        self._about = {"config": asdict(config), "data_sha256": data_sha256}
        self._written, self._epoch = time.monotonic(), None

    def due(self, epoch: int) -> bool:
        """Whether it is time again, in `epoch`."""
        if self._epoch is None:
            self._epoch = epoch
        if self.interval.epochs is not None:
            return epoch - self._epoch >= self.interval.epochs
        return self.interval.seconds is not None and time.monotonic() - self._written >= self.interval.seconds

    def save(self, progress: Progress, learner) -> None:
        """Write it, whole or not at all."""
        history = progress.history
        about = {
            "rows": [asdict(row) for row in history.rows],
            "best_epoch": history.best_epoch,
            **{name: getattr(progress, name) for name in ("best_loss", "epoch", "done", "seconds")},
        }
        arrays = {f"state/{name}": array for name, array in learner.to_host(progress.state).items()}
        arrays |= {f"best/{name}": array for name, array in learner.to_host(progress.best).items()}
        archive.write(self.path, "state", self._about | about, arrays)
        self._written, self._epoch = time.monotonic(), progress.epoch
        self.place = f"epoch {progress.epoch}, after {progress.done:,} of its images"

    def load(self, learner) -> Progress | None:
        """What save() wrote last, for this learner; None where nothing was written yet. InputError for a file that is
        damaged, of another format, or of another run."""
        try:
            about, arrays = archive.read(self.path)
            if about["kind"] != "state":
                raise ValueError(f"it is a {about['kind']}, expected the state of a run")
            rows = [EpochRow(**row) for row in about["rows"]]
            history = History(rows, about["best_epoch"])
            place = {name: about[name] for name in ("best_loss", "epoch", "done", "seconds")}
            self._check(about, arrays, learner)
        except FileNotFoundError:
            return None
        except InputError:
            raise
        except archive.NewerFormat as error:
            raise InputError(
                f"{self.path} has checkpoint format {error}, and this version reads format {archive.FORMAT}; "
                "resume the run with the version that wrote it"
            ) from None
        except Exception as error:
            reason = one_line(error)
            raise InputError(
                f"{self.path} is not a readable checkpoint ({reason}); delete it to begin the run again from the start"
            ) from None
        state, best = (
            {name.removeprefix(part): array for name, array in arrays.items() if name.startswith(part)}
            for part in ("state/", "best/")
        )
        return Progress(learner.from_host(state), learner.from_host(best), history, **place)

    def _check(self, about, arrays, learner) -> None:
        """InputError unless this is the state of this very run."""
        own = json.loads(json.dumps(self._about))
        differing = [name for name, value in own["config"].items() if about["config"].get(name) != value]
        differing += ["data"] * (about["data_sha256"] != own["data_sha256"])
        fresh = {f"state/{name}": x for name, x in learner.to_host(learner.state()).items()}
        fresh |= {f"best/{name}": x for name, x in learner.to_host(learner.snapshot()).items()}
        fits = all(name in arrays and _form(name, x) == _form(name, arrays[name]) for name, x in fresh.items())
        more = {name.removeprefix("state/"): x for name, x in arrays.items() if name not in fresh}
        if not differing and not (fits and all(learner.could_have(name, x) for name, x in more.items())):
            differing.append("arrays")
        if differing:
            raise InputError(
                f"{self.path} belongs to another run (what differs: {', '.join(differing)}); "
                "delete it to begin the run again from the start"
            )


def _form(name: str, array) -> tuple:
    """What must be equal of two arrays; the totals have a row for each process of a job."""
    return array.shape[1:] if name == "state/totals" else array.shape, array.dtype
