"""Jobs for the tests, and what their processes compute: python -m tests.jobs FOLDER

Two processes, then three, train a learner of each kind and leave in FOLDER what became of it; test_distributed.py
compares that with the same training in one process. They are forked after torch has been imported, which takes longer
than all that they compute; test_distributed.py also has jobs that are started as users start them.
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from mlp import configs, distributed, run
from mlp.data import stratified_split
from mlp.loop import fit
from mlp.progress import History, Progress

from .training import SCRIPT, easy_dataset, environment

DATA = easy_dataset(1500, 5)
SPLIT = stratified_split(DATA.labels)
# 1050 images to train, 21 batches of 49 and one of 21: neither 2 nor 3 divides 49, and 2 does not divide 21.
COMMON = dict(device="cpu", batch_size=49, epochs=1, hidden=(32, 16))
REFINED = dict(schedule="cosine", label_smoothing=0.1, class_balance=0.9, l2=1e-4, decoupled=True)
CASES = {
    "plain": dict(model="m1"),
    "fused": dict(model="m1", fused=True),
    "robust": dict(model="robust", fused=True, train_noise=0.5, augment=1.0),
    "robust plain": dict(model="robust", train_noise=0.5, augment=1.0, ema=0.9),
    "average": dict(model="m1", fused=True, dropout=0.3, ema=0.9, **REFINED),
    "chunks": dict(model="m1", fused=True, dropout=0.3, chunk_rows=10),
    "m2": dict(model="m2"),
    "m2 fused": dict(model="m2", fused=True, ema=0.9, **REFINED),
    "m2 chunks": dict(model="m2", chunk_rows=10),
    "m3": dict(model="m3", dropout=0.0, augment=1.0),
}
OF_LAUNCHER = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--nproc-per-node")


def make(changes: dict, job: distributed.Job):
    changes = COMMON | changes
    chunk_rows = changes.pop("chunk_rows", None)
    config = configs.preset(changes.pop("model"), **changes)
    device = run.select_device(config)
    if chunk_rows and config.backend == "scratch":
        device = replace(device, chunk_rows=chunk_rows)
    learner, _ = run.make_learner(config, DATA, device, len(SPLIT.train), job=job)
    if chunk_rows:
        learner.chunk_rows = chunk_rows
    return learner


class Memory:
    """A keeper whose progress stays in memory."""

    def __init__(self):
        self.state = self.best = self.done = None

    def due(self, epoch):
        return True

    def save(self, progress, learner):
        self.state, self.best = learner.to_host(progress.state), learner.to_host(progress.best)
        self.done = progress.done


def trained(learner, keeper=None, progress=None) -> dict[str, np.ndarray]:
    """Everything that can be told of the learner after its training."""
    history = fit(learner, SPLIT, learner.config, keeper=keeper, progress=progress)
    row, judged = history.rows[-1], learner.evaluate(SPLIT.test, 0.2)
    losses = row.train_loss, row.val_loss, judged.cross_entropy
    counts = row.train_accuracy * len(SPLIT.train), row.val_accuracy * len(SPLIT.val)
    told = {"losses": np.array(losses), "counts": np.round(counts).astype(int), "confusion": judged.confusion}
    return told | {f"arrays/{name}": array for name, array in learner.arrays().items()}


def resumed(learner, state, best, done) -> dict[str, np.ndarray]:
    """The same of a learner that goes on within the first epoch."""
    return trained(learner, progress=Progress(learner.from_host(state), learner.from_host(best), History(), done=done))


def leave(folder: Path, job: distributed.Job) -> None:
    for name, changes in CASES.items():
        keeper = Memory()
        result = trained(make(changes, job), keeper)
        again = resumed(make(changes, job), keeper.state, keeper.best, keeper.done)
        result |= {f"again/{part}": array for part, array in again.items()} | {"done": keeper.done}
        result |= {f"state/{part}": array for part, array in keeper.state.items()}
        result |= {f"best/{part}": array for part, array in keeper.best.items()}
        np.savez(folder / f"{name} {job.rank}.npz", **result)


class Started:
    """A job of train.py in the folder `cwd`, by the function behind the command torchrun: forked, because importing
    torch takes longer than most of these jobs compute."""

    def __init__(self, processes: int, *arguments, cwd: Path):
        import torch.distributed.run

        self._launcher = torch.distributed.run.main
        self._output = [tempfile.TemporaryFile("w+") for _ in range(2)]
        command = [*OF_LAUNCHER, processes, SCRIPT, *arguments]
        self._process = multiprocessing.get_context("fork").Process(
            target=self._launch, args=(list(map(str, command)), cwd)
        )
        self._process.start()
        self.pid = self._process.pid

    def _launch(self, command, cwd):
        os.chdir(cwd)
        for number, file in zip((1, 2), self._output):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))
        os.environ |= environment() | {"OMP_NUM_THREADS": "1"}
        self._launcher(command)

    def is_over(self) -> bool:
        return not self._process.is_alive()

    def ranks(self) -> dict[int, int]:
        """The processes that the launcher has started: rank -> process number."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        found = {}
        for pid in map(int, children):
            environ = dict(x.split("=", 1) for x in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in x)
            if "RANK" in environ:
                found[int(environ["RANK"])] = pid
        return found

    def finish(self, timeout: float = 60) -> subprocess.CompletedProcess:
        """Wait for its end. A job that hangs is killed, and AssertionError raised."""
        self._process.join(timeout)
        hangs = not self.is_over()
        if hangs:
            for pid in (*self.ranks().values(), self.pid):
                os.kill(pid, signal.SIGKILL)
            self._process.join()
        out, err = (self._text(file) for file in self._output)
        assert not hangs, f"a job does not come to an end: {out}{err}"
        return subprocess.CompletedProcess("torchrun", self._process.exitcode, out, err)

    @staticmethod
    def _text(file):
        with file:
            file.seek(0)
            return file.read()


def _process(folder: Path, rank: int, processes: int, port: int) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {name: str(number) for name, number in (numbers | {"MASTER_PORT": port}).items()}
    os.environ["MASTER_ADDR"] = "localhost"
    job = distributed.join("cpu")
    leave(folder, job)
    job.close()


def main(folder: Path) -> int:
    import torch._dynamo  # noqa: F401  DistributedDataParallel would, in each process

    fork, failed = multiprocessing.get_context("fork"), 0
    for processes in (2, 3):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        given = [(folder / str(processes), rank, processes, port) for rank in range(processes)]
        given[0][0].mkdir()
        started = [fork.Process(target=_process, args=arguments) for arguments in given]
        for process in started:
            process.start()
        for process in started:
            process.join()
            failed += process.exitcode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
