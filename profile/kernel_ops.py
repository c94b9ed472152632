"""Every op as each contender would compute it, on the same arrays, and the float64 result that all must give.

An op makes sets of arrays; a contender is a method that takes one set and returns what it computed. Torch's methods
take the same memory as tensors. They call what torch itself calls in training: autograd's own backward kernels, and
torch.optim's optimizers on moments that are views of ours.
"""

import functools

import numpy as np
from op_base import Math, Op
from optimizer_ops import AdamStep, SgdStep

import kernels
from kernels import elementwise, plain
from mlp.data import BYMERGE_CLASSES, PIXELS

COLUMNS, CLASSES = 400, len(BYMERGE_CLASSES)  # the widest hidden layer of m1, and its logits
IMAGES = 131_072  # 103 MB of uint8: a batch's rows come from memory, not from a cache
# Name in the results: the method that computes it.
METHODS = {
    "plain": "plain",
    "fused": "fused",
    "cupy.fuse": "cupy_fuse",
    "ElementwiseKernel": "elementwise",
    "torch eager": "torch_eager",
    "torch fused optimizer": "torch_optimizer",
    "torch.compile": "torch_compile",
}
GPU_ONLY = ("cupy.fuse", "ElementwiseKernel", "torch.compile")


class BiasAct(Op):
    bytes_per_row, columns, outputs = 8 * COLUMNS, COLUMNS, ("y",)

    def __init__(self, activation, *args):
        super().__init__(*args)
        self.activation, self.name = activation, f"bias_act {activation}"

    def arrays(self, rows):
        return {"z": self.normal(rows, COLUMNS), "bias": self.normal(COLUMNS), "y": self.normal(rows, COLUMNS)}

    def reference(self, a):
        return [plain.bias_act(a["z"].astype(np.float64), a["bias"].astype(np.float64), self.activation)]

    def plain(self, a):
        return [plain.bias_act(a["z"], a["bias"], self.activation, out=a["y"])]

    def fused(self, a):
        return [kernels.bias_act(a["z"], a["bias"], self.activation, out=a["y"])]

    def elementwise(self, a):
        return [elementwise.bias_act(a["z"], a["bias"], self.activation, out=a["y"])]

    def cupy_formula(self, z, bias):
        return Math.cupy(self.xp).activate(self.activation, z + bias)

    def cupy_fuse(self, a):
        return [self.fused_by_cupy(a["z"], a["bias"])]

    def torch_eager(self, t):
        u, f = self.torch.add(t["z"], t["bias"], out=t["y"]), self.torch.nn.functional
        if self.activation == "gelu":
            return [f.gelu(u)]  # cannot be done in place
        return [(f.relu if self.activation == "relu" else f.silu)(u, inplace=True)]

    def torch_formula(self, z, bias):
        return Math.torch(self.torch).activate(self.activation, z + bias)

    def torch_compile(self, t):
        return [self.compiled(t["z"], t["bias"])]


class BiasActBackward(Op):
    bytes_per_row, columns, outputs, tolerance = 12 * COLUMNS, COLUMNS, ("dz", "dbias"), 1e-4

    def __init__(self, activation, *args):
        super().__init__(*args)
        self.activation, self.name = activation, f"bias_act_backward {activation}"

    def arrays(self, rows):
        dy, saved, dz = (self.normal(rows, COLUMNS) for _ in range(3))
        return {"dy": dy, "saved": saved, "dz": dz, "dbias": self.normal(COLUMNS)}

    def reference(self, a):
        return plain.bias_act_backward(a["dy"].astype(np.float64), a["saved"].astype(np.float64), self.activation)

    def plain(self, a):
        return plain.bias_act_backward(a["dy"], a["saved"], self.activation, out=a["dz"], bias_grad=a["dbias"])

    def fused(self, a):
        return kernels.bias_act_backward(a["dy"], a["saved"], self.activation, out=a["dz"], bias_grad=a["dbias"])

    def elementwise(self, a):
        dz = elementwise.bias_act_backward(a["dy"], a["saved"], self.activation, out=a["dz"])
        return dz, dz.sum(axis=0, out=a["dbias"])

    def cupy_formula(self, dy, saved):
        return dy * Math.cupy(self.xp).slope(self.activation, saved)

    def cupy_fuse(self, a):
        dz = self.fused_by_cupy(a["dy"], a["saved"])
        return dz, dz.sum(axis=0, out=a["dbias"])

    def torch_eager(self, t):
        aten = self.torch.ops.aten
        if self.activation == "relu":
            dz = aten.threshold_backward(t["dy"], t["saved"], 0)
        else:
            dz = (aten.silu_backward if self.activation == "silu" else aten.gelu_backward)(t["dy"], t["saved"])
        return dz, dz.sum(0)

    def torch_formula(self, dy, u):
        dz = dy * Math.torch(self.torch).slope(self.activation, u)
        return dz, dz.sum(0)

    def torch_compile(self, t):
        return self.compiled(t["dy"], t["saved"])


class SoftmaxCrossEntropy(Op):
    name, bytes_per_row, columns, outputs = "softmax_cross_entropy", 8 * CLASSES + 4, CLASSES, ("dlogits",)
    integers = ("labels",)

    def arrays(self, rows):
        logits, dlogits = self.normal(rows, CLASSES), self.normal(rows, CLASSES)
        return {"logits": logits, "labels": self.below(CLASSES, np.int32, rows), "dlogits": dlogits}

    def reference(self, a):
        return plain.softmax_cross_entropy(a["logits"].astype(np.float64), a["labels"])

    def plain(self, a):
        return plain.softmax_cross_entropy(a["logits"], a["labels"], out=a["dlogits"])

    def fused(self, a):
        return kernels.softmax_cross_entropy(a["logits"], a["labels"], out=a["dlogits"])

    def torch_eager(self, t):
        logits = t["logits"].detach().requires_grad_()
        loss = self.torch.nn.functional.cross_entropy(logits, t["labels"])
        return loss.detach(), *self.torch.autograd.grad(loss, logits)

    def torch_formula(self, logits, labels):
        log_softmax = self.torch.log_softmax(logits, 1)
        loss = self.torch.nn.functional.nll_loss(log_softmax, labels)
        one_hot = (labels[:, None] == self.torch.arange(logits.shape[1], device=logits.device)).float()
        return loss, (log_softmax.exp() - one_hot) / logits.shape[0]

    def torch_compile(self, t):
        return self.compiled(t["logits"], t["labels"])


class GatherBatch(Op):
    name, bytes_per_row, columns, outputs = "gather_batch", 5 * PIXELS + 12, PIXELS, ("x",)
    dtype, integers = "uint8 to float32", ("index",)

    @functools.cached_property
    def images(self):
        return self.below(256, np.uint8, IMAGES, PIXELS)

    @functools.cached_property
    def labels(self):
        return self.below(CLASSES, np.int32, IMAGES)

    def arrays(self, rows):
        index = self.below(IMAGES, np.int32, rows)
        x, y = self.normal(rows, PIXELS), self.xp.zeros(rows, np.int32)
        return {"images": self.images, "labels": self.labels, "index": index, "x": x, "y": y}

    def reference(self, a):
        return a["images"][a["index"]].astype(np.float64) / 255.0, a["labels"][a["index"]]

    def plain(self, a):
        return plain.gather_batch(a["images"], a["labels"], a["index"], out_x=a["x"], out_y=a["y"])

    def fused(self, a):
        return kernels.gather_batch(a["images"], a["labels"], a["index"], out_x=a["x"], out_y=a["y"])

    def torch_eager(self, t):
        x = t["images"].index_select(0, t["index"]).to(self.torch.float32).mul_(1.0 / 255.0)
        return x, t["labels"][t["index"]]

    def torch_formula(self, images, labels, index):
        return images.index_select(0, index).to(self.torch.float32) * (1.0 / 255.0), labels[index]

    def torch_compile(self, t):
        return self.compiled(t["images"], t["labels"], t["index"])


OPS = {
    "bias_act": lambda *args: [BiasAct(name, *args) for name in ("relu", "silu", "gelu")],
    "bias_act_backward": lambda *args: [BiasActBackward(name, *args) for name in ("relu", "silu", "gelu")],
    "softmax_cross_entropy": lambda *args: [SoftmaxCrossEntropy(*args)],
    "adam_step": lambda *args: [AdamStep(*args)],
    "sgd_step": lambda *args: [SgdStep(*args)],
    "gather_batch": lambda *args: [GatherBatch(*args)],
}
