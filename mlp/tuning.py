"""Which form each product of a model takes on this GPU: timed once, and remembered in a file.

Forms differ in the order in which they add, so the file decides the last bits of a run: in fp32, which promises them,
nothing is timed unless it is asked for.
"""

import json
import os
from dataclasses import astuple
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from . import InputError
from .configs import Config
from .device import Device
from .forms import EPILOGUE, SEPARATE, Form, Plan, candidates, default
from .model import MLP
from .products import Products
from .step_graph import Graphs, Program

REPEATS, LAUNCHES = 50, 5  # executions in a graph, and launches of it, of which the fastest counts


def cache_file() -> Path:
    """Where the plans of this user's GPUs are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused-mlp" / "tuning.json"


def plan(config: Config, device: Device, products: Products, sizes, batch: int, tune=False) -> tuple[Plan, dict]:
    """The plan for these layers, and {} or the remembered entry that it comes from, with microseconds by product and
    form. It is timed now where `tune` is set, or where the products are not fp32 and nothing is remembered."""
    layers = len(sizes) - 1
    if not products.epilogues:
        if tune:
            raise InputError("--tune has nothing to choose from without cuBLASLt's products; run with nvmath on a GPU")
        return default(layers, own=products.library is None), {}
    key = ", ".join([device.name, config.precision, "-".join(map(str, sizes)), config.activation, f"batch {batch}"])
    entries = _read()
    if tune or key not in entries and config.precision != "fp32":
        entries[key] = measure(config, device, products, sizes, batch, GraphTimer(device))
        _write(entries)
    if key not in entries:
        return default(layers), {}
    entry = entries[key]
    try:
        return Plan(tuple(Form(*form) for form in entry["forms"]), entry["padded"]), entry
    except (KeyError, TypeError):
        raise InputError(f"{cache_file()} has no usable plan for {key}; delete it and run with --tune") from None


def measure(config: Config, device: Device, products: Products, sizes, batch: int, timer) -> dict:
    """Time every form of every product and choose; timer(program) gives seconds, or None for a form that the library
    does not have here."""
    best = None
    for padded in (False, True) if sizes[-1] % 4 else (False,):
        times = _times(config, device, products, sizes, batch, padded, timer)
        forms, total = choose(times)
        if best is None or total < best["total"]:
            microseconds = [{kind: {f: round(t * 1e6, 2) for f, t in by.items()} for kind, by in layer.items()}
                            for layer in times]  # fmt: skip
            best = {"total": total, "padded": padded, "forms": [list(astuple(f)) for f in forms], "us": microseconds}
    best["total"] = round(best["total"] * 1e6, 2)
    return best


def choose(times: list[dict[str, dict[str, float]]]) -> tuple[list[Form], float]:
    """The fastest forms by layer, and the seconds of all products. A backward epilogue needs the forward one of the
    layer before it, so the two of a boundary are chosen together."""
    layers = len(times)
    picked, total = [{} for _ in times], 0.0
    for layer, of in enumerate(times):
        picked[layer]["weight"] = min(of["weight"], key=of["weight"].get)
        total += of["weight"][picked[layer]["weight"]]
        after = times[layer + 1]["input"] if layer + 1 < layers else {SEPARATE: 0.0}
        pairs = [(f, i) for f, i in product(of["forward"], after) if i != EPILOGUE or f == EPILOGUE]
        forward, backward = min(pairs, key=lambda pair: of["forward"][pair[0]] + after[pair[1]])
        picked[layer]["forward"] = forward
        if layer + 1 < layers:
            picked[layer + 1]["input"] = backward
        total += of["forward"][forward] + after[backward]
    return [Form(**forms) for forms in picked], total


def _times(config, device, products, sizes, batch, padded, timer) -> list[dict]:
    """Seconds by layer, kind of product and form."""
    layers, xp = len(sizes) - 1, device.xp
    model = MLP(sizes, config.activation, rows=batch, xp=xp, ops=device.ops, products=products,
                plan=Plan(default(layers).forms, padded))  # fmt: skip
    inputs = [xp.asarray(np.random.default_rng(n).random((batch, n), np.float32)) for n in sizes[:-1]]
    result = [{} for _ in range(layers)]
    for layer in range(layers):
        options = candidates(layer, layers, config.activation, products.epilogues, products.own is not None)
        dz = xp.asarray(np.random.default_rng(layer).random((batch, len(model.biases[layer])), np.float32))
        for kind, forms in options.items():
            result[layer][kind] = {}
            for form in forms:
                model.plan = Plan(_with(layers, layer, kind, form), padded)
                seconds = timer(partial(_body, model, kind, layer, inputs[layer], dz), model.recorder)
                if seconds is not None:
                    result[layer][kind][form] = seconds
    return result


def _with(layers: int, layer: int, kind: str, form: str) -> tuple[Form, ...]:
    """Separate forms but for one; with the mask that a backward epilogue needs, or that a forward one leaves."""
    forms = [{} for _ in range(layers)]
    forms[layer][kind] = form
    if form == EPILOGUE and kind == "input":
        forms[layer - 1]["forward"] = EPILOGUE
    if form == EPILOGUE and kind == "forward" and layer + 1 < layers:
        forms[layer + 1]["input"] = EPILOGUE
    return tuple(Form(**changes) for changes in forms)


def _body(model: MLP, kind: str, layer: int, x, dz) -> None:
    """What a form is timed by: the product and what is fused to it, or the op that does that."""
    form = getattr(model.plan.forms[layer], kind)
    if kind == "forward":
        model.forward_layer(layer, x)
    elif kind == "weight":
        if layer == len(model.weights) - 1 and form != EPILOGUE:
            model.activation_gradient(layer, dz)
        model.weight_gradient(layer, x, dz, model._factor(dz))
    else:
        if form == EPILOGUE:
            model.mask(layer - 1, len(dz))
        out = model.input_gradient(layer, dz, model._factor(dz))
        if form == SEPARATE:
            model.activation_gradient(layer - 1, out)


class GraphTimer:
    """Seconds of what a body records, in a CUDA graph of many executions."""

    def __init__(self, device: Device):
        self._cupy, self._graphs = device.xp, Graphs(device.xp, [])

    def __call__(self, body, recorder) -> float | None:
        from .cublaslt import Unsupported

        try:
            graph = self._graphs.capture(Program.of(recorder, body), REPEATS)
        except Unsupported:
            return None
        begin, end, seconds = self._cupy.cuda.Event(), self._cupy.cuda.Event(), []
        for _ in range(LAUNCHES + 1):
            begin.record(self._graphs.stream)
            self._graphs.launch(graph)
            end.record(self._graphs.stream)
            end.synchronize()
            seconds.append(self._cupy.cuda.get_elapsed_time(begin, end) * 1e-3 / REPEATS)
        return min(seconds[1:])


def _read() -> dict:
    try:
        entries = json.loads(cache_file().read_text())
        if not isinstance(entries, dict):
            raise ValueError("it holds no plans")
        return entries
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{cache_file()} cannot be read ({error}); delete it, and layers are timed again") from None


def _write(entries: dict) -> None:
    file = cache_file()
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(entries, indent=1) + "\n")
        os.replace(part, file)
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror}); set XDG_CACHE_HOME to another folder") from None
