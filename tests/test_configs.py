"""Presets and their fields: the published values, no field that nothing reads, bad values named by flag."""

import ast
import dataclasses
import json
import math
from pathlib import Path

import pytest

from mlp import InputError, config_file, configs, flags
from mlp.configs import Config, preset

from .training import ROOT

# The published models. What is not listed was not given, and has the defaults of DEFAULTS.
PUBLISHED = {
    "m0": dict(hidden=(128, 64), optimizer="sgd", lr=0.01, batch_size=256),
    "m1a": dict(hidden=(128, 64), optimizer="sgd", momentum=0.9, patience=5, lr=0.01),
    "m1b": dict(hidden=(128, 64), optimizer="adam", lr=0.001, patience=5),
    "m1c": dict(hidden=(128, 64), optimizer="adam", lr=0.001, l2=0.01),
    "m1d": dict(hidden=(128, 64), optimizer="sgd", momentum=0.9, l2=0.01, patience=10, lr=0.01),
    "m1e": dict(hidden=(128, 64), optimizer="adam", lr=0.001, schedule="linear", decay=1e-5, patience=5),
    "m1f": dict(hidden=(128, 64), optimizer="adam", lr=0.001, schedule="exponential", gamma=0.98, patience=5),
    "m1g": dict(hidden=(400, 240, 120), optimizer="adam", lr=0.001, patience=5),
    "m1h": dict(hidden=(370, 370), optimizer="adam", lr=0.001, patience=5),
    "m1": dict(hidden=(400, 240, 120), optimizer="adam", lr=0.001, patience=5),
    "m2": dict(hidden=(400, 240, 120), optimizer="adam", lr=0.001, patience=5, backend="torch"),
    "m3a": dict(hidden=(256, 128, 64, 64), activation="gelu", dropout=0.2, l2=1e-4, patience=7, backend="torch"),
    "m3b": dict(
        hidden=(400, 400), activation="silu", batch_norm=True, dropout=0.3, l2=1e-4, patience=7, backend="torch"
    ),
}
DEFAULTS = dict(
    activation="relu", batch_size=512, schedule="constant", momentum=0.0, beta1=0.9, beta2=0.999, eps=1e-8,
    l2=0.0, decoupled=False, batch_norm=False, dropout=0.0, backend="scratch", warmup=0, label_smoothing=0.0,
    class_balance=0.0, ema=0.0, train_noise=0.0, augment=0.0, compile=False, epochs=30,
    patience=None, seed=0, data="auto", device="auto", fused=False,
    precision="fp32", gemm="auto", memory_limit=None,
)  # fmt: skip
PARAMETERS = {"m1": 444_847, "m1g": 444_847, "m1h": 445_157}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_equal_the_published_models(name):
    config = preset(name)
    expected = DEFAULTS | PUBLISHED[name] | {"model": name}
    assert {field: getattr(config, field) for field in expected} == expected


def test_a_derived_preset_has_no_hyperparameter_of_its_own():
    m1, m3b = preset("m1"), preset("m3b")
    assert preset("m2") == dataclasses.replace(m1, model="m2", backend="torch")
    assert preset("m3") == dataclasses.replace(m3b, model="m3")


@pytest.mark.parametrize("name", PARAMETERS)
def test_presets_have_the_published_number_of_parameters(name):
    sizes = (784, *preset(name).hidden, 47)
    assert sum((a + 1) * b for a, b in zip(sizes, sizes[1:])) == PARAMETERS[name]


def test_every_preset_bears_its_name_and_is_described():
    for name, config in configs.PRESETS.items():
        assert config.model == name
        text = configs.describe(config)
        assert "\n" not in text and config.optimizer in text
        assert "-".join(map(str, config.hidden)) in text


def fields_read(source: str) -> set[str]:
    """Names read as attributes of something called config, or c, in Python source."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and getattr(node.value, "id", getattr(node.value, "attr", "")) in ("config", "c")
    }


def test_the_search_for_readers_finds_only_readers():
    source = "config.a; self.config.b; c.c(1); config.d = 1; other.e; 'config.f'; config"
    assert fields_read(source) == set("abc")


def test_every_field_is_read():
    sources = [path for path in (ROOT / "mlp").glob("*.py") if path.name != "configs.py"]
    assert len(sources) > 5
    read = set().union(*(fields_read(Path(path).read_text(encoding="utf-8")) for path in sources))
    assert {"batch_size", "model"} & read == {"model"} and Config.batch_of  # which reads batch_size for all
    read.add("batch_size")
    assert {field.name for field in dataclasses.fields(Config)} - read == set()


BAD = [
    ("--activation", "activation", "tanhh"),
    ("--activation", "activation", "identity"),
    ("--optimizer", "optimizer", "adamw"),
    ("--schedule", "schedule", "staircase"),
    ("--device", "device", "tpu"),
    ("--precision", "precision", "fp16"),
    ("--gemm", "gemm", "cutlass"),
    ("--memory-limit", "memory_limit", 0),
    ("--hidden", "hidden", (400, 0)),
    ("--hidden", "hidden", (-1,)),
    ("--hidden", "hidden", (1.5,)),
    ("--hidden", "hidden", (65537,)),
    ("--batch-size", "batch_size", 0),
    ("--batch-size", "batch_size", -5),
    ("--batch-size", "batch_size", 2**31),
    ("--batch-size", "batch_size", "half"),
    ("--batch-size", "batch_size", 1.5),
    ("--batch-size", "batch_size", None),
    ("--epochs", "epochs", 0),
    ("--epochs", "epochs", -1),
    ("--epochs", "epochs", 2.0),
    ("--seed", "seed", -1),
    ("--seed", "seed", 2**63),
    ("--patience", "patience", 0),
    ("--patience", "patience", -1),
    *[("--lr", "lr", value) for value in (0.0, -0.1, math.nan, math.inf, -math.inf)],
    *[("--decay", "decay", value) for value in (-1e-9, math.nan, math.inf)],
    *[("--gamma", "gamma", value) for value in (0.0, -0.5, 1.01, math.nan)],
    *[("--momentum", "momentum", value) for value in (-0.1, 1.1, math.nan)],
    *[("--l2", "l2", value) for value in (-0.1, math.nan, math.inf)],
    *[("beta1", "beta1", value) for value in (-0.1, 1.0, math.nan)],  # at 1 the bias correction divides by 0
    *[("beta2", "beta2", value) for value in (-0.1, 1.0, math.nan)],
    ("--backend", "backend", "jax"),
    ("--warmup", "warmup", -1),
    ("--warmup", "warmup", 31),  # longer than the training
    *[("--dropout", "dropout", value) for value in (-0.1, 1.0, math.nan)],
    *[("--label-smoothing", "label_smoothing", value) for value in (-0.1, 1.0, math.nan)],
    *[("--class-balance", "class_balance", value) for value in (-0.1, 1.0, math.nan)],
    *[("--ema", "ema", value) for value in (-0.1, 1.0, math.nan)],
    *[("--train-noise", "train_noise", value) for value in (-0.1, 11.0, math.nan)],
    *[("--augment", "augment", value) for value in (-0.1, 3.5, math.nan)],
    *[("eps", "eps", value) for value in (0.0, -1e-8, math.nan, math.inf)],
]


@pytest.mark.parametrize("flag, field, value", BAD, ids=lambda x: str(x))
def test_an_impossible_value_is_named_by_its_flag(flag, field, value):
    changes = {field: value} | ({"optimizer": "sgd"} if field == "momentum" else {})
    with pytest.raises(InputError) as error:
        preset("m1", **changes)
    message = str(error.value)
    shown = value[-1] if isinstance(value, tuple) else value
    assert message.startswith(f"{flag} ") and f" {shown} " in message
    assert "\n" not in message and "; " in message  # what was wrong; what to do


def test_the_limits_themselves_are_possible():
    preset("m1", lr=1e-300, decay=0.0, gamma=1.0, l2=0.0, epochs=1, patience=1, seed=2**63 - 1, batch_size=1)
    preset("m1", batch_size="full", hidden=(1,), beta1=0.0, beta2=0.0, optimizer="sgd", momentum=0.0)
    preset("m0", momentum=1.0)


def test_options_of_the_other_optimizer_are_refused():
    with pytest.raises(InputError, match="^--momentum belongs to --optimizer sgd"):
        preset("m1", momentum=0.9)
    with pytest.raises(InputError, match="^--decoupled belongs to --optimizer adam"):
        preset("m0", decoupled=True)


@pytest.mark.parametrize("field, value", [("precision", "tf32"), ("gemm", "cupy"), ("memory_limit", 10**9)])
def test_options_of_the_other_backend_are_refused(field, value):
    with pytest.raises(InputError, match=f"^--{field.replace('_', '-')} belongs to --backend scratch"):
        preset("m2", **{field: value})
    with pytest.raises(InputError, match="^--compile belongs to --backend torch"):
        preset("m1", compile=True)
    assert preset("m2", compile=True).compile and preset("m1", backend="torch", compile=True).compile


def test_an_unknown_preset_is_named_and_the_known_are_listed():
    with pytest.raises(InputError, match="^--model m9 is unknown.*m0, m1"):
        preset("m9")


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("m1").lr = 0.5
    assert hash(preset("m1")) == hash(preset("m1"))
    assert preset("m1", lr=0.5) != preset("m1") == configs.PRESETS["m1"]


def test_parse_hidden():
    assert flags.parse_hidden("400,240,120") == (400, 240, 120) and flags.parse_hidden(" 7 ") == (7,)
    for text in ("", ",", "400,", "400,x", "400;240", "4.5", "[4]"):
        with pytest.raises(InputError, match="^--hidden "):
            flags.parse_hidden(text)


def test_parse_batch_size():
    assert (flags.parse_batch_size("512"), flags.parse_batch_size("full")) == (512, "full")
    for text in ("", "x", "1.5", "Full", "1e3"):
        with pytest.raises(InputError, match="^--batch-size "):
            flags.parse_batch_size(text)


@pytest.mark.parametrize(
    "given", [{"gamma": 0.9}, {"decay": 1e-4}, {"schedule": "linear", "gamma": 0.9}, {"decoupled": True}]
)
def test_flags_that_nothing_would_read_are_refused(given):
    with pytest.raises(InputError, match="--(gamma|decay) belongs to --schedule|--decoupled says"):
        configs.from_flags("m1", **given)


def test_flags_that_are_read_are_taken():
    config = configs.from_flags("m1", schedule="exponential", gamma=0.9, l2=0.1, decoupled=True)
    assert (config.gamma, config.decoupled) == (0.9, True)


def test_the_momentum_of_a_preset_goes_with_its_optimizer():
    assert configs.preset("m1a", optimizer="adam").momentum == 0.0
    with pytest.raises(InputError, match="--momentum"):
        configs.preset("m1a", optimizer="adam", momentum=0.9)


def written(folder, text):
    path = folder / "best.json"
    path.write_text(text if isinstance(text, str) else json.dumps({"config": text}))
    return path


def test_a_file_replaces_fields_and_flags_replace_those_of_the_file(tmp_path):
    best = written(tmp_path, {"hidden": [64, 32], "lr": 1, "schedule": "linear", "decay": 0.1, "l2": 0.01})
    assert config_file.read(best) == {"hidden": (64, 32), "lr": 1, "schedule": "linear", "decay": 0.1, "l2": 0.01}
    config = configs.from_flags("m1", **config_file.with_file(best, {"lr": 0.5}))
    assert (config.hidden, config.lr, config.decay, config.patience) == ((64, 32), 0.5, 0.1, preset("m1").patience)
    config = configs.from_flags("m1", **config_file.with_file(best, {"schedule": "constant"}))
    assert (config.schedule, config.decay, config.l2) == ("constant", Config.decay, 0.01)
    sgd = written(tmp_path, {"optimizer": "sgd", "momentum": 0.9})
    assert configs.from_flags("m1", **config_file.with_file(sgd, {"lr": 0.1})).momentum == 0.9
    assert configs.from_flags("m0", **config_file.with_file(sgd, {"optimizer": "adam"})).momentum == 0.0


@pytest.mark.parametrize(
    "text, word",
    [
        ("", "not a configuration"), ('{"config": {"lr": 0.1', "not a configuration"), ("[1]", "not a configuration"),
        ('{"lr": 0.1}', "config"), ('{"config": [0.1]}', "not a configuration"), ("\0", "not a configuration"),
        ({"lr": "0.1"}, "lr"), ({"lr": True}, "lr"), ({"lr": None}, "lr"), ({"lr": [0.1]}, "lr"),
        ({"width": 5}, "width"), ({"model": "m0"}, "model"),
        ({"hidden": 5}, "hidden"), ({"hidden": [5.5]}, "hidden"), ({"hidden": [True]}, "hidden"),
        ({"epochs": 2.0}, "epochs"), ({"batch_size": "half"}, "half"), ({"decoupled": 1}, "decoupled"),
        ({"lr": math.nan}, "lr nan"), ({"schedule": "step"}, "step"), ({"momentum": 0.9}, "--optimizer sgd"),
    ],
    ids=str,
)  # fmt: skip
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text, word):
    path = written(tmp_path, text)
    with pytest.raises(InputError) as error:
        config_file.read(path)
    message = str(error.value)
    assert message.startswith(f"--config {path} ") and word in message and "\n" not in message


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\0")
    for path in (tmp_path / "none", tmp_path, tmp_path / "bytes"):
        with pytest.raises(InputError, match="^--config "):
            config_file.read(path)
