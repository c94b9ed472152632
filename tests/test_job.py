"""What a process of a job does by itself: its part of the rows, statistics from the parts of all, cores, devices."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kernels
from kernels import plain
from mlp import InputError, LostProcess, cli, configs, device, distributed, run, search
from mlp.distributed import LOST, Job, SharedNorm
from mlp.scratch import ScratchLearner

from . import stand_in_gpu
from .checks import assert_same_bits
from .simulated_gpu import Gpu
from .training import ROOT, SCRIPT, all_rows, close, cpu, easy_dataset, environment


class Together:
    """Jobs whose processes are threads."""

    def __init__(self, size: int):
        self.size, self.barrier, self.given = size, Barrier(size, timeout=20), [None] * size

    def run(self, function) -> list:
        """function(job) in each process."""
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(lambda rank: function(Thread(self, rank)), range(self.size)))


class Thread(Job):
    def __init__(self, together, rank):
        self._together, self.rank, self.size = together, rank, together.size

    def all(self, value):
        together = self._together
        together.given[self.rank] = value
        together.barrier.wait()
        values = list(together.given)
        together.barrier.wait()  # before anyone gives the next one
        return values

    def gather(self, array):
        return np.stack([np.array(part) for part in self.all(array.copy())])

    def total(self, array):
        return self.gather(array).sum(axis=0)

    def add(self, array):
        array[...] = self.total(array)


def member(rank, size) -> Job:
    return Thread(SimpleNamespace(size=size), rank)


# ---- rows


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 64))
def test_the_parts_of_the_rows_follow_each_other_and_are_about_as_large(start, rows, size):
    parts = [member(rank, size).share(start, start + rows) for rank in range(size)]
    assert parts[0][0] == start and parts[-1][1] == start + rows
    assert all(one[1] == other[0] for one, other in zip(parts, parts[1:]))
    counts = [end - begin for begin, end in parts]
    assert min(counts) >= 0 and max(counts) - min(counts) <= 1


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 9))
def test_batches_are_refused_exactly_where_a_process_would_have_no_row(images, batch, size):
    batch = min(batch, images)
    parts = [
        member(rank, size).share(start, min(start + batch, images))
        for rank in range(size) for start in range(0, images, batch)
    ]  # fmt: skip
    if all(begin < end for begin, end in parts):
        member(0, size).check_batches(images, batch)
    else:
        with pytest.raises(InputError, match=f"too few for {size} processes; give another --batch-size$"):
            member(0, size).check_batches(images, batch)


@pytest.mark.parametrize("then", (1, 2, 3))
@pytest.mark.parametrize("now", (1, 2, 3))
def test_totals_of_all_processes_are_taken_up_by_any_number(then, now):
    gathered = np.arange(2.0 * then).reshape(then, 2)
    parts = [member(rank, now).own(gathered) for rank in range(now)]
    assert_same_bits(sum(parts), gathered.sum(axis=0))
    if then == now:
        assert_same_bits(np.stack(parts), gathered)


@pytest.mark.parametrize("model", ("m1", "m2"))
def test_a_process_without_an_image_to_judge_adds_nothing(model):
    data = easy_dataset(60, 5)
    config = configs.preset(model, device="cpu", hidden=(8,), batch_size=20)
    learner = run.make_learner(config, data, run.select_device(config), 60)[0]
    learner.job = member(0, 3)
    learner.job.total = lambda array: array
    assert learner.job.share(0, 1) == (0, 0)
    judged = learner.evaluate(all_rows(data)[:1])
    assert judged.cross_entropy == 0.0 and not judged.confusion.any()


# ---- batch normalisation


@pytest.mark.parametrize("size", (1, 2, 3))
@pytest.mark.parametrize("rows, width", ((64, 16), (7, 5), (4, 33)))
def test_statistics_and_gradients_are_those_of_the_whole_batch(rng, rows, width, size):
    z = (3.0 + 2.0 * rng.standard_normal((rows, width))).astype(np.float32)
    dy = rng.standard_normal((rows, width)).astype(np.float32)
    weight, bias = rng.standard_normal((2, width)).astype(np.float32)
    running = rng.random((2, width)).astype(np.float32)

    def of(job, ops, z, dy):
        mean, var, moved = np.empty(width, np.float32), np.empty(width, np.float32), running.copy()
        own = {} if job else dict(running_mean=moved[0], running_var=moved[1])
        ops.batch_norm_stats(z, mean=mean, var=var, **own)
        if job:
            SharedNorm(job, np).statistics(len(z), mean, var, *moved)
        norm = dict(mean=mean, var=var, weight=weight)
        dz, bias_grad, weight_grad = np.empty_like(z), np.empty(width, np.float32), np.empty(width, np.float32)
        ops.norm_act_backward(dy, z, bias, "silu", out=dz, bias_grad=bias_grad, weight_grad=weight_grad, **norm)
        if job:
            SharedNorm(job, np).gradient(dz, z, mean, var, weight, bias_grad, weight_grad)
        return dz, bias_grad, weight_grad, mean, var, moved

    def of_part(job):
        begin, end = job.share(0, rows)
        return of(job, kernels, z[begin:end], dy[begin:end])

    whole, parts = of(None, plain, z, dy), Together(size).run(of_part)
    dz, bias_grad, weight_grad, *statistics = zip(*parts)
    assert close(np.concatenate(dz), whole[0], 1e-5)
    assert close(sum(bias_grad), whole[1], 1e-5) and close(sum(weight_grad), whole[2], 1e-5)
    for of_all, expected in zip(statistics, whole[3:]):
        assert close(of_all[0], expected, 1e-6)
        for other in of_all[1:]:
            assert_same_bits(other, of_all[0])


# ---- a step on a GPU


@pytest.mark.parametrize("changes", ({}, dict(dropout=0.3), dict(ema=0.9)))
def test_graphs_of_a_job_compute_what_one_process_does(monkeypatch, changes):
    """A graph for a process's part of the batch and one for the update, with the sum over the processes between."""
    data = easy_dataset(100, 5)
    gpu = Gpu(monkeypatch)
    config = configs.preset("m1", fused=True, hidden=(16, 8), batch_size=24, **changes)

    def make(job=None):
        learner = ScratchLearner(config, data, gpu.device, 100, gpu.products, job=job)
        learner.begin_epoch(all_rows(data), 1)
        return learner

    alone = ScratchLearner(replace(config, device="cpu"), data, cpu("fused"), 100)
    alone.begin_epoch(all_rows(data), 1)
    alone.train(0, 100, 1e-3)
    learners = [make(member(rank, 2)) for rank in range(2)]
    assert all(learner.captures for learner in learners)
    for start in range(0, 100, 24):
        sums = []

        def meet(array, sums=sums):
            sums.append(array.copy())
            raise Waits

        for learner in learners:  # the processes take turns, each up to where it would wait for the other
            learner.job.add = meet
            with pytest.raises(Waits):
                learner.train_step(start, min(start + 24, 100), 1e-3)
        for learner in learners:
            learner._sum[...] = sums[0] + sums[1]
            learner.replay(("update",), partial(learner._update, learner._sum))
    for learner in learners:
        assert {key[0] for key, _ in learner.replay._captured} == {"chunk", "update"}
        assert_same_bits(learner.model.parameters, learners[0].model.parameters)
        for name, array in alone.arrays().items():
            assert close(learner.arrays()[name], array, 1e-5), name


class Waits(Exception):
    pass


# ---- devices, cores, words


@pytest.fixture
def of_a_job(monkeypatch):
    """This process is number 1 of 3 on this machine."""
    numbers = dict(RANK=1, LOCAL_RANK=1, WORLD_SIZE=3, LOCAL_WORLD_SIZE=3, MASTER_ADDR="localhost", MASTER_PORT=1)
    for name, value in numbers.items():
        monkeypatch.setenv(name, str(value))


def test_every_process_has_a_gpu_of_its_own(monkeypatch, of_a_job):
    assert distributed.own_gpu(3) == 1
    with pytest.raises(InputError, match="^3 processes were started on a machine with 1 GPU, expected at most one for"):
        distributed.own_gpu(1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert distributed.own_gpu(1) == 0


def test_cupy_computes_on_the_gpu_of_the_process(monkeypatch, of_a_job):
    cupy, used = stand_in_gpu.install(monkeypatch), []
    cupy.cuda.Device = lambda number: SimpleNamespace(use=lambda: used.append(number))
    properties = [{"name": f"GPU {number}".encode()} for number in range(3)]
    cupy.cuda.runtime = SimpleNamespace(
        getDeviceCount=lambda: 3, getDevice=lambda: used[-1], getDeviceProperties=properties.__getitem__
    )
    assert device._gpu(fused=False).name == "GPU 1" and used == [1]


def test_arrays_on_a_gpu_need_a_torch_that_can_send_them():
    job = distributed.TorchJob.__new__(distributed.TorchJob)
    job._gpus, job.all = False, lambda value: [value, "cpu"]
    job.check_device("cpu")
    with pytest.raises(InputError, match="need a torch that was built for CUDA"):
        job.check_device("cuda")
    job._gpus = True
    with pytest.raises(InputError, match="^some processes would compute on cpu and some on cuda; give --device$"):
        job.check_device("cuda")


@pytest.mark.parametrize("given", (None, "7"))
def test_the_processes_share_the_cores(monkeypatch, of_a_job, given):
    monkeypatch.setattr(distributed, "TorchJob", lambda kind: kind)
    monkeypatch.setattr(distributed, "cores", lambda: 8)
    monkeypatch.setenv("KERNELS_NUM_THREADS", given or "")
    if given is None:
        monkeypatch.delenv("KERNELS_NUM_THREADS")
    assert distributed.join("cpu") == "cpu"
    assert os.environ["KERNELS_NUM_THREADS"] == (given or "2")


def test_a_search_is_refused(of_a_job):
    with pytest.raises(InputError, match="--search has processes of its own"):
        search.run(configs.preset("m0"), (), search=3)


class OfTorch(RuntimeError):
    pass


def test_only_what_torch_says_of_other_processes_is_a_lost_process():
    job = distributed.TorchJob.__new__(distributed.TorchJob)
    job.dist = SimpleNamespace(DistError=OfTorch)
    for error in (OfTorch("NCCL error"), RuntimeError("[.../gloo/transport/tcp/pair.cc:547] Connection closed")):
        with pytest.raises(LostProcess, match=LOST), job.peers():
            raise error
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), InputError("another")):
        with pytest.raises(type(error)) as raised, job.peers():
            raise error
        assert raised.value is error


def test_the_first_process_speaks_for_all_unless_it_stays_silent(monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for rank, error in ((0, InputError("wrong")), (1, LostProcess(LOST)), (1, InputError("wrong"))):
        monkeypatch.setenv("RANK", str(rank))
        assert cli.complain(error) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: wrong", f"error: process 1: {LOST}", "error: process 1: wrong"
    ]  # fmt: skip
    assert slept == [cli.SECONDS_TO_SPEAK]


@pytest.mark.gpu
def test_two_gpus_compute_what_one_does(tmp_path):
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    options = ("--model", "m1", "--fused", "--device", "cuda", "--data", "glyphs:5000", "--epochs", "1")
    for processes, out in ((1, "one"), (2, "two")):
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
        command = [sys.executable, *launcher, SCRIPT, *options, "--out", str(tmp_path / out)]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    one, two = (np.load(tmp_path / out / "checkpoint.npz") for out in ("one", "two"))
    for name in (name for name in one.files if name.startswith(("weight", "bias"))):
        assert close(two[name], one[name], 1e-4), name
