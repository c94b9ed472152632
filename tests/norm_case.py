"""Cases of batch normalisation and dropout: see case.py, of which this is more."""

import numpy as np

from . import norm_references
from .case import SEED, Case, _case, _output

COUNTED = dict(seed=SEED, layer=5, row=3)


def _settings(backend, B, norm, dropout, device_step, offset):
    """Keyword arguments of the op, and of the reference."""
    counted = COUNTED | {"step": 7} if dropout else {}
    passed = dict(counted, dropout=dropout)
    if device_step:
        passed["step"] = backend.array(np.array(7.0))
    return passed | {name: backend.array(x, offset=offset) for name, x in norm.items()}, counted


def batch_norm_stats(*shape, **variant) -> Case:
    def compute(rng, backend, B, N, offset=0, running=False, momentum=0.1):
        z = norm_references.norm_inputs(rng, B, N, False)[0]
        before = [rng.normal(0, 1, N).astype(np.float32), rng.random(N).astype(np.float32)]
        outputs = [_output(backend, offset, shape=(N,)) for _ in range(2)]
        updated = [_output(backend, offset, x) for x in before] if running else []
        (mean, _), (var, _) = outputs
        names = {k: x for k, (x, _) in zip(("running_mean", "running_var"), updated)}
        backend.ops.batch_norm_stats(backend.array(z, offset=offset), mean=mean, var=var, momentum=momentum, **names)
        for _, intact in (*outputs, *updated):
            intact()
        changed = [x for x, _ in updated] or None
        return norm_references.statistics_checks(z, mean, var, changed, before, momentum)

    return _case("batch_norm_stats", compute, *shape, **variant)


def norm_act(activation, *shape, **variant) -> Case:
    def compute(rng, backend, B, N, offset=0, in_place=False, norm=False, dropout=0.0, device_step=False):
        z, _, bias, arrays = norm_references.norm_inputs(rng, B, N, norm)
        y, intact = _output(backend, offset, z if in_place else None, (B, N))
        passed, counted = _settings(backend, B, arrays, dropout, device_step, offset)
        source = y if in_place else backend.array(z, offset=offset)
        backend.ops.norm_act(source, backend.array(bias, offset=offset), activation, out=y, **passed)
        intact()
        yield norm_references.value_check(y, z, bias, activation, arrays, dropout, **counted)

    return _case(f"norm_act_{activation}", compute, *shape, **variant)


def norm_act_backward(activation, *shape, **variant) -> Case:
    def compute(rng, backend, B, N, offset=0, in_place=False, norm=False, dropout=0.0, device_step=False):
        z, dy, bias, arrays = norm_references.norm_inputs(rng, B, N, norm)
        dz, intact = _output(backend, offset, dy if in_place else None, (B, N))
        names = ("bias_grad", "weight_grad") if norm else ("bias_grad",)
        sums = {name: _output(backend, offset, shape=(N,)) for name in names}
        passed, counted = _settings(backend, B, arrays, dropout, device_step, offset)
        results = backend.ops.norm_act_backward(
            dz if in_place else backend.array(dy, offset=offset), backend.array(z, offset=offset), backend.array(bias),
            activation, out=dz, **{name: out for name, (out, _) in sums.items()}, **passed,
        )  # fmt: skip
        intact()
        for _, sums_intact in sums.values():
            sums_intact()
        return norm_references.norm_gradient_checks(results, dy, z, bias, activation, arrays, dropout, **counted)

    also = ("norm_input_gradient",) if variant.get("norm") else ()
    return _case(f"norm_act_backward_{activation}", compute, *shape, also=also, **variant)
