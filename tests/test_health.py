"""Long runs keep their health: over more than 2,000 steps no memory, file, thread or Python object is left behind.

Each kind is trained in a process of its own, in epochs of many small steps, with a checkpoint in every epoch. What is
counted after the first epochs is what buffers, programs and pools need; from there to the end nothing may be added.
The images of a step are 8 x 784 float32, 25 KB, and the parameters 100 KB: one array of the former that leaked in every
step would be 50 MB in the 2,020 steps that are measured, and one of the latter in every epoch 1 MB of what Python has
allocated. The bounds lie well below, and above what an allocator moves to and fro (measured: 0.3 MB and 30 KB).
"""

import gc
import json
import os
import re
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest

from mlp import configs, flags
from mlp.data import stratified_split
from mlp.loop import fit
from mlp.progress import Keeper
from mlp.run import make_learner, select_device

from .training import ROOT, easy_dataset, environment

KINDS = {
    "plain": {},
    "fused": {"fused": True, "batch_norm": True, "dropout": 0.2, "ema": 0.9, "activation": "silu"},
    "m2": {"backend": "torch"},
}
EPOCHS, WARM_UP, STEPS = 12, 2, 202  # of an epoch
RESIDENT, ALLOCATED, LARGEST_SITE = 2e6, 100e3, 50e3  # bytes
BATCH = 8
needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="there is no /proc to read memory from")


def measured() -> dict:
    """What this process holds now."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")[:-1]]
    return {"resident": pages * os.sysconf("SC_PAGE_SIZE"), "files": len(files), "threads": threading.active_count(),
            "all threads": len(os.listdir("/proc/self/task"))}  # fmt: skip


def trained(folder: Path, epochs: int, spoil=lambda learner: None, **changes) -> tuple[list[dict], list]:
    """Train so many epochs; what was held after each from WARM_UP on, and what Python has allocated since then."""
    data = easy_dataset(2300, 5)
    split = stratified_split(data.labels)
    assert -(-len(split.train) // BATCH) == STEPS
    config = configs.preset(
        "m1", device="cpu", hidden=(32, 16), batch_size=BATCH, epochs=epochs, patience=None, **changes
    )
    learner, _ = make_learner(config, data, select_device(config), len(split.train))
    spoil(learner)
    keeper, held, traced = Keeper(folder, config, data.checksum, flags.Interval(None, 1)), [], []

    def on_epoch(history):
        if len(history.rows) in (WARM_UP, epochs):
            gc.collect()
            traced.append(tracemalloc.take_snapshot())
        if len(history.rows) >= WARM_UP:
            held.append(measured())

    tracemalloc.start()  # from the first step on, or what replaces an array from before would be new
    fit(learner, split, config, on_epoch=on_epoch, keeper=keeper)
    assert keeper.path.exists()
    first, last = (snapshot.filter_traces([tracemalloc.Filter(False, tracemalloc.__file__)]) for snapshot in traced)
    growth = last.compare_to(first, "lineno")
    tracemalloc.stop()
    return held, [(str(entry.traceback), entry.size_diff) for entry in growth]


KEEP = "kept = []; inner = learner.{0}; learner.{0} = lambda *args: kept.append({1}) or inner(*args); "
SLEEPER = "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()"
LEAKS = (
    KEEP.replace("kept", "arrays").replace("inner", "train").format("train", "learner._x[:8].copy()")
    + KEEP.format("begin_epoch", f"(open('/dev/null'), {SLEEPER})")
)


def start(folder, kind: str, epochs: int = EPOCHS, leak: str = "pass") -> subprocess.Popen:
    """trained() in a fresh process; leak: code that makes `learner` lose something."""
    code = f"""
import json, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests import test_health
def spoil(learner):
    {leak}
print(json.dumps(test_health.trained(Path({str(folder)!r}), {epochs}, spoil, **test_health.KINDS[{kind!r}])))
"""
    settings = environment() | {"OMP_NUM_THREADS": "1", "KERNELS_NUM_THREADS": "2"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=settings, **pipes)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What trained() says of every kind, and of one with leaks; all at once, because each takes seconds."""
    processes = {kind: start(tmp_path_factory.mktemp("health"), kind) for kind in KINDS}
    processes["leaks"] = start(tmp_path_factory.mktemp("health"), "plain", 5, LEAKS)
    found = {}
    try:
        for kind, process in processes.items():
            out, err = process.communicate(timeout=200)
            assert process.returncode == 0, err
            found[kind] = json.loads(out)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return found


def leaks(held: list[dict], growth: list) -> list[str]:
    """What is not as healthy as it must be."""
    first, last, found = held[0], held[-1], []
    more = last["resident"] - first["resident"]
    if more > RESIDENT:
        found.append(f"resident memory grew by {more:,} bytes")
    found += [f"{name}: {first[name]} became {last[name]}" for name in ("files", "threads", "all threads")
              if last[name] != first[name]]  # fmt: skip
    found += [f"{site} grew by {size:,} bytes" for site, size in growth if size > LARGEST_SITE]
    total = sum(size for _, size in growth)
    if total > ALLOCATED:
        found.append(f"Python's memory grew by {total:,} bytes")
    return found


@needs_proc
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_grows(results, kind):
    held, growth = results[kind]
    assert len(held) == EPOCHS - WARM_UP + 1 and (EPOCHS - WARM_UP) * STEPS > 2000
    assert leaks(held, growth) == []


@needs_proc
@pytest.mark.parametrize("told", [
    r"resident memory grew by \d+,\d{3},\d{3} bytes", r"files: \d+ became", r"threads: \d became", "all threads: ",
    r"<string>:\d+ grew by", "Python's memory grew by",
])  # fmt: skip
def test_leaks_are_found(results, told):
    """Of an array in every step, and a file and a thread in every epoch."""
    found = leaks(*results["leaks"])
    assert any(re.match(told, line) for line in found), found


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, KINDS["fused"]], ids=["m1", "m3"])
def test_a_gpus_memory_does_not_grow(tmp_path, changes):
    """CuPy's pool and what the device has free, over 2,000 captured steps."""
    import cupy

    data = easy_dataset(2300, 5)
    split = stratified_split(data.labels)
    config = configs.preset(
        "m1", **{"device": "cuda", "fused": True, "hidden": (32, 16), "batch_size": BATCH, "epochs": EPOCHS,
                 "patience": None} | changes
    )  # fmt: skip
    learner, _ = make_learner(config, data, select_device(config), len(split.train))
    if not learner.captures:
        pytest.skip("the step is not captured: nvmath-python is not installed")
    keeper, held = Keeper(tmp_path, config, data.checksum, flags.Interval(None, 1)), []

    def on_epoch(history):
        cupy.cuda.Device().synchronize()
        gc.collect()
        pool = cupy.get_default_memory_pool()
        held.append((pool.used_bytes(), pool.total_bytes(), cupy.cuda.runtime.memGetInfo()[0]))

    fit(learner, split, config, on_epoch=on_epoch, keeper=keeper)
    assert int(learner.optimizer.steps.get()[0]) > 2000
    (used, total, free), (used_last, total_last, free_last) = held[WARM_UP - 1], held[-1]
    # The parameters, leaked in every step, would be 200 MB. The device's free memory is also others'.
    assert used_last == used and total_last == total and free - free_last <= 16 * 2**20, held
