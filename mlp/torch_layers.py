"""The modules of the models in PyTorch, and their optimizers."""

from contextlib import contextmanager

import torch
from torch import nn

from kernels import plain, torch_ops

from .configs import Config
from .model import initial_weights

ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(plain.LEAKY_SLOPE),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}


class FusedLinear(nn.Linear):
    """A linear layer and the activation after it, by our kernel after torch's product."""

    def __init__(self, n_in, n_out, activation, device=None):
        super().__init__(n_in, n_out, device=device)
        self.activation = activation

    def forward(self, x):
        return torch_ops.bias_act(x @ self.weight.T, self.bias, self.activation)


class _Normalised(torch.autograd.Function):
    """Batch normalisation on a CPU by one thread. torch's takes the sums over the rows apart by threads, so that their
    number would decide the last bits of a run. Two threads would save 0.1 of 0.5 ms for 512 rows of 400, forward and
    backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, momentum, eps):
        with _one_thread():
            y, *saved = torch.native_batch_norm(x, weight, bias, mean, var, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, var, *saved)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx, dy):
        with _one_thread():
            gradients = torch.ops.aten.native_batch_norm_backward(
                dy, *ctx.saved_tensors, train=True, eps=ctx.eps, output_mask=[True] * 3
            )
        return *gradients, None, None, None, None


@contextmanager
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class BatchNorm(nn.BatchNorm1d):
    """nn.BatchNorm1d, the same bits whatever the number of threads, unless it is compiled."""

    def forward(self, x):
        if not self.training or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        self.num_batches_tracked += 1
        return _Normalised.apply(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps
        )


class _Total(torch.autograd.Function):
    """The sum over the processes of a job, forward and backward."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    backward = forward


class SharedBatchNorm(nn.BatchNorm1d):
    """Batch normalisation over a batch of which each process of a job has a part, as nn.SyncBatchNorm, which needs
    GPUs: the sums over all rows go through autograd."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        total = _Total.apply
        rows = total(x.new_tensor([float(len(x))]))
        mean = total(x.sum(dim=0)) / rows
        var = total((x - mean).square().sum(dim=0)) / rows
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (rows / (rows - 1.0).clamp(min=1.0)), self.momentum)
            self.num_batches_tracked += 1
        return (x - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias


def _layer(weight, config: Config, last: bool, norm_of=BatchNorm) -> nn.Sequential:
    """Of a weight (in, out): a linear module first, and what follows it."""
    n_in, n_out = weight.shape
    norm = config.batch_norm and not last
    if config.fused and not norm:
        linear = nn.utils.skip_init(FusedLinear, n_in, n_out, "identity" if last else config.activation)
        follow = []
    else:  # skip_init leaves torch's generator alone
        linear = nn.utils.skip_init(nn.Linear, n_in, n_out, bias=not norm)
        follow = [norm_of(n_out)] * norm + ([] if last else [ACTIVATIONS[config.activation]()])
    if config.dropout and not last:
        follow.append(nn.Dropout(config.dropout))
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(weight.T))  # torch's are (out, in)
        if linear.bias is not None:
            linear.bias.zero_()
    return nn.Sequential(linear, *follow)


def sequential(sizes, config: Config, processes: int = 1) -> nn.Sequential:
    """A module per layer, with the initial weights of model.MLP."""
    weights, norm_of = list(initial_weights(sizes, config.seed)), SharedBatchNorm if processes > 1 else BatchNorm
    layers = (_layer(w, config, number == len(weights), norm_of) for number, w in enumerate(weights, 1))
    return nn.Sequential(*layers)


def optimizer(config: Config, parameters) -> torch.optim.Optimizer:
    """The optimizer of `config`: torch's in its fused form, one pass for all parameters on a GPU, or our Adam."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.l2, fused=True)
    options = dict(lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=config.l2)
    if config.fused:
        return torch_ops.FusedAdam(parameters, **options, decoupled_weight_decay=config.decoupled)
    return (torch.optim.AdamW if config.decoupled else torch.optim.Adam)(parameters, **options, fused=True)
