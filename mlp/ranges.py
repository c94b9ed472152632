"""Named ranges around the phases of a run, for Nsight Systems or a script's own clock.

They are attached to a learner from outside: without them the same code runs as if this file did not exist.

    epoch                      by loop.fit
      step                     once per chunk of the batch gather, forward, loss, backward
        gather
        forward/round          the parameters, rounded for bfloat16 products
        forward/layer0, forward/layer1, ...
        loss
        backward/layer<last>, ..., backward/layer0
        optimizer
      validation               evaluate(), also after the training: gather, forward/..., loss
"""

import functools
import threading
from contextlib import ExitStack, closing

from . import InputError

DOMAIN = "mlp"
# 0xAARRGGBB by the part of the name before the slash. Forward passes are blue, backward passes red.
COLOURS = {
    "epoch": 0xFF7F7F7F,
    "step": 0xFFC7C7C7,
    "gather": 0xFF2CA02C,
    "forward": 0xFF1F77B4,
    "loss": 0xFF9467BD,
    "backward": 0xFFD62728,
    "optimizer": 0xFFFF7F0E,
    "validation": 0xFF17BECF,
}


def nvtx_annotate():
    """The `annotate` of attach() and loop.fit that pushes and pops NVTX ranges of the domain "mlp".

    InputError where the package nvtx is missing. Without a tool that listens the ranges do nothing.
    """
    try:
        import nvtx
    except ImportError as error:
        raise InputError(f"--nvtx is not possible without the package nvtx ({error}); run `pip install nvtx`") from None

    @functools.cache  # the message is registered and its attributes are made once per name
    def annotate(name):
        return nvtx.annotate(name, color=COLOURS[name.partition("/")[0]], domain=DOMAIN)

    return annotate


def attach(learner, annotate) -> None:
    """Run every phase of `learner`, from now on, inside `with annotate(name):`. To be called once.

    learner   a ScratchLearner, which then launches its steps op by op, for a graph's launch has no phases; or a
              TorchLearner, whose methods are replaced by attributes of the instance.
    annotate  name -> context manager, called at every entry: nvtx_annotate(), or one that measures.

    The backward pass of torch is the business of autograd, which runs it on the caller's thread on a CPU and on a
    thread of its own on a GPU. "loss" comes a second time there, with the gradient of the loss, and the ranges
    "backward/..." follow. NVTX's ranges nest thread by thread, so on a GPU these are not inside "step" but beside it,
    on autograd's thread, at the same time; and one that an error has left open there ends when the next is opened. A
    compiled model is one graph, in which there are no layers: its forward pass is in "loss", and its backward pass in
    no range but "step".
    """
    if hasattr(learner, "replay"):
        learner.annotate = learner.replay.annotate = annotate
        learner.steps_per_launch = 1
        return
    if learner.compiled:
        _wrap(learner, "forward_loss", annotate, "loss")
    else:
        _attach_to_autograd(learner, annotate)
    _wrap(learner, "train_step", annotate, "step")
    _wrap(learner, "gather", annotate, "gather")
    _wrap(learner, "evaluate", annotate, "validation")
    _wrap(learner.optimizer, "step", annotate, "optimizer")


def _wrap(owner, method, annotate, name, after=lambda result: None) -> None:
    """Let owner.method run inside annotate(name); {} in `name` stands for the method's first argument."""
    inner = getattr(owner, method)

    @functools.wraps(inner)
    def ranged(*args, **kwargs):
        with annotate(name.format(*args)):
            result = inner(*args, **kwargs)
        after(result)
        return result

    setattr(owner, method, ranged)


class _Backward(threading.local):
    """The range of the backward pass that is open on this thread: one at most.

    A hook on a tensor is called when the tensor's gradient is complete, just before autograd differentiates the
    function that made the tensor. So the hook of a layer's output ends the range before it and opens the layer's, and
    the pass ends when the first layer's weight has its gradient. Module.register_full_backward_hook would not do: where
    the input needs no gradient, as that of the first layer, it is called before the layer is differentiated.
    """

    def __init__(self, annotate):
        self.annotate, self.stack = annotate, ExitStack()

    def open_before(self, name, tensor) -> None:
        """Open the range `name` when the gradient of `tensor` is complete."""
        if tensor.requires_grad:  # not in an evaluation
            tensor.register_hook(lambda gradient: self.open(name))

    def open(self, name) -> None:
        self.close()
        self.stack.enter_context(self.annotate(name))

    def close(self, *_) -> None:
        self.stack.close()


def _attach_to_autograd(learner, annotate) -> None:
    backward = _Backward(annotate)
    for number, layer in enumerate(learner.model):
        after = functools.partial(backward.open_before, f"backward/layer{number}")
        _wrap(layer, "forward", annotate, f"forward/layer{number}", after)
    _wrap(learner, "loss", annotate, "loss", functools.partial(backward.open_before, "loss"))
    next(learner.model.parameters()).register_post_accumulate_grad_hook(backward.close)
    _wrap(learner, "train_step", lambda name: closing(backward), "")  # an exception may leave a range open
