"""Which form and which of cuBLASLt's algorithms each product of a model takes on this GPU: timed once, and remembered
in a file.

They differ in the order in which they add, so the file decides the last bits of a run: in fp32, which promises them,
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
from .files import replace_text
from .forms import EPILOGUE, KINDS, MASKED, OWN, SEPARATE, Algorithms, Form, Plan, candidates, default
from .model import MLP
from .products import Products
from .step_graph import Graphs, Program

ALGORITHMS = 8  # of cuBLASLt for a product: its first is often not the fastest where all take a few microseconds
# Executions in a graph, and launches of it, of which the fastest counts: few, because m1 has 44 products in all forms,
# padded or not, which makes 352 graphs, and all of this is to take a second or two. What a launch takes by itself is
# the same for all.
REPEATS, LAUNCHES = 20, 4
WARM_UP = 100  # launches of the first graph that do not count: the clocks of an idle GPU take milliseconds to rise


def cache_file() -> Path:
    """Where the plans of this user's GPUs are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused-mlp" / "tuning.json"


def plan(config: Config, device: Device, products: Products, sizes, batch: int, tune=False) -> tuple[Plan, dict]:
    """The plan for these layers, and {} or the remembered entry that it comes from, with microseconds by product and
    form. It is timed now where `tune` is set, or where the products are not fp32 and nothing is remembered of them,
    such as after an update of cuBLASLt: InputError where nothing can be had or the file cannot be used."""
    layers = len(sizes) - 1
    if not products.epilogues:
        if tune:
            raise InputError("--tune has nothing to choose from without cuBLASLt's products; run with nvmath on a GPU")
        return default(layers, own=products.library is None), {}
    key = _key(config, device, products, sizes, batch)
    entries = _read()
    if tune or key not in entries and config.precision != "fp32":
        entries[key] = measure(config, device, products, sizes, batch, GraphTimer(device))
        _write(entries)
    if key not in entries:
        return default(layers), {}
    entry = entries[key]
    try:
        rows = zip(entry["forms"], entry["algorithms"], strict=True)
        chosen, algorithms = zip(*((Form(*form), Algorithms(*map(int, numbers))) for form, numbers in rows))
        return Plan(chosen, entry["padded"], algorithms, rows=batch), entry
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{cache_file()} has no usable plan for {key}; delete it and run with --tune") from None


def _key(config, device, products, sizes, batch) -> str:
    """What a plan was found for. The numbers of algorithms mean something for one version of cuBLASLt and one
    workspace only, and a plan may have our products only where they are at hand."""
    library = f"cuBLASLt {products.library.version}, workspace {products.library.workspace_bytes}"
    model = "-".join(map(str, sizes)), config.activation, f"batch {batch}"
    model += ("batch norm",) * config.batch_norm + ("dropout",) * (config.dropout > 0.0)
    return ", ".join([device.name, config.precision, *model, library, *(["own"] if products.own else [])])


def measure(config: Config, device: Device, products: Products, sizes, batch: int, timer) -> dict:
    """Time every form of every product, by the first ALGORITHMS of the library, and choose; timer(body, recorder) gives
    seconds, or None for what the library does not have here."""
    best = None
    for padded in (False, True) if sizes[-1] % 4 else (False,):
        times, numbers = _times(config, device, products, sizes, batch, padded, timer)
        forms, total = choose(times)
        if best is None or total < best["total"]:
            microseconds = [{kind: {f: round(t * 1e6, 2) for f, t in by.items()} for kind, by in layer.items()}
                            for layer in times]  # fmt: skip
            algorithms = [[numbers.get((layer, kind, getattr(form, kind)), 0) for kind in KINDS]
                          for layer, form in enumerate(forms)]  # fmt: skip
            best = {"total": total, "padded": padded, "forms": [list(astuple(f)) for f in forms],
                    "algorithms": algorithms, "us": microseconds}  # fmt: skip
    best["total"] = round(best["total"] * 1e6, 2)
    return best


def choose(times: list[dict[str, dict[str, float]]]) -> tuple[list[Form], float]:
    """The fastest forms by layer, and the seconds of all products. A backward epilogue needs the mask of the layer
    before it, so the two of a boundary are chosen together."""
    layers = len(times)
    picked, total = [{} for _ in times], 0.0
    for layer, of in enumerate(times):
        picked[layer]["weight"] = min(of["weight"], key=of["weight"].get)
        total += of["weight"][picked[layer]["weight"]]
        after = times[layer + 1]["input"] if layer + 1 < layers else {SEPARATE: 0.0}
        pairs = [(f, i) for f, i in product(of["forward"], after) if (f == MASKED) == (i == EPILOGUE)]
        forward, backward = min(pairs, key=lambda pair: of["forward"][pair[0]] + after[pair[1]])
        picked[layer]["forward"] = forward
        if layer + 1 < layers:
            picked[layer + 1]["input"] = backward
        total += of["forward"][forward] + after[backward]
    return [Form(**forms) for forms in picked], total


def _times(config, device, products, sizes, batch, padded, timer) -> tuple[list[dict], dict]:
    """Seconds by layer, kind of product and form, by the fastest algorithm; and its number, by these three."""
    layers, xp, own, numbers = len(sizes) - 1, device.xp, products.own is not None, {}
    treated = config.batch_norm or config.dropout > 0.0
    model = MLP(sizes, config.activation, rows=batch, xp=xp, ops=device.ops, products=products,
                plan=Plan(default(layers).forms, padded), norm=config.batch_norm, dropout=config.dropout)  # fmt: skip
    inputs = [xp.asarray(np.random.default_rng(n).random((batch, n), np.float32)) for n in sizes[:-1]]
    result = [{} for _ in range(layers)]
    for layer, x in enumerate(inputs):
        dz = xp.asarray(np.random.default_rng(layer).random((batch, len(model.biases[layer])), np.float32))
        read = model._factor(x), model._factor(dz)
        choices = candidates(layer, layers, config.activation, products.epilogues, own, treated)
        for kind, options in choices.items():
            by = result[layer][kind] = {}
            for form, number in ((f, n) for f in options for n in range(1 if f == OWN else ALGORITHMS)):
                forms, algorithms = (Form(**{kind: form}),) * layers, (Algorithms(**{kind: number}),) * layers
                model.plan = Plan(forms, padded, algorithms, rows=batch)
                seconds = timer(partial(_body, model, kind, layer, x, dz, read), model.recorder)
                if seconds is not None and (form not in by or seconds < by[form]):
                    by[form], numbers[layer, kind, form] = seconds, number
            if not by:
                raise InputError(f"nothing computes the {kind} product of layer {layer} here; give --gemm cupy")
    return result, numbers


def _body(model: MLP, kind: str, layer: int, x, dz, read) -> None:
    """What a form is timed by: the product and what is fused to it, or the op that does that. `read`: what the library
    reads of x and dz. To round these to bfloat16, once for two products each, is counted where the library makes the
    forward product and the weight's gradient."""
    form = getattr(model.plan.forms[layer], kind)
    if kind == "forward":
        model.forward_layer(layer, x)
    elif kind == "weight":
        if layer == len(model.weights) - 1 and form != EPILOGUE:
            model.activation_gradient(layer, dz)
        model._inputs[layer] = read[0]
        model.weight_gradient(layer, x, dz, None if form == OWN else model._factor(dz))
    else:
        if form == EPILOGUE:
            model.mask(layer - 1, len(dz))
        out = model.input_gradient(layer, dz, read[1])
        if form == SEPARATE:
            model.activation_gradient(layer - 1, out)


class GraphTimer:
    """Seconds of what a body records, in a CUDA graph of many executions."""

    def __init__(self, device: Device):
        self._cupy, self._graphs, self._warm_up = device.xp, Graphs(device.xp, []), WARM_UP

    def __call__(self, body, recorder) -> float | None:
        from .cublaslt import Unsupported

        try:
            graph = self._graphs.capture(Program.of(recorder, body), REPEATS)
        except Unsupported:
            return None
        begin, end, seconds = self._cupy.cuda.Event(), self._cupy.cuda.Event(), []
        for _ in range(self._warm_up + LAUNCHES):
            begin.record(self._graphs.stream)
            self._graphs.launch(graph)
            end.record(self._graphs.stream)
            end.synchronize()
            seconds.append(self._cupy.cuda.get_elapsed_time(begin, end) * 1e-3 / REPEATS)
        self._warm_up = 1
        return min(seconds[-LAUNCHES:])


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
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps(entries, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror}); set XDG_CACHE_HOME to another folder") from None
