"""The from-scratch model as the training loop sees it: data on the device, training steps, evaluation."""

from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial

import numpy as np

from . import InputError, blas, faults, forms, memory
from .configs import Config
from .data import Dataset
from .device import Device
from .distributed import Job, SharedNorm
from .evaluate import Evaluation
from .loss import altered_images, class_weights
from .model import MLP
from .optim import STEPS_PER_RATE, optimizer
from .products import select
from .scratch_state import States, put
from .sources import Epoch, Resident, Streamed
from .step_graph import Graphs, Program, Recorded, Recorder, Replayer

STEPS_PER_LAUNCH = STEPS_PER_RATE  # of a captured step; profile/ladder.py times others (launches.csv)


class ScratchLearner:
    """An MLP, its optimizer and its data set on one device.

    Images stay uint8 and become float32 batch by batch. A batch larger than the buffers is computed in chunks whose
    gradients add up to those of the whole: memory stays bounded however large the batch is. On a GPU with fused ops a
    step is a CUDA graph, and a launch makes `steps_per_launch` of them; the order of the images, the place in it, the
    number of the step, the learning rate and the results stay there. Nothing here waits for the GPU but totals(),
    evaluate(), synchronize() and, where the data set does not fit into its memory, the next part of it.

    Where it is one process of a job, each computes its part of every batch, and the gradients are added up: all have
    the same parameters always.
    """

    def __init__(
        self, config: Config, data: Dataset, device: Device, train_rows: int, products=None, plan=None, job=None
    ):
        """products, plan: which matrix products, and in which forms; default: products.select()'s, not tuned."""
        self.config, self.device, self.classes = config, device, len(data.class_names)
        self.job = job or Job()
        self.batch_size = config.batch_of(train_rows)
        self.sizes = (data.images.shape[1], *config.hidden, self.classes)
        self.products = products or select(config, device)
        self._blas = blas.Held() if device.kind == "cpu" else None
        self.job.check_batches(train_rows, self.batch_size)
        workspace = self.products.workspace_bytes
        self.budget = memory.fit(config, device, self.sizes, len(data.labels), self.batch_size, workspace)
        self._check_norm(train_rows)
        weights = class_weights(data.labels, config, train_rows)
        self._loss_options = {"label_smoothing": config.label_smoothing} if config.label_smoothing else {}
        if weights is not None:
            self._loss_options["class_weights"] = device.xp.asarray(weights)
        try:
            self._allocate(data, plan or forms.default(len(self.sizes) - 1, own=self.products.library is None))
        except MemoryError as error:  # CuPy's OutOfMemoryError is one too
            raise InputError(f"the data and the model do not fit into the memory of {device.name}: {error}") from None

    def _check_norm(self, train_rows):
        if self.config.batch_norm and -(-self.batch_size // self.job.size) > self.budget.rows:
            raise InputError(
                f"--batch-norm needs the whole batch at once, and of {self.batch_size:,} images the buffers hold "
                f"{self.budget.rows:,}; give a smaller --batch-size or more memory"
            )

    def _allocate(self, data, plan):
        config, device, xp, rows = self.config, self.device, self.device.xp, self.budget.rows
        self.recorder = Recorder()
        self.ops, self._arrays = Recorded(device.ops, self.recorder), Recorded(xp, self.recorder)
        self.model = MLP(
            self.sizes, config.activation, rows=rows, xp=xp, ops=device.ops, products=self.products, plan=plan,
            recorder=self.recorder, seed=config.seed, norm=config.batch_norm, dropout=config.dropout,
            shared_norm=SharedNorm(self.job, xp) if self.job.size > 1 else None,
        )  # fmt: skip
        self.optimizer = optimizer(config, self.model.parameters, xp, self.ops)
        self._steps = xp.zeros(1, np.float32) if self.optimizer.steps is None else self.optimizer.steps
        self.states = States(self.model, self.optimizer, self._steps, config.ema > 0.0)
        self._x, self._y = xp.empty((rows, self.sizes[0]), np.float32), xp.empty(rows, np.int32)
        self.dlogits = xp.empty((rows, plan.columns(self.classes)), np.float32)
        # Loss and hits of the training epoch, the same of an evaluation, its confusion matrix: one copy reads all.
        self._results, self._read = xp.zeros(4 + self.classes**2, np.float64), None
        self.loss_totals, self._judged = self._results[:2], self._results[2:4]
        self._confusion = self._results[4:].view(np.int64).reshape(self.classes, self.classes)
        self._offset, self._lr = xp.zeros(1, np.int64), xp.zeros(1, np.float32)
        self._at, self._rate = 0, 0.0  # what these two hold
        self._draw = xp.zeros(1, np.int64)  # the epoch: each has its own noise and affine maps
        self._altered = altered_images(config)
        if self._altered:
            self._altered["draw"] = self._draw
        # Of the chunks of a batch, and of the processes of a job.
        self._sum = xp.empty_like(self.model.gradients) if self.batch_size > rows or self.job.size > 1 else None
        self.captures = device.kind == "cuda" and device.fused and self.products.captures
        self.captures &= not (config.batch_norm and self.job.size > 1)  # whose processes talk to each other in a step
        self.steps_per_launch = STEPS_PER_LAUNCH if self.captures else 1
        state = [*self.states.arrays.values(), self._results, self._offset]
        state += [] if self._sum is None else [self._sum]
        self.replay = Replayer(self.recorder, Graphs(xp, state) if self.captures else None)
        if self.budget.window:
            self.source = Streamed(data.images, data.labels, device, self.budget.window)
        else:
            self.source = Resident(data.images, data.labels, device)
        images = len(data.labels)
        self._training, self._judging = Epoch(self.batch_size, rows, images), Epoch(rows, rows, images)
        self.annotate = nullcontext  # see ranges.py

    @property
    def notice(self) -> str:
        """What the user should know."""
        return self.products.notice

    @property
    def parameter_count(self) -> int:
        return self.model.parameter_count

    def provenance(self) -> dict:
        """What decides the last bits of a run, beside the configuration."""
        return {"plan": asdict(self.model.plan)}

    def modules(self) -> list:
        """The libraries whose versions do."""
        return [self.device.xp]

    # ---- training

    def begin_epoch(self, index, epoch: int | None = None) -> None:
        """Take the images `index` (int32) for the batches to come, and forget the last epoch's totals. Their order is
        that of `index`, or with the number of an epoch a random one, which follows from it and the seed alone."""
        shuffle = None
        if epoch is not None:
            shuffle = partial(self.device.ops.shuffle, seed=self.config.seed, epoch=epoch)
        if self.source.begin(self._training, index, shuffle):
            self.replay.forget()
        self._draw[...] = epoch or 0
        self.loss_totals[...] = 0
        self._read = None

    def train(self, start: int, stop: int, lr: float) -> None:
        """An optimizer step on each batch of the epoch's images [start, stop)."""
        self._set_rate(lr)
        if self._sum is not None:
            for begin in range(start, stop, self.batch_size):
                self._accumulated_step(begin, min(begin + self.batch_size, stop))
            return
        for window, begin, end in self._windows(self._training, start, stop):
            whole, rest = divmod(end - begin, self.batch_size)
            launches, steps = divmod(whole, self.steps_per_launch)
            for _ in range(launches):
                self._step(self.batch_size, window, self.steps_per_launch)
            for _ in range(steps):
                self._step(self.batch_size, window)
            if rest:
                self._step(rest, window)

    def train_step(self, start: int, stop: int, lr: float) -> None:
        """One optimizer step on the epoch's images [start, stop)."""
        self._set_rate(lr)
        if self._sum is not None:
            self._accumulated_step(start, stop)
        else:
            for window, begin, end in self._windows(self._training, start, stop):
                self._step(end - begin, window)

    def _set_rate(self, lr):
        if lr != self._rate:
            self._lr[...] = self._rate = lr

    def _windows(self, epoch, start, stop):
        """The windows that hold the epoch's rows [start, stop): (window, first row, end) in the epoch's numbering.
        When one has been dealt with, the next may be fetched."""
        self._read = None
        while start < stop:
            window = self.source.window(epoch, start)
            end = min(stop, window.end)
            if start - window.begin != self._at:
                self._offset[...] = start - window.begin
            self._at = None  # until what is done with the window has gone well
            yield window, start, end
            self._at = end - window.begin
            if end == window.end:
                self.source.release(epoch, window)
            start = end

    def _chunks(self, epoch, start, stop):
        """The same in pieces that the buffers hold: (window, first row, number of rows)."""
        for window, begin, end in self._windows(epoch, start, stop):
            for row in range(begin, end, len(self._x)):
                yield window, row, min(len(self._x), end - row)

    def _step(self, rows, window, repeats=1):
        with self.annotate("step"):
            self.replay(("step", rows, window.key), partial(self._whole_step, rows, window), repeats)

    def _accumulated_step(self, start, stop):
        """One step on more rows than the buffers hold, or on those of a job: the gradients of the chunks, and then
        those of the processes, add up to those of the whole."""
        scale, (first, end) = 1.0 / (stop - start), self.job.share(start, stop)
        with self.annotate("step"):
            for window, begin, rows in self._chunks(self._training, first, end):
                row = begin - start if self.config.dropout else 0  # all that a chunk's place in the batch decides
                key = ("chunk", rows, window.key, scale, row, begin == first)
                self.replay(key, partial(self._chunk, rows, window, scale, row, begin == first))
            self.job.add(self._sum)
            self.replay(("update",), partial(self._update, self._sum))

    def programs(self) -> dict[str, Program]:
        """What is executed for a batch, after begin_epoch(): one program, or those of a first chunk and the update."""
        rows = min(self.batch_size, len(self._x))
        window = self.source.window(self._training, 0)
        if self._sum is None:
            return {f"step of {rows:,} images": Program.of(self.recorder, partial(self._whole_step, rows, window))}
        chunk = partial(self._chunk, rows, window, 1.0 / self.batch_size, 0, True)
        return {
            f"chunk of {rows:,} of {self.batch_size:,} images": Program.of(self.recorder, chunk),
            "update after the last chunk": Program.of(self.recorder, partial(self._update, self._sum)),
        }

    # ---- programs

    def _whole_step(self, rows, window):
        with self.recorder.early():  # the optimizer touches neither images nor the place in them
            x, labels = self._gather(rows, window, **self._altered)
        self._advance(rows, self._steps)
        self._gradients(x, labels, 1.0 / rows)
        self.recorder.join()
        self._update(self.model.gradients)

    def _chunk(self, rows, window, scale, row, first):
        x, labels = self._gather(rows, window, **self._altered)
        self._advance(rows, self._steps if first else None)
        self._gradients(x, labels, scale, row)
        self.recorder.join()
        if first:
            self._arrays.copyto(self._sum, self.model.gradients)
        else:
            self._arrays.add(self._sum, self.model.gradients, out=self._sum)

    def _update(self, gradients):
        with self.recorder.phase("optimizer"):
            self.optimizer.step(self.model.parameters, gradients, self._lr)
            for name, average in self.states.averages.items():
                values = self.states.judged[name]
                self.ops.average_step(average, values, decay=self.config.ema, step=self._steps)

    def _judge(self, rows, window, noise_sigma):
        x, labels = self._gather(rows, window, noise_sigma=noise_sigma)
        self._advance(rows)
        logits = self.model.forward(x)
        with self.recorder.phase("loss"):
            self.ops.softmax_cross_entropy(
                logits, labels, out=self.dlogits[:rows], totals=self._judged, confusion=self._confusion,
                classes=self.classes,
            )  # fmt: skip

    def _gather(self, rows, window, **altered):
        """The next `rows` images and labels of the window: float32 (rows, D) and int32 (rows,)."""
        x, labels = self._x[:rows], self._y[:rows]
        with self.recorder.phase("gather"):
            self.ops.gather_batch(
                window.images, window.labels, window.index, offset=self._offset, out_x=x, out_y=labels,
                seed=self.config.seed, numbers=window.numbers, **altered,
            )  # fmt: skip
        return x, labels

    def _advance(self, rows, steps=None):
        """The next batch begins `rows` further on, and the step has a new number: beside what follows, unless that
        reads the number."""
        beside = nullcontext() if steps is not None and self.config.dropout else self.recorder.beside()
        with self.recorder.phase("gather"), beside:
            self.ops.advance(self._offset, rows, steps)

    def _gradients(self, x, labels, scale, row=0):
        logits = self.model.forward(x, training=True, step=self._steps, row=row)
        dlogits = self.dlogits[: len(x)]
        with self.recorder.phase("loss"):
            self.ops.softmax_cross_entropy(
                logits, labels, scale, out=dlogits, totals=self.loss_totals, classes=self.classes, **self._loss_options,
            )  # fmt: skip
        self.model.backward(x, dlogits)

    # ---- results

    def synchronize(self) -> None:
        """Wait until all that was asked for is done."""
        self.device.synchronize()

    def totals(self) -> tuple[float, int]:
        """Sum of the row losses and number of correct rows since begin_epoch(). Waits for the GPU."""
        loss, correct = self.job.total(self._results_on_host()[:2])
        return float(loss), int(correct)

    def evaluate(self, index: np.ndarray, noise_sigma: float = 0.0) -> Evaluation:
        """Loss and confusion matrix on the images `index`, with Gaussian noise added to the [0, 1] pixels. What it
        copies from the GPU holds the training epoch's totals as well."""
        begin, end = self.job.share(0, len(index))
        if self.source.begin(self._judging, index[begin:end]):
            self.replay.forget()
        self._results[2:] = 0
        with self.annotate("validation"), self._averaged():
            for window, _, rows in self._chunks(self._judging, 0, end - begin):
                key = ("evaluate", rows, window.key, noise_sigma)
                self.replay(key, partial(self._judge, rows, window, noise_sigma))
        results = self._results_on_host()
        confusion = self.job.total(results[4:].view(np.int64)).reshape(self.classes, self.classes)
        return Evaluation(float(self.job.total(results[2:4])[0]) / len(index), confusion)

    def _results_on_host(self):
        if self._read is None:
            self._read = np.array(self.device.numpy(self._results))
        return self._read

    @contextmanager
    def _averaged(self):
        """The averages, if there are any, in the place of what they are averages of."""
        states = self.states
        kept = {name: states.judged[name].copy() for name in states.averages}
        put(states.judged, states.averages)
        yield
        put(states.judged, kept)

    # ---- state

    def snapshot(self) -> dict:
        """A copy of what is judged, on the device: the parameters and running statistics, or their averages."""
        return {name: x.copy() for name, x in (self.states.averages or self.states.judged).items()}

    def restore(self, snapshot) -> None:
        """Take back what snapshot() gave."""
        put(self.states.judged, snapshot)
        put(self.states.averages, snapshot)

    def state(self) -> dict:
        """A copy, on the device, of all that a step leaves for the next, and of the epoch's totals by process."""
        return {name: x.copy() for name, x in self.states.arrays.items()} | {"totals": self.job.gather(self.loss_totals)}

    def load_state(self, state) -> None:
        """Go on, in an epoch that has begun, from where state() was called."""
        put(self.states.arrays, state)
        self.loss_totals[...] = self.job.own(state["totals"])
        self._read = None

    def is_finite(self) -> bool:
        """Whether there is no NaN and no infinity in the state. Waits for the GPU."""
        xp = self.device.xp
        return bool(xp.stack([xp.isfinite(x).all() for x in (*self.states.arrays.values(), self.loss_totals)]).all())

    def to_host(self, state) -> dict[str, np.ndarray]:
        """What state() or snapshot() gave, in arrays on the host that are named as those of arrays()."""
        return self.states.to_host(state, self.device)

    def from_host(self, named) -> dict:
        """What to_host() was given."""
        return self.states.from_host(named, self.device)

    def could_have(self, name: str, array: np.ndarray) -> bool:
        """Whether an array that a fresh state has not may be in a later one."""
        return False

    def first_fault(self, start: int, stop: int, lr: float) -> str:
        """Make the step on the epoch's images [start, stop), and say what in it became NaN or infinite first; "" where
        nothing did."""
        return faults.of_scratch(self, start, stop, lr)

    def arrays(self) -> dict[str, np.ndarray]:
        """On the host: weight0 (in, out), bias0 (out,), weight1, ...; with batch normalisation also norm_weight0,
        norm_mean0, norm_var0 (out,), ..."""
        views = (*self.model.named_parameters(), *self.model.named_buffers())
        return {name: np.ascontiguousarray(self.device.numpy(view)) for name, view in views}
