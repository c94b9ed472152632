"""Configurations in JSON files: what a search writes and --config takes."""

import dataclasses
import json
from pathlib import Path
from typing import get_args, get_origin

from . import InputError, one_line
from .configs import Config


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
        reason = one_line(error)
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
