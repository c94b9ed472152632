"""Where a training went wrong: the step, and in it the first array that became NaN or infinite.

Nothing looks for that while a run is well. Steps are the same bits every time they are made, so the one that went wrong
is found afterwards: from the last good state on, the steps are made again one by one, and the first that leaves
something that is not finite is made a third time and looked at phase by phase.
"""

from contextlib import contextmanager
from functools import partial

from .configs import Config
from .optim import rate_at
from .progress import Progress

# What an array holds, by its name and by the name of the array that it goes with: ours (scratch_state.py, model.py) and
# torch's.
KINDS = {
    "weight": "the weights", "bias": "the biases", "norm_weight": "the norm weights",
    "norm_mean": "the running means", "norm_var": "the running variances",
    "running_mean": "the running means", "running_var": "the running variances",
}  # fmt: skip
OF = {
    "m": "the first moments of ", "v": "the second moments of ", "velocity": "the momentum of ",
    "exp_avg": "the first moments of ", "exp_avg_sq": "the second moments of ", "momentum_buffer": "the momentum of ",
    "average": "the average of ", "average_parameters": "the average of ", "average_running": "the average of ",
}  # fmt: skip


def locate(learner, index, config: Config, progress: Progress) -> str:
    """What went wrong after `progress`, whose state was finite, in the epoch on the images `index`: "step 7 (epoch 1):
    the gradient of layer 2 of 4". Leaves the learner in that step."""
    n, batch = len(index), learner.batch_size
    learner.begin_epoch(index, progress.epoch)
    before = progress.state
    learner.load_state(before)
    for start in range(progress.done, n, batch):
        stop, lr = min(start + batch, n), rate_at(config, progress.epoch, start, n, batch)
        learner.train_step(start, stop, lr)
        if learner.job.any(not learner.is_finite()):
            learner.load_state(before)
            step = (progress.epoch - 1) * -(-n // batch) + start // batch + 1
            where = next(filter(None, learner.job.all(learner.first_fault(start, stop, lr))), "the loss")
            return f"step {step:,} (epoch {progress.epoch}): {where}"
        before = learner.state()
    return f"the validation loss of epoch {progress.epoch}"


def of_scratch(learner, start: int, stop: int, lr: float) -> str:
    """ScratchLearner.first_fault()."""
    found, annotate, model = [], learner.replay.annotate, learner.model
    layers = range(len(model.weights))
    written = [x for kind in ("forward", "backward") for layer in layers for x in model.written(kind, layer)]
    for buffer in (*written, learner.dlogits):
        buffer[...] = 0  # what an earlier batch has left in it is not this one's

    @contextmanager
    def looking(phase):
        yield
        if not found and (what := _of_phase(learner, phase)):
            found.append(what)

    learner.replay.annotate = looking
    try:
        learner.train_step(start, stop, lr)
    finally:
        learner.replay.annotate = annotate
    return found[0] if found else ""


def _of_phase(learner, phase: str) -> str:
    """What is not finite among that which a phase of a step (see ranges.py) has written; "" where all is."""
    model, xp = learner.model, learner.device.xp

    def bad(arrays):
        return not all(xp.isfinite(x).all() for x in arrays)

    kind, _, layer = phase.partition("/layer")
    if layer:
        written, what = model.written(kind, int(layer)), {"forward": "output", "backward": "gradient"}[kind]
        return f"the {what} of layer {int(layer) + 1} of {len(model.weights)}" if bad(written) else ""
    if kind == "loss":
        return "the loss" if bad([learner.dlogits, learner.loss_totals]) else ""
    if kind == "optimizer":
        for name, flat in learner.states.arrays.items():
            for part, view in learner.states.views(name, flat):
                if bad([view]):
                    kind = part.rstrip("0123456789")
                    return _after_update(name, kind, int(part.removeprefix(kind)), len(model.weights))
    return ""


def _after_update(name: str, kind: str, layer: int, layers: int) -> str:
    return f"{OF.get(name, '')}{KINDS[kind]} of layer {layer + 1} of {layers} after the update"


def of_torch(learner, start: int, stop: int, lr: float) -> str:
    """TorchLearner.first_fault()."""
    found, layers, handles = [], len(learner.model), []

    def look(what, tensor):
        if not found and not tensor.isfinite().all():
            found.append(what)

    def look_after_loss(what, gradient):
        look("the loss", learner.loss_totals)
        look(what, gradient)

    for number, layer in enumerate(learner.model, 1):
        where = f"of layer {number} of {layers}"
        see = partial(look, f"the output {where}")
        handles.append(layer.register_forward_hook(lambda _, given, output, see=see: see(output)))
        see = partial(look_after_loss, f"the gradient {where}")
        handles += [p.register_post_accumulate_grad_hook(lambda p, see=see: see(p.grad)) for p in layer.parameters()]
    forward_loss = learner.forward_loss
    learner.forward_loss = learner.eager_forward_loss  # a compiled one calls no hooks
    try:
        learner.train_step(start, stop, lr)
    finally:
        learner.forward_loss = forward_loss
        for handle in handles:
            handle.remove()
    for name, tensor in learner.state().items():
        look(_torch_name(learner, name), tensor)
    return found[0] if found else ""


def _torch_name(learner, name: str) -> str:
    """One of learner.state()'s tensors in words: "model/1.0.weight", "average/1.0.weight", "optimizer/2/exp_avg"."""
    of, _, place = name.partition("/")
    if of == "optimizer":
        number, _, of = place.partition("/")
        place = [name for name, _ in learner.model.named_parameters()][int(number)]
    if place.count(".") != 2:
        return "the loss"  # its totals
    layer, module, kind = place.split(".")
    if kind == "weight" and hasattr(learner.model[int(layer)][int(module)], "running_mean"):
        kind = "norm_weight"
    return _after_update(of, kind, int(layer), len(learner.model))
