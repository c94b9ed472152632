"""What a learner's step does, in words: where its products come from, every call, and what of it is one launch."""

from . import forms
from .flags import format_bytes


def explain(learner, entry: dict) -> str:
    """Lines for people. The learner has begun an epoch; entry: what tuning.plan() remembered, or {}."""
    parts = [_memory(learner), _products(learner, entry)]
    for name, program in learner.programs().items():
        lines = [f"{name}: {len(program.calls)} calls, {_launch(learner)}"]
        for call in program.calls:
            beside = ""
            if learner.captures and (call.beside or call.early and learner.steps_per_launch > 1):
                beside = f"  (beside {'what follows' if call.beside else 'the end of the step before'})"
            shapes = [f"{size}" for size in map(_shape, (*call.args, *call.kwargs.values())) if size]
            lines.append(f"  {call.phase:17} {call.function.__name__:24} {' '.join(shapes)}{beside}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _shape(value) -> str:
    shape = getattr(value, "shape", None)
    return "x".join(map(str, shape)) if shape else ""


def _memory(learner) -> str:
    budget, config = learner.budget, learner.config
    where = f"streamed from the host, {budget.window:,} images at a time" if budget.window else "on the device"
    limit = f" of at most {format_bytes(config.memory_limit)}" if config.memory_limit else ""
    return f"memory: {format_bytes(budget.needed)}{limit}; images {where}; buffers of {budget.rows:,} rows"


def _launch(learner) -> str:
    if not learner.captures:
        return "executed one after another"
    return f"captured into a CUDA graph; {learner.steps_per_launch} steps per launch"


def _products(learner, entry) -> str:
    products, plan = learner.products, learner.model.plan
    whose = " and ".join(type(of).__name__ for of in (products.library, products.own) if of)
    lines = [f"products: {whose}, {products.precision}; {'tuned' if entry else 'not tuned'}"]
    if plan.padded:
        lines[0] += f"; last layer padded to {plan.columns(learner.classes)} columns"
    if products.notice:
        lines.append(products.notice)
    rows = min(learner.batch_size, learner.budget.rows)
    for layer, form in enumerate(plan.forms):
        cells = []
        for kind in forms.KINDS[: 3 if layer else 2]:
            timed = entry["us"][layer][kind] if entry else {}
            times = ", ".join(f"{name} {us} us" for name, us in timed.items())
            number = plan.algorithm(layer, kind, rows)
            by = f" by algorithm {number}" if number else ""
            cells.append(f"{kind} {getattr(form, kind)}{by}" + (f" ({times})" if times else ""))
        lines.append(f"  layer{layer}: {'; '.join(cells)}")
    if plan.algorithms:
        lines.append("  algorithms: cuBLASLt's, counted from 0, which is taken where none is named")
    return "\n".join(lines)
