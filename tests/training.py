"""What the tests of the model, the loop and the command line share: easy data, learners, a subprocess."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from mlp import configs, device
from mlp.data import Dataset
from mlp.scratch import ScratchLearner

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "train.py")
BACKENDS = ("plain", "fused")


def easy_images(rows: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (rows, 784) and int32 (rows,): a random picture per class, under noise."""
    rng = np.random.default_rng(seed)
    pictures = rng.random((classes, 784))
    labels = (np.arange(rows) % classes).astype(np.int32)
    pixels = 0.35 * pictures[labels] + 0.65 * rng.random((rows, 784))
    return np.round(255 * pixels).astype(np.uint8), labels


def easy_dataset(rows: int = 300, classes: int = 5, seed: int = 0) -> Dataset:
    images, labels = easy_images(rows, classes, seed)
    return Dataset("easy", images, labels, tuple(map(str, range(classes))), "no checksum")


def cpu(backend: str, chunk_rows: int = 2048) -> device.Device:
    """The CPU with plain or fused ops; an error where the fused kernels are not built."""
    return replace(device.select("cpu", backend == "fused"), chunk_rows=chunk_rows)


def learner(ops: str, data: Dataset, chunk_rows=2048, model="m1", **changes) -> ScratchLearner:
    """A learner that trains on all of `data`, by plain or fused ops."""
    config = configs.preset(model, **changes)
    return ScratchLearner(config, data, cpu(ops, chunk_rows), len(data.labels))


def graphs_of_torch(monkeypatch) -> list:
    """The graphs that torch.compile makes from now on, which are run by the compiler's first half: to generate and
    build code takes half a minute."""
    import torch

    compile, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=backend, **options))
    return graphs


def all_rows(data: Dataset) -> np.ndarray:
    return np.arange(len(data.labels), dtype=np.int32)


def close(actual, expected, tolerance: float) -> bool:
    """Largest error at most `tolerance` times the largest expected magnitude; False where anything is NaN."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return bool(np.abs(actual - expected).max() <= tolerance * np.abs(expected).max())


def environment() -> dict[str, str]:
    """This process's environment, but no data set can be fetched from the network, and BLAS has one thread:
    for products this small its threads cost more than they save, and on a busy machine far more."""
    return os.environ | {"EMNIST_URL": "http://127.0.0.1:1/", "OPENBLAS_NUM_THREADS": "1"}


def train(*arguments, cwd: Path, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Run train.py in `cwd` to its end; `python`: what stands between the interpreter and the arguments."""
    command = [sys.executable, *(python or (SCRIPT,)), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120)


def script_after(code: str) -> tuple[str, ...]:
    """Interpreter arguments that run train.py after `code`."""
    run = f"sys.argv[0] = {SCRIPT!r}; runpy.run_path({SCRIPT!r}, run_name='__main__')"
    return "-c", f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); {code}; {run}"


def write_npy(folder: Path, rows: int = 1500, classes: int = 5) -> Path:
    """A folder of easy images that `--data` takes."""
    images, labels = easy_images(rows, classes)
    folder.mkdir()
    np.save(folder / "X_images.npy", images.reshape(-1, 28, 28))
    np.save(folder / "y_images.npy", labels)
    return folder


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below `folder`, with its size and the time it was last changed."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }
