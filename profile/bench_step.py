"""Time a whole training step: plain array code, fused kernels, PyTorch, and the step's matrix products alone.

    python profile/bench_step.py --device cpu                 # prints a table and writes a CSV

All contenders run in this process on the same synthetic bytes, in turns, in blocks of steps; a sample is one
block's mean. Before its blocks a contender runs for a while untimed, so that the threads of the others have
gone to sleep. NumPy's matrix products are timed on NumPy's own threads and on the fused library's; a ratio is
taken to the faster of the two, round by round, because a shared machine changes its speed within seconds.
"""

import argparse
import csv
import os
import platform
import subprocess
import sys
import time
from datetime import date
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from kernels import host  # noqa: E402
from mlp import InputError, configs  # noqa: E402
from mlp.data import Dataset  # noqa: E402
from mlp.device import select  # noqa: E402
from mlp.scratch import ScratchLearner  # noqa: E402

IMAGES, CLASSES = 65536, 47
STEPS = 10  # in a block
COLUMNS = ["contender", "model", "layers", "batch", "dtype", "samples", "p20_ms", "p50_ms", "p80_ms", "to_gemm",
           "images_per_second", "device", "cores", "versions", "date", "revision"]  # fmt: skip


def synthetic_data() -> Dataset:
    """Random bytes in place of images: the time of a step does not depend on what they show."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (IMAGES, 784), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, IMAGES).astype(np.int32)
    return Dataset("synthetic bytes", images, labels, tuple(map(str, range(CLASSES))), "")


def scratch_step(config, data, device):
    """A function that trains on the k-th batch."""
    learner = ScratchLearner(config, data, device, IMAGES)
    learner.begin_epoch(np.random.default_rng(1).permutation(IMAGES).astype(np.int32))
    batch = config.batch_size
    return lambda k: learner.train_step(k * batch % (IMAGES - batch), k * batch % (IMAGES - batch) + batch, config.lr)


def gemm_step(config, device):
    """The matrix products of one step and nothing else."""
    rng, xp = np.random.default_rng(0), device.xp
    sizes = (784, *config.hidden, CLASSES)
    new = lambda *shape: xp.asarray(rng.standard_normal(shape).astype(np.float32))  # noqa: E731
    x, d = [new(config.batch_size, n) for n in sizes], [new(config.batch_size, n) for n in sizes]
    w = [new(n, m) for n, m in pairwise(sizes)]
    dw = [xp.empty_like(a) for a in w]

    def step(_):
        for i, weight in enumerate(w):
            xp.matmul(x[i], weight, out=x[i + 1])
        for i in reversed(range(len(w))):
            xp.matmul(x[i].T, d[i + 1], out=dw[i])
            if i:
                xp.matmul(d[i + 1], w[i].T, out=d[i])

    return step


def torch_step(config, data, kind):
    """PyTorch eager with its fused optimizer, batches gathered from uint8 tensors as ours are."""
    import torch
    from torch import nn

    layers = []
    for n_in, n_out in pairwise((784, *config.hidden, CLASSES)):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).to(kind)
    optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[config.optimizer]
    optimizer = optimizer(model.parameters(), lr=config.lr, fused=True)
    loss_function = nn.CrossEntropyLoss()
    images, labels = torch.from_numpy(data.images).to(kind), torch.from_numpy(data.labels).long().to(kind)
    order = torch.from_numpy(np.random.default_rng(1).permutation(IMAGES)).to(kind)
    batch = config.batch_size

    def step(k):
        start = k * batch % (IMAGES - batch)
        index = order[start : start + batch]
        x = images[index].to(torch.float32).mul_(1.0 / 255.0)
        optimizer.zero_grad(set_to_none=True)
        loss_function(model(x), labels[index]).backward()
        optimizer.step()

    return step


def contenders(config, data, kind):
    """name -> (step function, whether NumPy's BLAS runs on the fused library's threads meanwhile)."""
    plain, fused = select(kind, fused=False), select(kind, fused=True)
    table = {
        "plain": (scratch_step(config, data, plain), False),
        "fused": (scratch_step(config, data, fused), True),
        "GEMMs alone": (gemm_step(config, plain), False),
    }
    if kind == "cpu":
        table["GEMMs alone, shared threads"] = (gemm_step(config, plain), True)
    try:
        table["torch eager, fused optimizer"] = (torch_step(config, data, kind), False)
    except ImportError as error:
        print(f"no torch row: {error}", file=sys.stderr)
    return table, plain


def measure(table, device, rounds, blocks, settle):
    """By contender: an array (rounds, blocks) of mean seconds per step."""
    samples = {name: [] for name in table}
    for _ in range(rounds):
        for name, (step, shared) in table.items():
            if device.kind == "cpu":
                host.share_blas_threads(shared)
            began, k = time.perf_counter(), 0
            while time.perf_counter() - began < settle:
                step(k)
                k += 1
            device.synchronize()
            turn = []
            for _ in range(blocks):
                began = time.perf_counter()
                for _ in range(STEPS):
                    step(k)
                    k += 1
                device.synchronize()
                turn.append((time.perf_counter() - began) / STEPS)
            samples[name].append(turn)
    return {name: np.array(turns) for name, turns in samples.items()}


def versions() -> str:
    found = [f"python {platform.python_version()}", f"numpy {np.__version__}"]
    found += [f"{name} {sys.modules[name].__version__}" for name in ("torch", "cupy") if name in sys.modules]
    return ", ".join(found)


def revision() -> str:
    """The git revision, with a + where the working tree differs from it."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        measured = ["kernels", "mlp", "CMakeLists.txt", "profile/bench_step.py"]
        status = [*git, "status", "--porcelain", "--", *measured]
        changed = subprocess.run(status, capture_output=True, text=True, check=True)
        return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def rows(samples, config, device):
    """One CSV row per contender."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    by_round = {name: np.median(times, axis=1) for name, times in samples.items()}
    gemm = np.min([times for name, times in by_round.items() if name.startswith("GEMM")], axis=0)
    common = {
        "model": config.model, "layers": "-".join(map(str, (784, *config.hidden, CLASSES))),
        "batch": config.batch_size, "dtype": "float32", "device": device.name, "cores": cores,
        "versions": versions(), "date": date.today().isoformat(), "revision": revision(),
    }  # fmt: skip
    for name, times in samples.items():
        p20, p50, p80 = np.percentile(times, (20, 50, 80))
        yield common | {
            "contender": name, "samples": times.size, "p20_ms": f"{p20 * 1e3:.3f}", "p50_ms": f"{p50 * 1e3:.3f}",
            "p80_ms": f"{p80 * 1e3:.3f}", "to_gemm": f"{np.median(by_round[name] / gemm):.3f}",
            "images_per_second": f"{config.batch_size / p50:.0f}",
        }  # fmt: skip


def print_table(table) -> None:
    first = table[0]
    print(f"{first['model']} ({first['layers']}), batch {first['batch']}, {first['device']}, {first['cores']} cores")
    print(f"{'':30}{'ms/step p20':>12}{'p50':>9}{'p80':>9}{'/ GEMMs':>9}{'images/s':>11}")
    for row in table:
        print(f"{row['contender']:30}{row['p20_ms']:>12}{row['p50_ms']:>9}{row['p80_ms']:>9}{row['to_gemm']:>9}"
              f"{int(row['images_per_second']):>11,}")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", default="m0,m1", help="presets, separated by commas (default: m0,m1)")
    parser.add_argument("--batches", default="256,512", help="batch sizes, separated by commas (default: 256,512)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender (default: 9)")
    parser.add_argument("--blocks", type=int, default=6, help=f"blocks of {STEPS} steps in a turn (default: 6)")
    parser.add_argument("--settle", type=float, default=0.2, help="untimed seconds before a turn (default: 0.2)")
    parser.add_argument("--csv", type=Path, help="where to write (default: profile/results/<device>/step.csv)")
    args = parser.parse_args()
    if min(args.rounds, args.blocks) < 1 or not args.settle >= 0:
        parser.error("--rounds and --blocks must be at least 1, --settle at least 0")
    batches = args.batches.split(",")
    if not all(b.isdecimal() and 0 < int(b) <= IMAGES // 2 for b in batches):
        parser.error(f"--batches {args.batches} is not a list of whole numbers from 1 to {IMAGES // 2}")
    data, results = synthetic_data(), []
    try:
        for model in args.models.split(","):
            for batch in map(int, batches):
                config = configs.preset(model, batch_size=batch, device=args.device, fused=True)
                table, device = contenders(config, data, args.device)
                part = list(rows(measure(table, device, args.rounds, args.blocks, args.settle), config, device))
                print_table(part)
                results += part
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    slug = "".join(c if c.isalnum() else "-" for c in f"{device.name} {results[0]['cores']} cores").strip("-").lower()
    path = args.csv or ROOT / "profile" / "results" / slug / "step.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(results)
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
