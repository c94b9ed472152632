"""What a run is: one frozen dataclass, and the presets. Imports nothing heavy; `--help` and `--list` need only this."""

import dataclasses
import math
import sys
from dataclasses import dataclass

from . import InputError

ACTIVATIONS = ("relu", "leaky_relu", "silu", "gelu", "gelu_tanh")
OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("constant", "linear", "exponential", "cosine")
BACKENDS = ("scratch", "torch")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("fp32", "tf32", "bf16")
PRODUCTS = ("auto", "cupy", "cublaslt", "own")
FULL = "full"  # the batch size that means the whole training set


@dataclass(frozen=True)
class Config:
    """Everything that decides the outcome of a run. Losses are batch means, so lr does not scale with the batch."""

    model: str
    hidden: tuple[int, ...]  # widths of the hidden layers
    backend: str = "scratch"  # or "torch"
    activation: str = "relu"
    batch_norm: bool = False  # between the product and the activation of every hidden layer
    dropout: float = 0.0  # probability that an output of a hidden layer is dropped
    batch_size: int | str = 512  # rows per step, or "full"
    optimizer: str = "adam"
    lr: float = 0.001  # of the first epoch
    schedule: str = "constant"
    decay: float = 1e-5  # linear: lr falls by this much every epoch, down to 0
    gamma: float = 0.98  # exponential: lr is multiplied by this every epoch
    warmup: int = 0  # epochs in which lr rises to its value, step by step
    momentum: float = 0.0  # sgd
    beta1: float = 0.9  # adam
    beta2: float = 0.999  # adam
    eps: float = 1e-8  # adam
    l2: float = 0.0  # weight decay: l2 * parameter is added to the gradient, as in torch.optim
    decoupled: bool = False  # adam: decay the parameters directly instead, as in AdamW
    label_smoothing: float = 0.0  # share of the target that is spread over all classes
    class_balance: float = 0.0  # 0: every image counts the same; towards 1: every class, see loss.py
    ema: float = 0.0  # decay of the average of the parameters that is judged and kept in their place; 0: none
    train_noise: float = 0.0  # largest sigma of the noise on training images; each has one of its own in [0, this]
    augment: float = 0.0  # strength of the random affine maps of training images; 1: see loss.py
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
    compile: bool = False  # torch: by torch.compile

    def __post_init__(self):
        _one_of("--backend", self.backend, BACKENDS)
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
        _whole("--warmup", self.warmup, 0, self.epochs)
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
        _number("--dropout", self.dropout, 0.0, 1.0, open_high=True)
        _number("--label-smoothing", self.label_smoothing, 0.0, 1.0, open_high=True)
        _number("--class-balance", self.class_balance, 0.0, 1.0, open_high=True)
        _number("--ema", self.ema, 0.0, 1.0, open_high=True)
        _number("--train-noise", self.train_noise, 0.0, 10.0)
        _number("--augment", self.augment, 0.0, 3.0)
        if self.momentum and self.optimizer != "sgd":
            raise InputError("--momentum belongs to --optimizer sgd; adam has its own first moment, beta1")
        if self.decoupled and self.optimizer != "adam":
            raise InputError("--decoupled belongs to --optimizer adam")
        if self.backend == "torch":
            for flag in ("precision", "gemm", "memory_limit"):
                if getattr(self, flag) != getattr(Config, flag):
                    raise InputError(f"--{flag.replace('_', '-')} belongs to --backend scratch; leave it out")
        elif self.compile:
            raise InputError("--compile belongs to --backend torch; give that, too, or leave it out")

    def batch_of(self, train_rows: int) -> int:
        """Rows per step where train_rows are trained on."""
        return train_rows if self.batch_size == FULL else min(self.batch_size, train_rows)


def _one_of(flag, value, allowed):
    if value not in allowed:
        raise InputError(f"{flag} {value} is unknown; choose one of {', '.join(allowed)}")


def _whole(flag, value, low, high):
    if not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{flag} {value} is not possible; give a whole number from {low} to {high}")


def _number(flag, value, low, high, open_low=False, open_high=False):
    inside = (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
    if not inside or abs(value) > sys.float_info.max:  # whole numbers may be larger than any float
        lower, upper = "above" if open_low else "of at least", "below" if open_high else "at most"
        interval = f"{lower} {low:g}" + ("" if math.isinf(high) else f" and {upper} {high:g}")
        raise InputError(f"{flag} {value} is not possible; give a finite number {interval}")


_M0 = Config("m0", (128, 64), optimizer="sgd", lr=0.01, batch_size=256)
_M1G = Config("m1g", (400, 240, 120), patience=5)
_M1 = dataclasses.replace(_M1G, model="m1")  # the best of m1a-m1h
_M3 = Config("m3", (400, 400), backend="torch", activation="silu", batch_norm=True, dropout=0.3, l2=1e-4, patience=7)

# Values as published. Their gradients were batch sums, so an l2 of 0.01 weighs 512 times more here than it did
# there: m1c and m1d reach what they had with --l2 2e-5.
PRESETS = {
    "m0": _M0,
    "m1": _M1,
    "m1a": Config("m1a", (128, 64), optimizer="sgd", lr=0.01, momentum=0.9, patience=5),
    "m1b": Config("m1b", (128, 64), patience=5),
    "m1c": Config("m1c", (128, 64), l2=0.01),
    "m1d": Config("m1d", (128, 64), optimizer="sgd", lr=0.01, momentum=0.9, l2=0.01, patience=10),
    "m1e": Config("m1e", (128, 64), schedule="linear", decay=1e-5, patience=5),
    "m1f": Config("m1f", (128, 64), schedule="exponential", gamma=0.98, patience=5),
    "m1g": _M1G,
    "m1h": Config("m1h", (370, 370), patience=5),
    "m2": dataclasses.replace(_M1, model="m2", backend="torch"),
    "m3": _M3,  # the best of m3a and m3b
    "m3a": Config(
        "m3a", (256, 128, 64, 64), backend="torch", activation="gelu", dropout=0.2, l2=1e-4, patience=7
    ),
    "m3b": dataclasses.replace(_M3, model="m3b"),
    # From scratch, for images that are not clean; profile/results/study compares it with m3, profile/NOTES.md says
    # what else was tried.
    "robust": Config(
        "robust", (512, 512, 512), activation="silu", batch_norm=True, batch_size=256, lr=0.002, schedule="cosine",
        warmup=1, train_noise=0.5, augment=0.5,
    ),
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
            "cosine": "cosine",
        }[config.schedule],
    ]
    if config.batch_norm:
        parts.insert(1, "batch norm")
    for text, value in (
        ("dropout", config.dropout),
        ("warm-up of epochs", config.warmup),
        ("label smoothing", config.label_smoothing),
        ("class balance", config.class_balance),
        ("average of parameters", config.ema),
        ("noise up to", config.train_noise),
        ("augmentation", config.augment),
    ):
        if value:
            parts.append(f"{text} {value:g}")
    if config.l2:
        parts.append(f"{'decoupled decay' if config.decoupled else 'l2'} {config.l2:g}")
    parts.append(f"batch {config.batch_size}, at most {config.epochs} epochs")
    if config.patience:
        parts.append(f"patience {config.patience}")
    if config.precision != "fp32":
        parts.append(f"{config.precision} products")
    if config.backend == "torch":
        parts.append("torch" + (", compiled" if config.compile else ""))
    return ", ".join(parts)
