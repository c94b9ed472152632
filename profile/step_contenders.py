"""The whole training step in every form that is timed, on one data set of synthetic bytes.

A step is one batch: gather, forward, loss, backward, optimizer. Each learner is what train.py would train with.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import measure
import numpy as np
from measure import Contender

from mlp.configs import Config
from mlp.data import BYMERGE_CLASSES, PIXELS, Dataset
from mlp.device import Device, select
from mlp.ranges import attach, nvtx_annotate
from mlp.scratch import ScratchLearner

EAGER, COMPILED = "torch eager, fused optimizer", "torch.compile, fused optimizer"
CAPTURED = "torch CUDA graph, fused optimizer"
GEMM_ONLY = "GEMMs alone"  # the names of all contenders that compute nothing but the matrix products begin so


def synthetic_data(images: int) -> Dataset:
    """Random bytes in place of images: the time of a step does not depend on what they show."""
    rng = np.random.default_rng(0)
    pixels = np.frombuffer(rng.bytes(images * PIXELS), np.uint8).reshape(images, PIXELS)
    labels = rng.integers(0, len(BYMERGE_CLASSES), images).astype(np.int32)
    return Dataset("synthetic bytes", pixels.copy(), labels, BYMERGE_CLASSES, "")


def sizes(config: Config) -> tuple[int, ...]:
    return PIXELS, *config.hidden, len(BYMERGE_CLASSES)


def set_precision(device: Device, precision: str) -> None:
    """Let float32 matrix products on a GPU round their factors to TF32, in CuPy and torch alike, or not."""
    if device.kind == "cpu":
        return
    from cupy._core import _routines_linalg as linalg

    compute = linalg.COMPUTE_TYPE_TF32 if precision == "tf32" else linalg.COMPUTE_TYPE_DEFAULT
    linalg.set_compute_type(np.dtype(np.float32), compute)
    if measure.has_torch():
        import torch

        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def steps(learner, images: int):
    """run(k): the learner trains on the k-th batch, over and over through a shuffled epoch."""
    learner.begin_epoch(np.random.default_rng(1).permutation(images).astype(np.int32))
    batch, lr = learner.batch_size, learner.config.lr
    starts = images - batch + 1
    return lambda k: learner.train_step(k * batch % starts, k * batch % starts + batch, lr)


def learner(name: str, config: Config, data: Dataset, device: Device):
    """What train.py would train with, or its twin in torch."""
    images = len(data.labels)
    if name in ("plain", "fused"):
        return ScratchLearner(config, data, select(device.kind, name == "fused"), images)
    from mlp.torch_models import TorchLearner

    return TorchLearner(config, data, device.kind, images, compile=name == COMPILED)


def contender(name: str, device: Device, run) -> Contender:
    """The contender that calls `run` of the learner `name`."""
    return Contender(run, shared=device.kind == "cpu" and name == "fused")


def learner_names(device: Device) -> list[str]:
    """The learners that this machine can have."""
    return ["plain", "fused", *([EAGER] if torch_can(device.kind) else [])]


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
    learner = TorchLearner(config, data, "cuda", images)
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
    rng = np.random.default_rng(0)
    new = lambda *shape: xp.asarray(rng.standard_normal(shape, dtype=np.float32))  # noqa: E731
    return gemms(config, lambda a, b, out: xp.matmul(a, b, out=out), new, lambda *s: xp.empty(s, np.float32))


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
        return contender(name, device, steps(model, len(data.labels)))

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
