"""What a run is: one frozen dataclass, and the presets. Imports nothing heavy; `--help` and `--list` need only this."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_origin

from . import InputError

ACTIVATIONS = ("relu", "leaky_relu", "silu", "gelu", "gelu_tanh")
OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("constant", "linear", "exponential")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("fp32", "tf32", "bf16")
PRODUCTS = ("auto", "cupy", "cublaslt", "own")
FULL = "full"  # the batch size that means the whole training set


@dataclass(frozen=True)
class Config:
    """Everything that decides the outcome of a run. Losses are batch means, so lr does not scale with the batch."""

    model: str
    hidden: tuple[int, ...]  # widths of the hidden layers
    activation: str = "relu"
    batch_size: int | str = 512  # rows per step, or "full"
    optimizer: str = "adam"
    lr: float = 0.001  # of the first epoch
    schedule: str = "constant"
    decay: float = 1e-5  # linear: lr falls by this much every epoch, down to 0
    gamma: float = 0.98  # exponential: lr is multiplied by this every epoch
    momentum: float = 0.0  # sgd
    beta1: float = 0.9  # adam
    beta2: float = 0.999  # adam
    eps: float = 1e-8  # adam
    l2: float = 0.0  # weight decay: l2 * parameter is added to the gradient, as in torch.optim
    decoupled: bool = False  # adam: decay the parameters directly instead, as in AdamW
    epochs: int = 30  # at most
    patience: int | None = None  # stop after this many epochs without a lower validation loss
    seed: int = 0  # weights, batches and noise
    data: str = "auto"
    device: str = "auto"
    fused: bool = False
    precision: str = "fp32"  # of the factors of matrix products; sums and parameters are float32 always
    # Whose matrix products on a GPU; auto: cuBLASLt's where nvmath is installed, and in tf32 and bf16 ours where they
    # are faster; else CuPy's.
    gemm: str = "auto"
    memory_limit: int | None = None  # bytes of device memory

    def __post_init__(self):
        _one_of("--activation", self.activation, ACTIVATIONS)
        _one_of("--optimizer", self.optimizer, OPTIMIZERS)
        _one_of("--schedule", self.schedule, SCHEDULES)
        _one_of("--device", self.device, DEVICES)
        _one_of("--precision", self.precision, PRECISIONS)
        _one_of("--gemm", self.gemm, PRODUCTS)
        if self.memory_limit is not None:
            _whole("--memory-limit", self.memory_limit, 1, 2**63 - 1)
        for width in self.hidden:
            _whole("--hidden", width, 1, 65536)
        if self.batch_size != FULL:
            _whole("--batch-size", self.batch_size, 1, 2**31 - 1)
        _whole("--epochs", self.epochs, 1, 10**6)
        _whole("--seed", self.seed, 0, 2**63 - 1)
        if self.patience is not None:
            _whole("--patience", self.patience, 1, 10**6)
        _number("--lr", self.lr, 0.0, math.inf, open_low=True)
        _number("--decay", self.decay, 0.0, math.inf)
        _number("--gamma", self.gamma, 0.0, 1.0, open_low=True)
        _number("--momentum", self.momentum, 0.0, 1.0)
        _number("beta1", self.beta1, 0.0, 1.0, open_high=True)
        _number("beta2", self.beta2, 0.0, 1.0, open_high=True)
        _number("eps", self.eps, 0.0, math.inf, open_low=True)
        _number("--l2", self.l2, 0.0, math.inf)
        if self.momentum and self.optimizer != "sgd":
            raise InputError("--momentum belongs to --optimizer sgd; adam has its own first moment, beta1")
        if self.decoupled and self.optimizer != "adam":
            raise InputError("--decoupled belongs to --optimizer adam")


def _one_of(flag, value, allowed):
    if value not in allowed:
        raise InputError(f"{flag} {value} is unknown; choose one of {', '.join(allowed)}")


def _whole(flag, value, low, high):
    if not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{flag} {value} is not possible; give a whole number from {low} to {high}")


def _number(flag, value, low, high, open_low=False, open_high=False):
    inside = (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
    if not inside or math.isinf(value):
        lower, upper = "above" if open_low else "of at least", "below" if open_high else "at most"
        interval = f"{lower} {low:g}" + ("" if math.isinf(high) else f" and {upper} {high:g}")
        raise InputError(f"{flag} {value} is not possible; give a finite number {interval}")


_M0 = Config("m0", (128, 64), optimizer="sgd", lr=0.01, batch_size=256)
_M1G = Config("m1g", (400, 240, 120), patience=5)

# Values as published. Their gradients were batch sums, so an l2 of 0.01 weighs 512 times more here than it did
# there: m1c and m1d reach what they had with --l2 2e-5.
PRESETS = {
    "m0": _M0,
    "m1": dataclasses.replace(_M1G, model="m1"),  # the best of m1a-m1h
    "m1a": Config("m1a", (128, 64), optimizer="sgd", lr=0.01, momentum=0.9, patience=5),
    "m1b": Config("m1b", (128, 64), patience=5),
    "m1c": Config("m1c", (128, 64), l2=0.01),
    "m1d": Config("m1d", (128, 64), optimizer="sgd", lr=0.01, momentum=0.9, l2=0.01, patience=10),
    "m1e": Config("m1e", (128, 64), schedule="linear", decay=1e-5, patience=5),
    "m1f": Config("m1f", (128, 64), schedule="exponential", gamma=0.98, patience=5),
    "m1g": _M1G,
    "m1h": Config("m1h", (370, 370), patience=5),
}


def preset(name: str, **changes) -> Config:
    """The preset `name` with fields replaced; InputError for an unknown name or an impossible value."""
    if name not in PRESETS:
        raise InputError(f"--model {name} is unknown; choose one of {', '.join(PRESETS)} (see --list)")
    if changes.get("optimizer", "sgd") != "sgd":
        changes.setdefault("momentum", 0.0)  # the preset's momentum goes with its optimizer
    return dataclasses.replace(PRESETS[name], **changes)


def from_flags(name: str, **given) -> Config:
    """preset() for values that the user typed: one that nothing would read is an InputError, too."""
    config = preset(name, **given)
    for flag, needed in (("decay", "linear"), ("gamma", "exponential")):
        if flag in given and config.schedule != needed:
            raise InputError(f"--{flag} belongs to --schedule {needed}; the schedule is {config.schedule}")
    if config.decoupled and not config.l2:
        raise InputError("--decoupled says how --l2 is applied; give --l2 too")
    return config


def with_file(path: Path, given: dict) -> dict:
    """The fields in the file `path` and, over them, those that flags have given. What the file has for an optimizer
    or a schedule goes when a flag gives another one."""
    fields = read(path)
    for owner, owned in (("optimizer", ("momentum", "decoupled")), ("schedule", ("decay", "gamma"))):
        if owner in given and given[owner] != fields.get(owner):
            fields = {name: value for name, value in fields.items() if name not in owned}
    return fields | given


def read(path: Path) -> dict:
    """The fields of Config in a JSON file {"config": {"lr": 0.002, ...}}, such as the best.json of a search; InputError
    for a file that is missing, damaged, or holds fields or values that no configuration has."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))["config"]
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    except OSError as error:
        raise InputError(f"--config {path} cannot be read ({error.strerror}); give the best.json of a search") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f'--config {path} is not a configuration ({reason}), expected JSON such as {{"config": {{"lr": 0.002}}}}; '
            "give the best.json of a search"
        ) from None
    kinds = {field.name: field.type for field in dataclasses.fields(Config) if field.name != "model"}
    for name, value in fields.items():
        if name not in kinds:
            raise InputError(f"--config {path} has {name}, which is no field; use {', '.join(kinds)}")
        if not _fits(value, kinds[name]):
            kind = getattr(kinds[name], "__name__", kinds[name])
            raise InputError(f"--config {path} has {value!r} for {name}, expected {kind}; correct it")
    try:
        Config(**{"model": "", "hidden": (1,)} | fields)
    except InputError as error:
        raise InputError(f"--config {path} cannot be used: {error}") from None
    return fields


def _fits(value, kind) -> bool:
    """Whether a value from JSON is of a field's type."""
    if isinstance(value, tuple):
        return get_origin(kind) is tuple and all(_fits(one, get_args(kind)[0]) for one in value)
    if isinstance(value, bool) or get_origin(kind) is tuple:
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def parse_hidden(text: str) -> tuple[int, ...]:
    """'400,240,120' -> (400, 240, 120)."""
    try:
        return tuple(int(width) for width in text.split(","))
    except ValueError:
        raise InputError(f"--hidden {text} is not a list of widths; give whole numbers such as 400,240,120") from None


def parse_batch_size(text: str) -> int | str:
    """'512' -> 512; 'full' stays."""
    if text == FULL:
        return text
    try:
        return int(text)
    except ValueError:
        raise InputError(f"--batch-size {text} is not possible; give a whole number or 'full'") from None


_UNITS = {"": 1} | {f"{k}{b}": 1000**n for n, k in enumerate("KMGT", 1) for b in ("", "B")}
_UNITS |= {f"{k}IB": 1024**n for n, k in enumerate("KMGT", 1)}


def parse_bytes(text: str) -> int:
    """'4GB' -> 4000000000; '512MiB' -> 536870912; '1000' -> 1000."""
    number = text.rstrip("KMGTIBkmgtib")
    try:
        return int(float(number) * _UNITS[text[len(number) :].upper()])
    except (ValueError, KeyError, OverflowError):
        raise InputError(f"--memory-limit {text} is no amount of memory; give bytes such as 4GB or 512MiB") from None


def format_bytes(count: int) -> str:
    """1234567 -> '1.24 MB': rounded up, so that it is enough."""
    for power, unit in ((3, "GB"), (2, "MB"), (1, "KB")):
        if count >= 1000**power:
            return f"{math.ceil(count / 1000**power * 100) / 100:g} {unit}"
    return f"{count} B"


def describe(config: Config) -> str:
    """One line: layers, optimizer, schedule and stopping rule."""
    parts = [
        "784-" + "-".join(map(str, config.hidden)) + "-classes",
        config.activation,
        f"{config.optimizer} lr {config.lr:g}" + (f" momentum {config.momentum:g}" if config.momentum else ""),
        {
            "constant": "constant",
            "linear": f"linear -{config.decay:g}/epoch",
            "exponential": f"exponential x{config.gamma:g}/epoch",
        }[config.schedule],
    ]
    if config.l2:
        parts.append(f"{'decoupled decay' if config.decoupled else 'l2'} {config.l2:g}")
    parts.append(f"batch {config.batch_size}, at most {config.epochs} epochs")
    if config.patience:
        parts.append(f"patience {config.patience}")
    if config.precision != "fp32":
        parts.append(f"{config.precision} products")
    return ", ".join(parts)
