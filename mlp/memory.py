"""How much device memory a run needs, and what to do where there is less: smaller buffers, or data from the host."""

from dataclasses import dataclass

from . import InputError
from .configs import Config
from .device import Device
from .flags import format_bytes

FEWEST_ROWS = 64  # of the buffers; fewer would save next to nothing
MOST_WINDOW = 32768  # rows: 26 MB, enough to hide what each copy costs to begin
SHARE = 0.9  # of the memory that is free on a GPU, where no limit is given
SLACK = 16 * 2**20  # scratch memory of the ops, rounding of the allocator


@dataclass(frozen=True)
class Budget:
    """rows: the largest batch that is computed at once. window: rows of a window of a data set that is streamed from
    host memory, or 0 where all of it is on the device. needed: the bytes of device memory that this takes."""

    rows: int
    window: int
    needed: int


@dataclass(frozen=True)
class Need:
    """Bytes of device memory: of what is there anyway, per row of the buffers, of the data set and of one image."""

    fixed: int
    per_row: int
    data: int
    per_image: int

    def resident(self, rows: int) -> int:
        return self.fixed + rows * self.per_row + self.data

    def streamed(self, rows: int, window: int) -> int:
        return self.fixed + rows * self.per_row + 2 * window * self.per_image


def need(config: Config, sizes, images: int, workspace: int) -> Need:
    """sizes: widths from the input to the classes. workspace: bytes of the library of matrix products."""
    widths, rounded = sizes[1:], config.precision == "bf16"
    parameters = sum(n_in * n_out + n_out for n_in, n_out in zip(sizes, widths))
    # parameters, gradients, their sum over chunks, the best ones and their successor; the optimizer's moments, and once
    # more what a capture puts back; the average of the parameters, and these while the average is judged; what is kept
    # of the state, and its successor
    moments = 2 if config.optimizer == "adam" else 1 if config.momentum else 0
    state = 1 + moments + (1 if config.ema else 0)
    arenas = 5 + moments + (1 + moments if config.fused else 0) + (2 if config.ema else 0) + 2 * state
    fixed = parameters * (4 * arenas + 2 * rounded) + workspace + SLACK + 8 * (images + sizes[-1] ** 2)
    activations = sizes[0] + 3 * sum(widths) + sizes[-1]  # the batch; pre-activations, outputs, gradients; dlogits
    per_image = sizes[0] + 4
    return Need(fixed, activations * (4 + 2 * rounded) + 8, images * per_image, per_image + 8)  # its number; iota


def fit(config: Config, device: Device, sizes, images: int, batch: int, workspace: int = 0) -> Budget:
    """The budget for `images` images, trained on `batch` at a time.

    With enough memory the data set is on the device and the buffers hold device.chunk_rows rows. With less, first the
    buffers shrink, as long as they hold a batch or 1024 rows; then the data set is streamed; then the buffers shrink
    further. InputError, with the bytes needed, where even that is too much.
    """
    needs = need(config, sizes, images, workspace)
    limit = config.memory_limit
    if limit is None:
        free = device.free_bytes()
        limit = None if free is None else int(SHARE * free)
    most = device.chunk_rows
    if limit is None:
        return Budget(most, 0, needs.resident(most))
    for rows in _halvings(most, min(batch, 1024)):
        if needs.resident(rows) <= limit:
            return Budget(rows, 0, needs.resident(rows))
    for rows in _halvings(min(batch, most), FEWEST_ROWS):
        window = (limit - needs.streamed(rows, 0)) // (2 * needs.per_image) // rows * rows
        window = min(window, max(rows, MOST_WINDOW // rows * rows), -(-images // rows) * rows)
        if window >= rows:
            return Budget(rows, window, needs.streamed(rows, window))
    least = needs.streamed(FEWEST_ROWS, FEWEST_ROWS)
    given = "--memory-limit" if config.memory_limit else f"{SHARE:.0%} of the free memory of {device.name}"
    raise InputError(
        f"{config.model} with batches of {batch} needs at least {least:,} bytes ({format_bytes(least)}) of device "
        f"memory, but {given} is {limit:,}; give more, a smaller --hidden or a smaller --batch-size"
    )


def _halvings(most: int, least: int):
    """most, most / 2, ... and last of all `least`."""
    rows = most
    while rows > least:
        yield rows
        rows //= 2
    yield min(most, least)
