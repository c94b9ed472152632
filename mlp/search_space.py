"""What a search varies, and which fields of a configuration a point of that space stands for.

Every trial has every parameter: none exists only beside some value of another. TPE can so model all of them jointly,
and their importances compare. That is why the layers are a depth, the width of the first and a taper, by which each
next one is narrower: three numbers for every depth, where a width per layer would leave three of four without meaning
in a shallow network; and every published preset narrows, or keeps its width. For the same reason `final`, the share
of the learning rate that is left in the last epoch, stands for the decay of the linear schedule and for the gamma of
the exponential one, whatever the number of epochs; and an l2 below L2_LEAST is none at all.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from . import InputError
from .configs import SCHEDULES, Config

LR = {"adam": (1e-4, 1e-2), "sgd": (1e-3, 1.0)}
L2_LEAST = 1e-6  # a fifth of the (logarithmic) range is below it
WIDTH_MULTIPLE = 8  # of the widths: 16 bytes of bfloat16, what the fastest matrix products load at once


@dataclass(frozen=True)
class Space:
    """The parameters that are left to search in `base`, where the fields `fixed` have been decided. ranges: by name
    the kind of optuna.Trial.suggest_<kind>() and its arguments. InputError where nothing is left."""

    base: Config
    fixed: frozenset[str]
    ranges: dict[str, tuple[str, dict]]

    @classmethod
    def around(cls, base: Config, fixed: Collection[str]) -> "Space":
        low, high = LR[base.optimizer]
        ranges = {}
        if "hidden" not in fixed:
            ranges["depth"] = "int", {"low": 1, "high": 4}
            ranges["width"] = "int", {"low": 64, "high": 1024, "log": True}
            ranges["taper"] = "float", {"low": 0.4, "high": 1.0}
        if "lr" not in fixed:
            ranges["lr"] = "float", {"low": low, "high": high, "log": True}
        if not {"decay", "gamma"} & set(fixed):
            if "schedule" not in fixed:
                ranges["schedule"] = "categorical", {"choices": list(SCHEDULES)}
            if "schedule" not in fixed or base.schedule in ("linear", "exponential"):
                ranges["final"] = "float", {"low": 1e-3, "high": 0.5, "log": True}
        if "l2" not in fixed:
            ranges["l2"] = "float", {"low": 1e-7, "high": 1e-2, "log": True}
        if "batch_size" not in fixed:
            ranges["log2_batch"] = "int", {"low": 6, "high": 11}
        if not ranges:
            raise InputError("--search has nothing to choose, because flags decide all that it varies; leave one out")
        return cls(base, frozenset(fixed), ranges)

    def suggest(self, trial) -> dict:
        """The fields that this optuna.Trial is to try."""
        return self.fields(
            {name: getattr(trial, f"suggest_{kind}")(name, **range) for name, (kind, range) in self.ranges.items()}
        )

    def fields(self, point: dict) -> dict:
        """Parameters by name -> fields of Config. Numbers have few digits: what is shown and kept is what was tried."""
        fields = {}
        if "width" in point:
            widths = (point["width"] * point["taper"] ** layer for layer in range(point["depth"]))
            fields["hidden"] = tuple(max(1, round(width / WIDTH_MULTIPLE)) * WIDTH_MULTIPLE for width in widths)
        if "lr" in point:
            fields["lr"] = _rounded(point["lr"])
        if "schedule" in point:
            fields["schedule"] = point["schedule"]
        if "final" in point:
            falls = max(1, self.base.epochs - 1)
            schedule, lr = fields.get("schedule", self.base.schedule), fields.get("lr", self.base.lr)
            if schedule == "linear":
                fields["decay"] = _rounded(lr * (1 - point["final"]) / falls, 4)
            elif schedule == "exponential":
                fields["gamma"] = _rounded(point["final"] ** (1 / falls), 4)
        if "l2" in point:
            fields["l2"] = _rounded(point["l2"]) if point["l2"] >= L2_LEAST else 0.0
        if "log2_batch" in point:
            fields["batch_size"] = 2 ** point["log2_batch"]
        return fields

    def config(self, fields: dict) -> Config:
        """The configuration of a trial with these fields."""
        return replace(self.base, **fields)


def _rounded(value: float, digits: int = 3) -> float:
    return float(f"{value:.{digits}g}")


def as_flags(fields: dict) -> str:
    """Fields as train.py takes them: {"hidden": (400, 240), "lr": 0.001} -> '--hidden 400,240 --lr 0.001'."""
    return " ".join(
        f"--{name.replace('_', '-')} {','.join(map(str, v)) if isinstance(v, (tuple, list)) else v}"
        for name, v in fields.items()
    )
