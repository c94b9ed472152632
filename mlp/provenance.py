"""What decides the result of a run beside its configuration: noted in config.json, and compared when it is made again."""

import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
# What must be the same for the same bits, and what it is called.
DECISIVE = {"device_name": "device", "processes": "number of processes", "versions": "versions", "revision": "revision"}


def of(learner, dataset, device) -> dict:
    """The content of a new run's config.json."""
    modules = {m.__name__: m.__version__ for m in (np, *learner.modules())}
    return asdict(learner.config) | {
        **learner.provenance(),
        "processes": learner.job.size,
        "data_name": dataset.name,
        "data_sha256": dataset.checksum,
        "class_names": dataset.class_names,
        "device_name": device.name,
        "command": sys.orig_argv,
        "revision": revision(),
        "versions": {"python": platform.python_version()} | modules,
    }


def revision() -> str:
    """The git revision of this source, with "+" where files differ from it; "" where it is not from a repository."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*arguments) -> str:
    if not (ROOT / ".git").exists():  # what is installed may lie below somebody else's repository
        raise OSError("no repository")
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def differences(then: dict, now: dict) -> list[str]:
    """What may change the last bits: "device: X then, Y now", ..."""
    return [
        f"{what}: {_text(then.get(name))} then, {_text(now.get(name))} now"
        for name, what in DECISIVE.items()
        if then.get(name) != now.get(name)
    ]


def _text(value) -> str:
    return ", ".join(f"{name} {x}" for name, x in value.items()) if isinstance(value, dict) else str(value or "unknown")
