"""One run by several processes, each with a part of every batch: python -m torch.distributed.run, or torchrun, train.py

Everything goes through torch.distributed: gloo between CPUs, NCCL between GPUs. Arrays of NumPy and CuPy are handed
over without a copy (DLPack). Every process has all parameters and all data, and the same steps are made everywhere.
"""

import os
import sys
from contextlib import contextmanager, nullcontext

import numpy as np

from kernels.host import cores

from . import InputError, LostProcess, one_line

LOST = "a process of this job has ended, so this one does, too; the run goes on from its checkpoint with --resume"


class Job:
    """One process on its own."""

    rank, size = 0, 1

    def share(self, start: int, stop: int) -> tuple[int, int]:
        """This process's part of the rows [start, stop)."""
        rows = stop - start
        return start + rows * self.rank // self.size, start + rows * (self.rank + 1) // self.size

    def check_batches(self, images: int, batch: int) -> None:
        """InputError where a process would have no row of a batch."""
        least = min(batch, images % batch or batch)
        if least < self.size:
            raise InputError(
                f"the last batch of {images:,} images has {least} of them, too few for {self.size} processes; "
                "give another --batch-size"
            )

    def add(self, array) -> None:
        """Replace the array by the sum of those of all processes."""

    def gather(self, array):
        """The arrays of all processes, stacked: (size, ...)."""
        return array[None].copy()

    def own(self, gathered):
        """What gather() was given; where another number of processes has gathered, the first takes the sum."""
        return gathered[self.rank] if len(gathered) == self.size else gathered.sum(axis=0) * (self.rank == 0)

    def total(self, array: np.ndarray) -> np.ndarray:
        """The sum over the processes of an array on the host."""
        return array

    def all(self, value) -> list:
        """The values of all processes, of any type."""
        return [value]

    def most(self, *numbers: int) -> list[int]:
        """The largest of all processes, one by one."""
        return [max(values) for values in zip(*self.all(numbers))]

    def any(self, condition: bool) -> bool:
        return any(self.all(condition))

    def lead(self, function):
        """function() in the process of rank 0, and None in the others; InputError in all where it raises that."""
        return function()

    def first(self, function):
        """function() here after it has gone well in the process of rank 0; InputError in all where it has not there."""
        return function()

    def together(self, function):
        """function() in all at once; InputError in all where one raises it."""
        return function()

    def peers(self):
        """While active, what torch says when a process is gone is LostProcess."""
        return nullcontext()

    def check_device(self, kind: str) -> None:
        """InputError where the processes cannot send each other arrays of this kind of device, "cpu" or "cuda"."""

    def close(self) -> None:
        """Leave the job in order."""


class TorchJob(Job):
    """A process that torchrun has started, beside its others."""

    def __init__(self, kind: str):
        """kind: as in --device."""
        import torch
        import torch.distributed as dist

        self.torch, self.dist = torch, dist
        self._gpus = kind != "cpu" and dist.is_nccl_available() and torch.cuda.is_available()
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self._gpus else "gloo")
        except (RuntimeError, ValueError) as error:
            reason = one_line(error)
            raise InputError(f"the processes of this job do not find each other ({reason}); start it again") from None
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def add(self, array) -> None:
        with self.peers(), self._stream(array):
            self.dist.all_reduce(self.torch.from_dlpack(array))

    def gather(self, array):
        stacked = np.empty if isinstance(array, np.ndarray) else sys.modules["cupy"].empty
        stacked = stacked((self.size, *array.shape), array.dtype)
        with self.peers(), self._stream(array):
            parts = list(self.torch.from_dlpack(stacked))
            self.dist.all_gather(parts, self.torch.from_dlpack(array))
        return stacked

    def total(self, array):
        summed = array.copy()
        with self.peers():
            self.dist.all_reduce(self.torch.from_numpy(summed))
        return summed

    def all(self, value):
        values = [None] * self.size
        with self.peers():
            self.dist.all_gather_object(values, value)
        return values

    def lead(self, function):
        return self.together(function if self.rank == 0 else lambda: None)

    def first(self, function):
        result = self.lead(function)
        return result if self.rank == 0 else function()

    def together(self, function):
        result, problem = _tried(function)
        problem = next(filter(None, self.all(problem)), "")
        if problem:
            raise InputError(problem)
        return result

    @contextmanager
    def peers(self):
        try:
            yield
        except RuntimeError as error:
            # What gloo says has no type of its own, but names the file of its that says it.
            if isinstance(error, self.dist.DistError) or "gloo" in str(error):
                raise LostProcess(LOST) from None
            raise

    def check_device(self, kind):
        if kind == "cuda" and not self._gpus:
            raise InputError(
                "several processes with a GPU each need a torch that was built for CUDA, with NCCL; install one, or "
                "give --device cpu"
            )
        if len(kinds := set(self.all(kind))) > 1:
            raise InputError(f"some processes would compute on {' and some on '.join(sorted(kinds))}; give --device")

    def close(self):
        self.dist.destroy_process_group()

    @contextmanager
    def _stream(self, array):
        """CuPy's current stream is torch's, too, so that what is sent is complete, and what comes is waited for."""
        if isinstance(array, np.ndarray):
            yield
            return
        stream = sys.modules["cupy"].cuda.get_current_stream().ptr
        own = self.torch.cuda.ExternalStream(stream, array.device.id) if stream else None  # 0: the default one of both
        with self.torch.cuda.stream(own):
            yield


class SharedNorm:
    """Batch normalisation over a batch of which each process has a part."""

    def __init__(self, job: Job, xp):
        self.job, self.xp = job, xp

    def statistics(self, rows, mean, var, running_mean, running_var, momentum=0.1) -> None:
        """Turn the statistics (N,) of this process's rows into those of all, merged as by Chan et al. (1979) in
        float64, and move the running ones as kernels.batch_norm_stats does."""
        shares, total, means, variances = self._gather(rows, mean, var)
        merged = (shares * means).sum(axis=0)
        spread = (shares * (variances + (means - merged) ** 2)).sum(axis=0)
        mean[...], var[...] = merged, spread
        running_mean += momentum * (mean - running_mean)
        running_var += (momentum * (spread * (total / max(1.0, total - 1.0)) - running_var)).astype(np.float32)

    def gradient(self, dz, z, mean, var, weight, bias_grad, weight_grad, eps=1e-5) -> None:
        """Turn the gradient dz (B, N) that norm_act_backward() finds for this process's rows, with the statistics of
        all, into that for the whole batch. It subtracts the means over its own rows of the gradient and of the gradient
        times the normalised product; here they are replaced by those over all."""
        _, total, *sums = self._gather(len(dz), bias_grad, weight_grad)
        of_bias, of_weight = (
            own.astype(np.float64) / len(dz) - parts.sum(axis=0) / total
            for own, parts in zip((bias_grad, weight_grad), sums)
        )
        rstd = 1.0 / self.xp.sqrt(var.astype(np.float64) + eps)
        slope = weight * rstd * rstd * of_weight
        dz += z * slope.astype(np.float32)
        dz += (weight * rstd * of_bias - slope * mean).astype(np.float32)

    def _gather(self, rows, one, other):
        """The share (size, 1) that every process has of all rows, their number, and two arrays (N,) of every process in
        float64 (size, N)."""
        parts = self.job.gather(self.xp.stack([one, other, self.xp.full_like(one, rows)])).astype(np.float64)
        counts = parts[:, 2, :1]
        total = float(counts.sum())
        return counts / total, total, parts[:, 0], parts[:, 1]


def is_job() -> bool:
    """Whether this process is one of several that torchrun has started."""
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(name in os.environ for name in needed) and os.environ["WORLD_SIZE"] != "1"


def join(kind: str) -> Job:
    """The job that this process belongs to, for a --device; InputError where torch is missing.

    Before anything is computed: the processes on this machine share its cores, which the kernels' threads are told by
    KERNELS_NUM_THREADS, unless the user has done so."""
    if not is_job():
        return Job()
    os.environ.setdefault("KERNELS_NUM_THREADS", str(max(1, cores() // processes_here())))
    try:
        return TorchJob(kind)
    except ImportError as error:
        raise InputError(f"several processes need torch ({error}); run `pip install torch`") from None


def own_gpu(count: int) -> int:
    """The number of this process's GPU of those on its machine; InputError where they are too few."""
    if count < processes_here():
        raise InputError(
            f"{processes_here()} processes were started on a machine with {count} GPU{'s' * (count != 1)}, expected at "
            "most one for each; start fewer, or give --device cpu"
        )
    return int(os.environ["LOCAL_RANK"]) if is_job() else 0


def is_first() -> bool:
    """Whether this process speaks for the job."""
    return not is_job() or os.environ["RANK"] == "0"


def processes_here() -> int:
    """How many processes of the job share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_job() else 1


def _tried(function) -> tuple:
    """function(), and the message of the InputError that it raises."""
    try:
        return function(), ""
    except InputError as error:
        return None, str(error) or "a process of the job has failed"
