"""The facts of the machine, the folder of its results, and the result files."""

import csv
import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import date
from pathlib import Path

from result_files import COLUMNS

from kernels.host import cores

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ("kernels", "mlp", "CMakeLists.txt", "profile/*.py")  # what a revision stands for


def facts(name: str, kind: str) -> dict:
    """The last columns of every result file, for a device of this name, "cpu" or "cuda". Makes no CUDA context.

    A revision ends in + where the kernels, mlp or the scripts differ from the commit.
    """
    return {
        "device": name, "cores": cores(), "driver": "" if kind == "cpu" else _driver(), "versions": _versions(),
        "date": date.today().isoformat(), "revision": _revision(),
    }  # fmt: skip


def _driver() -> str:
    """The GPU's driver as nvidia-smi names it, with the CUDA version that it supports."""
    import cupy

    version = cupy.cuda.runtime.driverGetVersion()
    supports = f"CUDA {version // 1000}.{version % 1000 // 10}"
    name = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return f"{name} ({supports})" if name else supports


def _versions() -> str:
    packages = {"cupy-cuda12x", "cupy-cuda13x", "cupy", "numpy", "nvtx", "torch"}
    found = {d.name: d.version for d in importlib.metadata.distributions() if d.name in packages}
    return ", ".join([f"python {platform.python_version()}", *(f"{name} {found[name]}" for name in sorted(found))])


def _revision() -> str:
    if "REVISION" in os.environ:  # where the tree was copied without its history
        return os.environ["REVISION"]
    head = said("git", "-C", ROOT, "rev-parse", "--short=12", "HEAD")
    changed = said("git", "-C", ROOT, "status", "--porcelain", "--", *MEASURED)
    return head + ("+" if changed else "") if head else "unknown"


def last_line(lines: list[str]) -> str:
    """The last line with something on it, or nothing."""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def said(*command) -> str:
    """The last line that a program prints, or nothing where it cannot be run."""
    try:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return last_line(done.stdout.splitlines())


def results_folder(name: str, cores: int | None = None) -> Path:
    """profile/results/<device>; a CPU's with the number of cores, which decides its speed."""
    name += f" {cores} cores" if cores else ""
    return ROOT / "profile" / "results" / "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write a result file, whose name says which columns it has. What a row lacks is left empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS[path.name], restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)
