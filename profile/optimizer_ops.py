"""Adam and SGD as each contender would compute them; see kernel_ops.py."""

import math

import numpy as np
from op_base import Op

import kernels
from kernels import elementwise, plain


class Optimizer(Op):
    """Adam and SGD in place on flat arrays; step 10, so that no moment is a special case."""

    columns, lr, step = 1, 1e-3, 10

    def shape(self, rows):
        return str(rows)

    def arrays(self, rows):
        p, g, m, v = (self.normal(rows) for _ in range(4))
        return {"p": p, "g": g, "m": m, "v": abs(v)}

    def operands(self, a):
        """p, g and the moments, which is how every form of the op takes them."""
        return [a[name] for name in ("p", "g", *self.mutable[1:])]

    def changed(self, a):
        return [a[name] for name in self.mutable]

    def reference(self, a):
        p, g, *moments = (array.astype(np.float64) for array in self.operands(a))
        self.update(plain, p, g, *moments)
        return p, *moments

    def plain(self, a):
        self.update(plain, *self.operands(a))
        return self.changed(a)

    def fused(self, a):
        self.update(kernels, *self.operands(a))
        return self.changed(a)

    def elementwise(self, a):
        self.update(elementwise, *self.operands(a))
        return self.changed(a)

    def cupy_fuse(self, a):
        self.fused_by_cupy(*self.operands(a))
        return self.changed(a)

    def _torch_step(self, t, key, **options):
        if key not in t:
            parameter = self.torch.nn.Parameter(t["p"])
            parameter.grad = t["g"]
            t[key] = self.new_torch_optimizer(parameter, **options)
            t[key].state[parameter] = self.torch_state(t)
        t[key].step()
        return self.changed(t)

    def torch_eager(self, t):
        return self._torch_step(t, "eager optimizer")

    def torch_optimizer(self, t):
        return self._torch_step(t, "fused optimizer", fused=True)

    def torch_compile(self, t):
        self.compiled(*self.operands(t))
        return self.changed(t)


class AdamStep(Optimizer):
    name, bytes_per_row, mutable = "adam_step", 28, ("p", "m", "v")

    def new_torch_optimizer(self, parameter, **options):
        return self.torch.optim.Adam([parameter], lr=self.lr, capturable=parameter.is_cuda, **options)

    def torch_state(self, t):
        """What torch.optim keeps for a parameter, on our arrays."""
        before = self.torch.tensor(self.step - 1.0, device=t["p"].device)
        return {"step": before, "exp_avg": t["m"], "exp_avg_sq": t["v"]}

    def update(self, ops, p, g, m, v):
        ops.adam_step(p, g, m, v, step=self.step, lr=self.lr)

    def cupy_formula(self, p, g, m, v):
        m += 0.1 * (g - m)
        v += 0.001 * (g * g - v)
        p -= self.lr / (1 - 0.9**self.step) * m / (self.xp.sqrt(v) / math.sqrt(1 - 0.999**self.step) + 1e-8)

    def torch_formula(self, p, g, m, v):
        m.lerp_(g, 0.1)
        v.mul_(0.999).addcmul_(g, g, value=0.001)
        denominator = (v.sqrt() / math.sqrt(1 - 0.999**self.step)).add_(1e-8)
        p.addcdiv_(m, denominator, value=-self.lr / (1 - 0.9**self.step))


class SgdStep(Optimizer):
    name, bytes_per_row, mutable = "sgd_step", 20, ("p", "m")  # m: the velocity

    def new_torch_optimizer(self, parameter, **options):
        return self.torch.optim.SGD([parameter], lr=self.lr, momentum=0.9, **options)

    def torch_state(self, t):
        return {"momentum_buffer": t["m"]}

    def update(self, ops, p, g, velocity):
        ops.sgd_step(p, g, velocity, lr=self.lr, momentum=0.9, weight_decay=0.0)

    def cupy_formula(self, p, g, m):
        m *= 0.9
        m += g
        p -= self.lr * m

    def torch_formula(self, p, g, m):
        m.mul_(0.9).add_(g)
        p.add_(m, alpha=-self.lr)
