"""What a step must take at least: its launches, bytes and flops, priced with costs measured in the same run.

    on the host    launches * host time of a launch + bytes copied from the host / rate of such a copy
    on the device  bytes / bandwidth of a large copy + flops / rate of a large matrix product + launches * node

A launch is an array operation on one element. A step that is called op by op takes the longer of the two, because the
host runs ahead of a GPU. A graph of n steps takes the device's time, and the host's for one launch in n steps. node:
what the GPU needs to go from one kernel to the next, however small they are; a CPU computes and calls in turns, so
there it is the host time of a launch.

Left out, on purpose: arrays that stay in a cache, kernels that run next to each other, products that are too small for
the full rate, kernels that a library launches beside its product, NumPy's time for a batch in host memory.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import measure
import numpy as np
import step_contenders as contenders
from measure import Contender, quiet

from mlp import products
from mlp.device import Device

CALLS = 1000  # launches in a sample of their cost, and nodes of the graph
UPLOADED = 64  # MB
# Of kernels.plain on float32: array operations, and bytes that they move per element of the op's first array, which is
# its largest; gathered bytes are per pixel of the batch.
ARRAY_OPS = {
    "bias_act relu": (2, 16), "bias_act identity": (1, 8),
    "bias_act_backward relu": (4, 20), "bias_act_backward identity": (1, 4),
    "softmax_cross_entropy": (33, 36), "adam_step": (13, 120), "gather_batch": (11, 7),
}  # fmt: skip
NUMPY_GATHER = (3, 7)  # the same of ArrayTrainer.gather() in host memory
# Arguments that are read and written, by position; all others are read or written once.
IN_PLACE = {"adam_step": (0, 2, 3), "sgd_step": (0, 2)}


class Work(NamedTuple):
    """Of one step. uploaded: bytes that are copied from the host to a GPU."""

    launches: int
    bytes: int
    flops: int
    uploaded: int = 0

    @classmethod
    def total(cls, parts) -> "Work":
        return cls(*map(sum, zip(*parts)))


def of_call(call) -> Work:
    """One launch. Every array that the call names is moved once; those that are updated in place, twice; and of the
    data set that a batch is gathered from, as many rows as the batch has. Flops: those of matrix products."""
    name, arrays = call.function.__name__, [a for a in (*call.args, *call.kwargs.values()) if hasattr(a, "nbytes")]
    moved = sum(a.nbytes for a in arrays)
    moved += sum(call.args[k].nbytes for k in IN_PLACE.get(name, ()) if call.args[k] is not None)
    if name == "gather_batch":
        (images, labels, index), rows = call.args[:3], len(call.kwargs["out_x"])
        moved -= sum(a.nbytes - a.nbytes // len(a) * rows for a in (images, labels, index))
    flops = 0
    if name.startswith(("forward", "input_gradient", "weight_gradient")):
        a, b = arrays[:2]
        flops = 2 * a.size * (b.shape[0] if name.startswith("input_gradient") else b.shape[1])
    return Work(1, moved, flops, 0)


def of_program(program) -> Work:
    """Of what a step_graph.Program calls."""
    return Work.total(map(of_call, program.calls))


def of_trainer(trainer) -> Work:
    """Of an ArrayTrainer, by ARRAY_OPS."""
    B, sizes, on_gpu = trainer.batch_size, trainer.sizes, trainer.device.kind == "cuda"
    parts = []
    for layer, (K, N) in enumerate(pairwise(sizes)):
        product, activation = Work(1, 4 * (B * K + K * N + B * N), 2 * B * K * N), trainer.activations[layer]
        parts += [product] * (3 if layer else 2)  # the first layer has no input gradient
        parts += [_array_op(f"{op} {activation}", B * N) for op in ("bias_act", "bias_act_backward")]
    parts.append(_array_op("softmax_cross_entropy", B * sizes[-1]))
    parts += [_array_op("adam_step", p.size) for p, *_ in trainer.adams]
    if trainer.resident:
        parts.append(_array_op("gather_batch", B * sizes[0]))
    elif on_gpu:
        parts.append(Work(2, 0, 0, uploaded=4 * B * (sizes[0] + 1)))
    else:
        parts.append(Work(NUMPY_GATHER[0], NUMPY_GATHER[1] * B * sizes[0], 0))
    return Work.total(parts)


def _array_op(name: str, elements: int) -> Work:
    launches, per_element = ARRAY_OPS[name]
    return Work(launches, per_element * elements, 0)


@dataclass(frozen=True)
class Costs:
    """Seconds per launch, per node of a graph, per byte and per byte uploaded, and per flop by precision."""

    launch: float
    node: float
    byte: float
    upload: float
    flop: dict[str, float]

    def predicted(self, work: Work, precision: str, steps: int = 0) -> dict:
        """predicted_us and bound of ladder.csv, or in `note` why there are none."""
        if precision not in self.flop:
            return {"note": f"not predicted, because the large matrix product in {precision} failed"}
        seconds, bound = self.predict(work, precision, steps)
        return {"predicted_us": measure.significant(seconds * 1e6), "bound": bound}

    def predict(self, work: Work, precision: str, steps: int = 0) -> tuple[float, str]:
        """Seconds of a step, and which term is the largest. steps: in a launch of its graph; 0: there is none."""
        device = {
            "bytes": work.bytes * self.byte, "flops": work.flops * self.flop[precision],
            "nodes": work.launches * self.node,
        }  # fmt: skip
        whole, largest = sum(device.values()), max(device, key=device.get)
        if steps:
            launch = self.launch / steps
            return whole + launch, "launches" if launch > device[largest] else largest
        host = work.launches * self.launch + work.uploaded * self.upload
        return max(host, whole), "launches" if host > whole else largest


def builders(device: Device, config, precisions, stream) -> dict:
    """Name -> what makes the contender ready that measures a cost; products in bf16 are those of cuBLASLt."""
    xp = device.xp
    tiny = xp.zeros(1, np.float32)

    def launch():
        xp.add(tiny, tiny, out=tiny)

    def launches(_):
        for _ in range(CALLS):
            launch()

    table = {"launch": lambda: Contender(launches, repeats=CALLS)}
    for precision in precisions:
        if precision == "bf16":
            table["matrix product, bf16"] = lambda: _bf16_product(device, config)
        else:
            made = contenders.ceilings(device, precision)
            table |= {f"{name}, {precision}" if name[0] == "m" else name: made[name] for name in made}
    if device.kind == "cuda":
        source = np.ones(UPLOADED * 2**18, np.float32)
        table["node"] = lambda: Contender(measure.cupy_graph([launch] * CALLS, stream), repeats=CALLS)
        table["upload"] = lambda: Contender(lambda k: xp.asarray(source))
    return table


def _bf16_product(device: Device, config) -> Contender:
    xp, n, rng = device.xp, contenders.CEILINGS[device.kind][0], np.random.default_rng(0)
    library = products.select(replace(config, precision="bf16", gemm="cublaslt"), device).library
    a, b, out = xp.empty((n, n), np.uint16), xp.empty((n, n), np.uint16), xp.empty((n, n), np.float32)
    for factor in (a, b):
        device.ops.to_bfloat16(xp.asarray(rng.random((n, n), np.float32)), out=factor)
    return Contender(lambda k: library.forward(a, b, out))


def measured(samples: dict, device: Device) -> tuple[Costs, list[dict]]:
    """The costs, and the rows of costs.csv, from the seconds of the contenders of builders()."""
    seconds, rows, copies, flop = {name: quiet(times) for name, times in samples.items()}, [], [], {}
    for name, times in samples.items():
        if name in ("launch", "node"):
            value, unit = seconds[name] * 1e6, "us"
        elif name == "upload":
            value, unit = UPLOADED * 2**20 / seconds[name] / 1e9, "GB/s"
        else:
            value, unit = contenders.rate(name, device, times)
        if name.startswith("copy"):
            copies.append(1e-9 / value)
        elif name.startswith("matrix"):
            flop[name.rpartition(", ")[2]] = 1e-9 / value
        rows.append({"name": name, "value": measure.significant(value), "unit": unit})
    upload = seconds["upload"] / (UPLOADED * 2**20) if "upload" in seconds else 0.0
    launch = seconds["launch"]
    return Costs(launch, seconds.get("node", launch), min(copies), upload, flop), rows
