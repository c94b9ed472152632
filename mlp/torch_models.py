"""The models in PyTorch, as the training loop sees them: what ours are compared and timed with, and M2 and M3."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

import kernels
from kernels import plain, torch_ops

from . import InputError, faults
from .configs import Config
from .data import Dataset
from .device import check_kernels, cpu_name
from .distributed import Job, is_job, own_gpu
from .evaluate import Evaluation
from .loss import altered_images, class_weights
from .torch_layers import optimizer, sequential


@dataclass(frozen=True)
class TorchDevice:
    kind: str  # "cpu" or "cuda"
    name: str

    def release_memory(self) -> None:
        """Give back what torch keeps of memory that nobody uses any more."""
        if self.kind == "cuda":
            torch.cuda.empty_cache()


def select(kind: str, fused: bool) -> TorchDevice:
    """torch's device for `--device`: auto is the GPU where torch finds one. InputError where it cannot be had, or with
    `fused` our kernels for it."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("torch finds no GPU; install a torch built for CUDA on a machine with one, or use the CPU")
    kind = "cuda" if kind != "cpu" and torch.cuda.is_available() else "cpu"
    if kind == "cuda" and is_job():
        torch.cuda.set_device(own_gpu(torch.cuda.device_count()))
    if fused:
        check_kernels(kind)
    return TorchDevice(kind, torch.cuda.get_device_name() if kind == "cuda" else cpu_name())


class TorchLearner:
    """A model, its optimizer and its data set in torch on `kind`, "cpu" or "cuda"; see scratch.ScratchLearner.

    With config.fused the activations, the loss, Adam and the gather of batches are our kernels; with config.compile
    torch.compile makes one graph of the forward pass and the loss (and, with it, the backward pass).
    Where it is one process of a job, each computes its part of every batch, and DistributedDataParallel averages the
    gradients. What a step drops follows from the seed, the number of the step and the process.
    Nothing here waits for the GPU but totals() and evaluate(). InputError where there is no GPU for "cuda".
    """

    steps_per_launch = 1
    chunk_rows = 16384  # a larger batch is computed in chunks of so many rows
    notice = ""

    def __init__(self, config: Config, data: Dataset, kind: str, train_rows: int, job: Job | None = None):
        self.config, self.classes, self.compiled = config, len(data.class_names), config.compile
        self.job = job or Job()
        self.device = torch.device(select(kind, config.fused).kind)
        self.batch_size = config.batch_of(train_rows)
        self.job.check_batches(train_rows, self.batch_size)
        if config.batch_norm and 1 in (self.batch_size, train_rows % self.batch_size):
            raise InputError(
                f"--batch-norm has no statistics of a single image, which the last batch of {train_rows:,} would be; "
                "give another --batch-size"
            )
        if config.batch_norm and -(-self.batch_size // self.job.size) > self.chunk_rows:
            raise InputError(f"--batch-norm takes batches of at most {self.chunk_rows:,} images; give a --batch-size")
        self.images = torch.from_numpy(data.images).to(self.device)
        # Our kernels take int32, torch's loss int64.
        self.labels = torch.from_numpy(data.labels).to(self.device, torch.int32 if config.fused else torch.int64)
        sizes = (data.images.shape[1], *config.hidden, self.classes)
        self.model = self.parallel = sequential(sizes, config, self.job.size).to(self.device)
        if self.job.size > 1:
            self.parallel = self._distributed()
        self.optimizer = optimizer(config, self.model.parameters())
        weights = class_weights(data.labels, config, train_rows)
        self.class_weights = None if weights is None else torch.from_numpy(weights).to(self.device)
        # Not dynamic: a last batch of another size gets a graph of its own instead of a slower one for all.
        compile = config.compile
        self.forward_loss = torch.compile(self.eager_forward_loss, dynamic=False) if compile else self.eager_forward_loss
        self.averages = self._copies() if config.ema else None
        self.steps = 0
        self.loss_totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._host = data.images, data.labels
        self._order, self._altered = None, altered_images(config)
        self._draw = torch.zeros(1, dtype=torch.int64, device=self.device)  # the epoch, see ScratchLearner
        if self._altered:
            self._altered["draw"] = self._draw

    def _distributed(self) -> nn.parallel.DistributedDataParallel:
        """The model with gradients that are averaged over the processes of the job.

        After the first backward pass gradients are put together in another order, and so are their sums. One pass is
        made here, so that the first step of a run that is resumed is like all others."""
        with self.job.peers():
            parallel = nn.parallel.DistributedDataParallel(self.model)
            parallel.broadcast_buffers = False  # the running statistics are the same everywhere
            self.model.eval()
            parallel(self.images[:1].to(torch.float32)).sum().backward()
            self.model.train()
        self.model.zero_grad(set_to_none=True)
        return parallel

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def provenance(self) -> dict:
        """What decides the last bits of a run, beside the configuration."""
        return {"threads": torch.get_num_threads()}

    def modules(self) -> list:
        """The libraries whose versions do."""
        return [torch]

    def begin_epoch(self, index: np.ndarray, epoch: int | None = None) -> None:
        """Take the images `index` for the batches to come, in their order or in the random one that the from-scratch
        model takes them in, and forget the last epoch's totals."""
        order = torch.from_numpy(index).to(self.device)
        if epoch is not None:
            order = plain.shuffle(order, seed=self.config.seed, epoch=epoch)
        self._order = order.to(torch.int32)
        self._draw.fill_(epoch or 0)
        self.loss_totals.zero_()

    def train(self, start: int, stop: int, lr: float) -> None:
        """An optimizer step on each batch of the epoch's images [start, stop)."""
        for begin in range(start, stop, self.batch_size):
            self.train_step(begin, min(begin + self.batch_size, stop), lr)

    def train_step(self, start: int, stop: int, lr: float) -> None:
        """One optimizer step on the images order[start:stop]."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.config.dropout:
            torch.manual_seed((self.config.seed * 2**32 + self.steps * self.job.size + self.job.rank) % 2**63)
        first, last = self.job.share(start, stop)
        for begin in range(first, last, self.chunk_rows):
            end = min(begin + self.chunk_rows, last)
            x, labels = self.gather(self._order[begin:end], **self._altered)
            with self.job.peers() if end == last or self.job.size == 1 else self.parallel.no_sync():
                loss = self.forward_loss(x, labels)
                # The chunk's share of the batch's mean; what the processes have is averaged.
                loss.backward(loss.new_full((), len(x) * self.job.size / (stop - start)))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.steps += 1
        if self.averages is not None:
            decay = min(self.config.ema, (1.0 + self.steps) / (10.0 + self.steps))
            torch._foreach_lerp_(list(self.averages.values()), list(self._states().values()), 1.0 - decay)

    def gather(self, index, *, draw=None, **altered):
        """The images and labels at `index` (B,): float32 (B, 784) and integers (B,). draw, altered: see
        kernels.gather_batch."""
        seed = self.config.seed
        if self.config.fused:
            return kernels.gather_batch(self.images, self.labels, index, seed=seed, draw=draw, **altered)
        labels = self.labels.index_select(0, index)
        if not altered:
            # On a CPU images[index] takes 15 times as long as index_select, and uint8 * float 7 times as long as this.
            return self.images.index_select(0, index).to(torch.float32).mul_(1.0 / 255.0), labels
        # As in our own learners, on the CPU.
        draw = None if draw is None else draw.cpu().numpy()
        x, _ = plain.gather_batch(*self._host, index.cpu().numpy(), seed=seed, draw=draw, **altered)
        return torch.from_numpy(x).to(self.device), labels

    def eager_forward_loss(self, x, labels):
        return self.loss(self.parallel(x), labels, self.loss_totals, self.config.label_smoothing, self.class_weights)

    def loss(self, logits, labels, totals, smoothing=0.0, weights=None):
        """The mean loss; the sum of the losses and the number of hits are added to `totals`."""
        if self.config.fused:
            loss = torch_ops.softmax_cross_entropy(logits, labels, label_smoothing=smoothing, class_weights=weights)
        else:
            rows = nn.functional.cross_entropy(
                logits, labels, label_smoothing=smoothing, reduction="mean" if weights is None else "none"
            )
            loss = rows if weights is None else (rows * weights[labels]).mean()
        totals[0] += loss.detach() * len(labels)
        totals[1] += (logits.argmax(dim=1) == labels).sum()
        return loss

    def synchronize(self) -> None:
        """Wait until all that was asked for is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def totals(self) -> tuple[float, int]:
        """Sum of the row losses and number of correct rows since begin_epoch(). Waits for the GPU."""
        loss, correct = self.job.total(self.loss_totals.cpu().numpy())
        return float(loss), int(correct)

    @torch.no_grad()
    def evaluate(self, index: np.ndarray, noise_sigma: float = 0.0) -> Evaluation:
        """Loss and confusion matrix on the images `index`, with Gaussian noise added to the [0, 1] pixels."""
        count, (begin, end) = len(index), self.job.share(0, len(index))
        index = torch.from_numpy(index[begin:end]).to(self.device, torch.int32)
        totals = torch.zeros_like(self.loss_totals)
        confusion = torch.zeros(self.classes**2, dtype=torch.int64, device=self.device)
        kept = None if self.averages is None else self._copies()
        self._take(self.averages)
        self.model.eval()
        for part in index.split(self.chunk_rows) if len(index) else ():
            x, labels = self.gather(part, **({"noise_sigma": noise_sigma} if noise_sigma else {}))
            logits = self.model(x)
            confusion += torch.bincount(labels * self.classes + logits.argmax(dim=1), minlength=self.classes**2)
            self.loss(logits, labels, totals)
        self._take(kept)
        self.model.train()
        matrix = self.job.total(confusion.cpu().numpy()).reshape(self.classes, self.classes)
        return Evaluation(float(self.job.total(totals.cpu().numpy())[0]) / count, matrix)

    def _states(self) -> dict[str, torch.Tensor]:
        """The tensors that make the model what it is: parameters and running statistics."""
        return {name: x.detach() for name, x in self.model.state_dict().items() if x.is_floating_point()}

    def _copies(self) -> dict[str, torch.Tensor]:
        return {name: x.clone() for name, x in self._states().items()}

    @torch.no_grad()
    def _take(self, values) -> None:
        if values is not None:
            torch._foreach_copy_(list(self._states().values()), list(values.values()))

    def snapshot(self) -> dict[str, torch.Tensor]:
        """A copy of what is judged, on the device: the parameters and running statistics, or their averages."""
        return self._copies() if self.averages is None else _clones(self.averages)

    def restore(self, snapshot) -> None:
        """Take back what snapshot() gave."""
        self._take(snapshot)
        if self.averages is not None:
            self.averages = _clones(snapshot)

    def _moments(self) -> dict[str, torch.Tensor]:
        """The tensors of the optimizer, by the number of the parameter and torch's name."""
        state = self.optimizer.state_dict()["state"]
        return {f"optimizer/{number}/{name}": x for number, of in state.items() for name, x in of.items()
                if x is not None}  # fmt: skip

    def state(self) -> dict[str, torch.Tensor]:
        """A copy, on the device, of all that a step leaves for the next, and of the epoch's totals by process."""
        averages = {f"average/{name}": x for name, x in (self.averages or {}).items()}
        model = {f"model/{name}": x for name, x in self._states().items()}
        totals = self.job.gather(self.loss_totals.cpu().numpy())
        steps = {"steps": torch.tensor(self.steps), "totals": torch.from_numpy(totals)}
        return _clones(model | self._moments() | averages) | steps

    def load_state(self, state) -> None:
        """Go on, in an epoch that has begun, from where state() was called."""
        def part(prefix):
            return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}

        self._take(part("model/"))
        if self.averages is not None:
            self.averages = _clones(part("average/"))
        moments = {}
        for name, x in part("optimizer/").items():
            number, _, kind = name.partition("/")
            moments.setdefault(int(number), {})[kind] = x.clone()
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        self.steps = int(state["steps"])
        self.loss_totals.copy_(torch.from_numpy(self.job.own(state["totals"].numpy())))

    def is_finite(self) -> bool:
        """Whether there is no NaN and no infinity in the state. Waits for the GPU."""
        tensors = *self._states().values(), *self._moments().values(), *(self.averages or {}).values(), self.loss_totals
        return bool(torch.stack([x.isfinite().all().to(self.device) for x in tensors]).all())

    def to_host(self, state) -> dict[str, np.ndarray]:
        """What state() or snapshot() gave as arrays on the host, by torch's names."""
        return {name: x.cpu().numpy() for name, x in state.items()}

    def from_host(self, named) -> dict[str, torch.Tensor]:
        """What to_host() was given."""
        where = {name: "cpu" if name in ("steps", "totals") else self.device for name in named}
        return {name: torch.from_numpy(x).to(where[name]) for name, x in named.items()}

    def could_have(self, name: str, array: np.ndarray) -> bool:
        """Whether an array that a fresh state has not may be in a later one: the optimizer makes its own as it goes."""
        kind, _, place = name.partition("/")
        number, parameters = place.partition("/")[0], list(self.model.parameters())
        of = number.isdecimal() and int(number) < len(parameters) and tuple(parameters[int(number)].shape)
        return kind == "optimizer" and array.shape in ((), of)

    def first_fault(self, start: int, stop: int, lr: float) -> str:
        """Make the step on the epoch's images [start, stop), and say what in it became NaN or infinite first; "" where
        nothing did."""
        return faults.of_torch(self, start, stop, lr)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of ScratchLearner.arrays(), on the host."""
        named, norms = {}, {}
        for layer, (linear, *rest) in enumerate(self.model):
            named[f"weight{layer}"] = linear.weight.T
            norm = next((module for module in rest if isinstance(module, nn.BatchNorm1d)), None)
            named[f"bias{layer}"] = (norm or linear).bias
            if norm:
                norms[f"norm_weight{layer}"] = norm.weight
                norms |= {f"norm_mean{layer}": norm.running_mean, f"norm_var{layer}": norm.running_var}
        return {name: np.ascontiguousarray(x.detach().cpu().numpy()) for name, x in (named | norms).items()}


def _clones(tensors: dict) -> dict:
    return {name: x.clone() for name, x in tensors.items()}
