"""The whole training step in every form that is timed, on one data set of synthetic bytes.

A step is one batch: gather, forward, loss, backward, optimizer. `fused` is call by call, so on a GPU with CuPy's
products; `fused, CUDA graph` is what train.py makes where cuBLASLt's are there: several steps in a launch.
"""

import os
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise

import measure
import numpy as np
from measure import Contender

from mlp import InputError, run
from mlp.configs import Config
from mlp.data import BYMERGE_CLASSES, PIXELS, Dataset
from mlp.device import Device, select
from mlp.gemm import ArrayGemm
from mlp.ranges import attach, nvtx_annotate
from mlp.scratch import ScratchLearner

IMAGES = 566_667  # 70 % of ByMerge
EAGER, COMPILED = "torch eager, fused optimizer", "torch.compile, fused optimizer"
GRAPH, CAPTURED = "fused, CUDA graph", "torch CUDA graph, fused optimizer"
GEMM_ONLY = "GEMMs alone"  # the names of all contenders that compute nothing but the matrix products begin so
CEILINGS = {"cpu": (2048, 64), "cuda": (8192, 1024)}  # order of the matrices, MB of the copied array
PRECISIONS = {"float32": "fp32", "tf32": "tf32", "bf16": "bf16"}  # in result files -> --precision


def synthetic_data(images: int) -> Dataset:
    """Random bytes in place of images: the time of a step does not depend on what they show."""
    rng = np.random.default_rng(0)
    pixels = np.frombuffer(rng.bytes(images * PIXELS), np.uint8).reshape(images, PIXELS)
    labels = rng.integers(0, len(BYMERGE_CLASSES), images).astype(np.int32)
    return Dataset("synthetic bytes", pixels.copy(), labels, BYMERGE_CLASSES, "")


def sizes(config: Config) -> tuple[int, ...]:
    return PIXELS, *config.hidden, len(BYMERGE_CLASSES)


@contextmanager
def private_cache():
    """Plans of layers (mlp/tuning.py) are timed anew in this block, and the user's are neither read nor changed."""
    before = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        try:
            yield
        finally:
            del os.environ["XDG_CACHE_HOME"]
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before


def set_torch_precision(device: Device, precision: str) -> None:
    """Let torch's float32 matrix products on a GPU round their factors to TF32, or not."""
    if device.kind == "cuda" and measure.has_torch():
        import torch

        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def learner(name: str, config: Config, data: Dataset, device: Device):
    """What train.py would train with, or its twin in torch. InputError for a graph where steps cannot be captured."""
    images = len(data.labels)
    if name in ("plain", "fused"):
        config = replace(config, fused=name == "fused", gemm="cupy" if device.kind == "cuda" else "auto")
        return ScratchLearner(config, data, select(device.kind, config.fused), images)
    if name == GRAPH:
        ours, _ = run.make_learner(config, data, select(device.kind, True), images)
        if not ours.captures:
            raise InputError(ours.products.notice or f"no CUDA graph of the products {config.gemm} on {device.name}")
        return ours
    from mlp.torch_models import TorchLearner

    return TorchLearner(torch_config(config, compile=name == COMPILED), data, device.kind, images)


def torch_config(config: Config, compile=False) -> Config:
    """The same model in torch. What torch's products are rounded to is set_torch_precision()'s."""
    ours = dict(precision="fp32", gemm="auto", memory_limit=None)  # which say nothing to torch
    return replace(config, backend="torch", fused=False, compile=compile, **ours)


def contender(learner, device: Device, run, repeats: int = 1) -> Contender:
    """The contender that calls `run`, which makes `repeats` steps of the learner."""
    shared = device.kind == "cpu" and getattr(learner.device, "fused", False)
    return Contender(run, shared, repeats)


def stepping(learner, images: int, device: Device, steps: int | None = None) -> Contender:
    """The learner trains on batch after batch, over and over through a shuffled epoch of all images: `steps` of them in
    a call, or as many as it launches at once, but no more than there are."""
    n = min(steps or learner.steps_per_launch, images // learner.batch_size)
    learner.begin_epoch(np.random.default_rng(1).permutation(images).astype(np.int32))
    stride, lr = n * learner.batch_size, learner.config.lr
    calls = images // stride

    def run(k):
        learner.steps_per_launch = n
        start = k % calls * stride
        learner.train(start, start + stride, lr)

    return contender(learner, device, run, n)


def learner_names(device: Device) -> list[str]:
    """The learners that this machine can have."""
    names = ["plain", "fused", *([GRAPH] if device.kind == "cuda" else [])]
    return [*names, *([EAGER] if torch_can(device.kind) else [])]


def torch_can(kind: str) -> bool:
    """Whether torch is there and computes on `kind`."""
    if not measure.has_torch():
        return False
    import torch

    return kind == "cpu" or torch.cuda.is_available()


def torch_captured(config: Config, data: Dataset, stream):
    """run(k): torch's whole step as one CUDA graph; only the batch's indices are copied in before each launch."""
    import torch

    from mlp.torch_models import TorchLearner

    images, batch = len(data.labels), config.batch_size
    learner = TorchLearner(torch_config(config), data, "cuda", images)
    for group in learner.optimizer.param_groups:
        group["capturable"] = True
    order = torch.from_numpy(np.random.default_rng(1).permutation(images)).to("cuda")
    learner.begin_epoch(np.arange(batch))
    index, starts = learner._order, images - batch + 1
    replay = measure.torch_graph([lambda: learner.train_step(0, batch, config.lr)], stream)
    own = torch.cuda.ExternalStream(stream.ptr)

    def run(k):
        start = k * batch % starts
        with torch.cuda.stream(own):
            index.copy_(order[start : start + batch])
        replay(k)

    return run


def gemms(config: Config, multiply, new, empty):
    """run(k): the matrix products of one step and nothing else, by multiply(a, b, out)."""
    widths, batch = sizes(config), config.batch_size
    x, d = [new(batch, n) for n in widths], [new(batch, n) for n in widths]
    w = [new(n, m) for n, m in pairwise(widths)]
    dw = [empty(n, m) for n, m in pairwise(widths)]

    def run(_=0):
        for i, weight in enumerate(w):
            multiply(x[i], weight, x[i + 1])
        for i in reversed(range(len(w))):
            multiply(x[i].T, d[i + 1], dw[i])
            if i:
                multiply(d[i + 1], w[i].T, d[i])

    return run


def array_gemms(config: Config, xp):
    rng, multiply = np.random.default_rng(0), ArrayGemm(xp, config.precision).forward
    new = lambda *shape: xp.asarray(rng.standard_normal(shape, dtype=np.float32))  # noqa: E731
    return gemms(config, multiply, new, lambda *shape: xp.empty(shape, np.float32))


def captured_gemms(config: Config, stream):
    """By torch in a CUDA graph, because CuPy refuses cuBLAS while it captures."""
    import torch

    new = lambda *shape: torch.randn(shape, device="cuda")  # noqa: E731
    run = gemms(config, lambda a, b, out: torch.mm(a, b, out=out), new, lambda *s: torch.empty(s, device="cuda"))
    return measure.torch_graph([run], stream)


def builders(config: Config, data: Dataset, device: Device, stream) -> dict[str, Callable[[], Contender]]:
    """Name -> what makes the contender ready, for all that this machine can have."""

    def trained(name, ranges=False):
        model = learner(name, config, data, device)
        if ranges:
            attach(model, nvtx_annotate())
        return stepping(model, len(data.labels), device)

    table = {name: partial(trained, name) for name in learner_names(device)}
    table["fused, NVTX ranges attached"] = partial(trained, "fused", ranges=True)
    table[GEMM_ONLY] = lambda: Contender(array_gemms(config, device.xp))
    if device.kind == "cpu":
        table[f"{GEMM_ONLY}, shared threads"] = lambda: Contender(array_gemms(config, np), shared=True)
    elif torch_can("cuda"):
        table[COMPILED] = partial(trained, COMPILED)
        table[CAPTURED] = lambda: Contender(torch_captured(config, data, stream))
        table[f"{GEMM_ONLY}, torch CUDA graph"] = lambda: Contender(captured_gemms(config, stream))
    return table


def ceilings(device: Device, precision: str) -> dict[str, Callable[[], Contender]]:
    """A large matrix product and, in float32, a large copy: the largest rates that this machine gives."""
    xp, (n, megabytes) = device.xp, CEILINGS[device.kind]
    a, b = (xp.asarray(np.random.default_rng(k).random((n, n), np.float32)) for k in range(2))
    out, multiply = xp.empty_like(a), ArrayGemm(xp, PRECISIONS[precision]).forward
    table = {f"matrix product {n}": lambda: Contender(lambda k: multiply(a, b, out))}
    if precision != "float32":
        return table
    source = xp.ones(megabytes * 2**18, np.float32)
    target = xp.empty_like(source)
    table[f"copy {megabytes} MB"] = lambda: Contender(lambda k: xp.copyto(target, source))
    if device.kind == "cpu" and torch_can("cpu"):
        import torch

        to, of = torch.from_numpy(target), torch.from_numpy(source)
        table[f"copy {megabytes} MB, torch"] = lambda: Contender(lambda k: to.copy_(of))
    return table


def rate(name: str, device: Device, times: np.ndarray) -> tuple[float, str]:
    """The rate of a contender of ceilings(), and its unit. A copy reads its bytes and writes them."""
    n, megabytes = CEILINGS[device.kind]
    amount, unit = (2 * n**3, "GFLOP/s") if name.startswith("matrix") else (2 * megabytes * 2**20, "GB/s")
    return amount / measure.quiet(times) / 1e9, unit
