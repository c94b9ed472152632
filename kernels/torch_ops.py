"""The ops as torch custom ops, with autograd and torch.compile, and Adam as a torch.optim.Optimizer.

    from kernels.torch_ops import FusedAdam, bias_act, softmax_cross_entropy

CPU tensors run the host kernels and CUDA tensors the GPU's, on torch's current stream, with torch's memory. The
ops are those of ops.py, which makes the checks: float32, contiguous, or a TypeError or ValueError that names the
argument. The gradients have no derivative of their own: differentiating them raises RuntimeError.

The ops are in torch.ops.fused_mlp. They are registered with `define` and `impl`, because the Python that
`torch.library.custom_op` puts around a function takes 45 us per call, and these 5 (2-core AMD EPYC, torch 2.13).
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import define, impl, register_autograd, register_fake

from . import ops


def _op(name, schema, fake):
    """Register the function below as the op fused_mlp::name on all devices, and return that op."""

    def register(function):
        qualified = f"fused_mlp::{name}"
        define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
        impl(qualified, "default", function)
        register_fake(qualified, fake)
        return getattr(torch.ops.fused_mlp, name).default

    return register


_like = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
_OUTPUT_TELLS_SLOPE = ("relu", "leaky_relu")  # y, which the next layer keeps anyway, has the sign of z + bias


def bias_act(z, bias, activation="relu"):
    """act(z + bias): z (B, N), bias (N,) -> (B, N), differentiable in z and bias.

    activation: one of kernels.ACTIVATIONS (see kernels.bias_act). The backward pass is one kernel. It keeps
    nothing for identity, the result for relu and leaky_relu, and z for silu, gelu and gelu_tanh.
    """
    return _bias_act(z, bias, activation)


@_op("bias_act", "(Tensor z, Tensor bias, str activation) -> Tensor", lambda z, bias, activation: _like(z))
def _bias_act(z, bias, activation):
    z = z.detach()
    return ops.bias_act(z, bias.detach(), activation, out=torch.empty_like(z))


@_op(
    "bias_act_backward",
    "(Tensor dy, Tensor saved, str activation, Tensor? bias) -> (Tensor, Tensor)",
    lambda dy, saved, activation, bias: (_like(dy), dy.new_empty(dy.shape[1])),
)
def _bias_act_backward(dy, saved, activation, bias):
    dy, bias = dy.detach(), None if bias is None else bias.detach()
    dz, dbias = torch.empty_like(dy), dy.new_empty(dy.shape[-1:])
    return ops.bias_act_backward(dy, saved.detach(), activation, bias, out=dz, bias_grad=dbias)


def _keep_for_bias_act(ctx, inputs, output):
    z, bias, ctx.activation = inputs
    if ctx.activation in _OUTPUT_TELLS_SLOPE:
        ctx.save_for_backward(output)
    elif ctx.activation != "identity":
        ctx.save_for_backward(z, bias)


def _bias_act_gradients(ctx, dy):
    dy = dy.contiguous()  # a sum's gradient, say, is one number with strides 0
    saved, bias = (*ctx.saved_tensors, None, None)[:2]
    dz, dbias = _bias_act_backward(dy, dy if saved is None else saved, ctx.activation, bias)
    return dz, dbias, None


def softmax_cross_entropy(logits, labels, label_smoothing=0.0, class_weights=None):
    """The mean over the rows of -log softmax(logits)[label]: logits (B, C), labels int32 or int64 (B,) -> 0-d.

    One pass over the logits gives the loss and its gradient, which is kept for the backward pass. As
    torch.nn.functional.cross_entropy, label_smoothing included, but a label outside [0, C) makes the loss NaN; there
    is no ignore_index. class_weights (C,): each row's loss is multiplied by the weight of its label, and the mean is
    still that over the rows, while torch divides by the sum of the weights. It must not require grad.
    """
    return _softmax_cross_entropy(logits, labels, label_smoothing, class_weights)[0]


@_op(
    "softmax_cross_entropy",
    "(Tensor logits, Tensor labels, float label_smoothing=0., Tensor? class_weights=None) -> (Tensor, Tensor)",
    lambda logits, labels, label_smoothing=0.0, class_weights=None: (logits.new_empty(()), _like(logits)),
)
def _softmax_cross_entropy(logits, labels, label_smoothing=0.0, class_weights=None):
    logits = logits.detach()
    if labels.dtype == torch.int64:
        labels = labels.clamp(-1, 2**31 - 1).to(torch.int32)  # clamped: 2**32 must not become 0, a valid label
    return ops.softmax_cross_entropy(
        logits, labels, out=torch.empty_like(logits), label_smoothing=label_smoothing, class_weights=class_weights
    )


@_op(
    "softmax_cross_entropy_backward",
    "(Tensor dlogits, Tensor dloss, Tensor loss) -> Tensor",
    lambda dlogits, dloss, loss: _like(dlogits),
)
def _softmax_cross_entropy_backward(dlogits, dloss, loss):
    return dlogits * dloss  # loss is there for autograd: dlogits is a function of what the loss is a function of


def _keep_for_softmax_cross_entropy(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else the backward pass makes zeros for the gradient of dlogits
    ctx.save_for_backward(*output)


def _softmax_cross_entropy_gradients(ctx, dloss, _):
    if dloss is None:
        return None, None, None, None
    loss, dlogits = ctx.saved_tensors
    return _softmax_cross_entropy_backward(dlogits, dloss, loss), None, None, None


def _no_second_derivative(ctx, *_):
    raise RuntimeError("the gradients of bias_act and softmax_cross_entropy cannot be differentiated again")


register_autograd("fused_mlp::bias_act", _bias_act_gradients, setup_context=_keep_for_bias_act)
register_autograd("fused_mlp::bias_act_backward", _no_second_derivative)
register_autograd(
    "fused_mlp::softmax_cross_entropy", _softmax_cross_entropy_gradients, setup_context=_keep_for_softmax_cross_entropy
)
register_autograd("fused_mlp::softmax_cross_entropy_backward", _no_second_derivative)


def adam_step(p, g, m, v, *, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled=False):
    """kernels.adam_step as a custom op, for compiled functions: flat (P,) tensors, in place on p, m and v.

    step (from 1) and lr: numbers, or float32 tensors of one element on the device of p. A compiled function
    is compiled anew for a number that changes, not for a tensor. The tensors must not require grad.
    """
    step, step_tensor = (1, step) if isinstance(step, Tensor) else (step, None)
    lr, lr_tensor = (0.0, lr) if isinstance(lr, Tensor) else (lr, None)
    _adam_step(p, g, m, v, step_tensor, lr_tensor, step, lr, beta1, beta2, eps, weight_decay, decoupled)


@_op(
    "adam_step",
    "(Tensor(a!) p, Tensor g, Tensor(b!) m, Tensor(c!) v, Tensor? step_tensor, Tensor? lr_tensor, int step, float lr, "
    "float beta1, float beta2, float eps, float weight_decay, bool decoupled) -> ()",
    lambda *_: None,
)
def _adam_step(p, g, m, v, step_tensor, lr_tensor, step, lr, beta1, beta2, eps, weight_decay, decoupled):
    ops.adam_step(
        p, g, m, v, step=step if step_tensor is None else step_tensor, lr=lr if lr_tensor is None else lr_tensor,
        beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, decoupled=decoupled,
    )  # fmt: skip
    torch.autograd.graph.increment_version((p, m, v))  # autograd sees that saved tensors have changed


_ALIGNMENT = 32  # elements: a parameter starts at a cache line of the GPU


class _Slot(NamedTuple):
    """A parameter's place in its group's arena."""

    parameter: Tensor
    address: int
    start: int
    stop: int
    gradient: Tensor
    state: dict  # the optimizer's for this parameter
    moments: list


class _Arena:
    """A group's parameters, gradients and moments as four flat tensors; p.data and the state are views of them."""

    @torch.no_grad()
    def __init__(self, params, state):
        for p in params:
            if p.dtype != torch.float32:
                raise TypeError(f"params must have dtype float32, got {p.dtype} with shape {tuple(p.shape)}")
            if p.device != params[0].device:
                raise ValueError(f"params of a group must be on one device, got {params[0].device} and {p.device}")
        sizes = [-(-p.numel() // _ALIGNMENT) * _ALIGNMENT for p in params]
        device = params[0].device if params else None
        self.flat = [torch.zeros(sum(sizes), dtype=torch.float32, device=device) for _ in range(4)]
        self.slots, stop = [], 0
        for p, size in zip(params, sizes):
            start, stop = stop, stop + size
            strides = torch.empty_like(p, device="meta").stride()  # channels_last, say, is kept
            data, gradient, *moments = (flat.as_strided(p.shape, strides, start) for flat in self.flat)
            old = state.get(p, {})
            for view, value in zip((data, *moments), (p, old.get("exp_avg"), old.get("exp_avg_sq"))):
                if value is not None:
                    view.copy_(value)
            p.data = data
            state[p] = {"step": int(old.get("step", 0)), "exp_avg": moments[0], "exp_avg_sq": moments[1]}
            self.slots.append(_Slot(p, p.data_ptr(), start, stop, gradient, state[p], moments))

    def holds(self, params, state):
        """Whether these parameters and their state are still the views that were made here."""
        return len(params) == len(self.slots) and all(
            p is slot.parameter
            and p.data_ptr() == slot.address
            and state.get(p) is slot.state
            and slot.state["exp_avg"] is slot.moments[0]
            and slot.state["exp_avg_sq"] is slot.moments[1]
            for p, slot in zip(params, self.slots)
        )

    @torch._disable_dynamo
    def step(self, group):
        """Adam on every parameter that has a gradient; neighbours with the same number of steps share a launch."""
        stepped = [(slot, grad) for slot in self.slots if (grad := slot.parameter.grad) is not None]
        foreign = [(slot.gradient, grad) for slot, grad in stepped if grad is not slot.gradient]
        if foreign:
            with torch.no_grad():
                torch._foreach_copy_(*map(list, zip(*foreign)))
        runs = []
        for slot, _ in stepped:
            if runs and runs[-1][1:] == [slot.start, slot.state["step"]]:
                runs[-1][1] = slot.stop
            else:
                runs.append([slot.start, slot.stop, slot.state["step"]])
        for start, stop, steps in runs:
            self.launch(start, stop, steps + 1, group)
        for slot, _ in stepped:
            slot.state["step"] += 1
        torch.autograd.graph.increment_version([slot.parameter for slot, _ in stepped])

    def launch(self, start, stop, step, group):
        """adam_step on a part of the arena."""
        flat = self.flat if stop - start == len(self.flat[0]) else [x[start:stop] for x in self.flat]
        if flat[0].is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("FusedAdam.step cannot be captured in a CUDA graph, which would repeat its step number")
        lr, (beta1, beta2) = group["lr"], group["betas"]
        if isinstance(lr, Tensor) and not lr.is_cuda:
            lr = lr.item()
        adam_step(
            *flat, step=step, lr=lr, beta1=beta1, beta2=beta2, eps=group["eps"],
            weight_decay=group["weight_decay"], decoupled=group["decoupled_weight_decay"],
        )  # fmt: skip


class FusedAdam(torch.optim.Optimizer):
    """torch.optim.Adam, or with decoupled_weight_decay=True torch.optim.AdamW, in one launch per group.

    params: float32 parameters, or groups of them. The parameters of a group must be on one device, and no two
    parameters may share memory. lr: a number, or a tensor of one element; one on CUDA is read by the kernel.
    There is no amsgrad and no maximize. Wrong numbers raise as in kernels.adam_step.

    The parameters, gradients and moments of a group lie in four flat tensors. `p.data` becomes a view, so a view
    of p that was taken before keeps the old memory. What replaces p.data or the state later (module.to(),
    an entry of `state`) is copied into new flat tensors by the next step. state_dict() is that of torch.optim.Adam,
    and either can load the other's.

    As in torch, a parameter without gradient is skipped; the stretches between such parameters then take a launch
    each. zero_grad() sets the gradients to None, and one multi-tensor copy per step brings in the new ones.
    zero_grad(set_to_none=False) zeroes them by one fill, and autograd adds to the flat tensor: no copy and no
    second set of gradients in memory, but an addition per parameter.
    """

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, decoupled_weight_decay=False
    ):
        self._arenas = None
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults | dict(decoupled_weight_decay=decoupled_weight_decay))
        self._gather()  # only now: arenas move parameters, and all must be there to see who shares memory

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        if self._arenas is not None:
            self._arena(len(self.param_groups) - 1)

    def __setstate__(self, state):  # load_state_dict, deepcopy and pickle come here
        super().__setstate__(state)
        self._gather()

    def _gather(self):
        self._arenas = {}
        for index in range(len(self.param_groups)):
            self._arena(index)

    @torch._disable_dynamo  # not torch.compiler.disable, which takes a second when this module is imported
    def _arena(self, index):
        """The group's arena, made anew if anything of the group is not in it."""
        group, arena = self.param_groups[index], self._arenas.get(index)
        if arena is None or not arena.holds(group["params"], self.state):
            addresses = [a for each in self.param_groups for p in each["params"] if (a := p.data_ptr())]
            if len(set(addresses)) < len(addresses):
                raise ValueError("params must not share memory, got two that do")
            if group.get("amsgrad") or group.get("maximize"):  # from another optimizer's state
                raise ValueError("amsgrad and maximize must be False: FusedAdam has neither; use torch.optim.Adam")
            group.setdefault("decoupled_weight_decay", self.defaults["decoupled_weight_decay"])  # before torch 2.7
            arena = self._arenas[index] = _Arena(group["params"], self.state)
            arena.launch(0, 0, 1, group)  # on nothing: wrong numbers are refused before the first step
        return arena

    def zero_grad(self, set_to_none=True):
        if set_to_none:
            return super().zero_grad()
        for index in range(len(self.param_groups)):
            arena = self._arena(index)
            arena.flat[1].zero_()
            for slot in arena.slots:
                if slot.parameter.grad is not None:
                    slot.parameter.grad = slot.gradient

    def step(self, closure=None):
        """One step. closure: computes loss and gradients anew and returns the loss, which step then returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            self._arena(index).step(group)
        return loss

    def state_dict(self):
        result = super().state_dict()
        states = result["state"].items()  # a tensor for each step: torch.optim.Adam counts them up in place
        result["state"] = {key: {**values, "step": torch.tensor(float(values["step"]))} for key, values in states}
        return result
