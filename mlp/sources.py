"""Where a learner's images come from: all of them on the device, or a part after the other from host memory."""

from dataclasses import dataclass

import numpy as np

from .device import Device


@dataclass
class Window:
    """Images on the device that the rows [begin, end) of an epoch are gathered from: those at `index`, the first of
    which is row `begin`. numbers: the indices of the images in the data set, or None where all of it is here. Windows
    with the same `key` use the same arrays."""

    key: int
    images: object
    labels: object
    index: object
    numbers: object = None
    begin: int = 0
    end: int = 0


class Epoch:
    """The order in which images are visited. `size` rows are taken `batch` by `batch`, of which a piece of at most
    `rows` must lie in one window. capacity: the largest size that is expected."""

    def __init__(self, batch: int, rows: int, capacity: int):
        self.batch, self.rows, self.capacity, self.size, self.serial = batch, rows, capacity, 0, 0
        self.order = self._given = self._uploaded = None

    def pieces_end(self, begin: int, room: int) -> int:
        """How far whole pieces from row `begin` on reach that are at most `room` rows together; one piece at least."""
        end = begin
        while end < self.size:
            piece = min(self.rows, self.batch - end % self.batch, self.size - end)
            if end > begin and end + piece - begin > room:
                break
            end += piece
        return end


class Resident:
    """The whole data set on the device; one window, which holds every row."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, device: Device):
        self._xp = device.xp
        self.images, self.labels = device.xp.asarray(images), device.xp.asarray(labels)

    def begin(self, epoch: Epoch, index, shuffle=None) -> bool:
        """Begin an epoch on the images `index` (int32), in the order that shuffle(index, out=order) makes of them.

        Returns whether an array has been replaced that programs may know."""
        replaced = epoch.order is not None and epoch.order.size < len(index)
        if epoch.order is None or replaced:
            epoch.order = self._xp.empty(max(len(index), epoch.capacity), np.int32)
        epoch.size = len(index)
        order = epoch.order[: epoch.size]
        if epoch._given is None or not np.array_equal(epoch._given, index):  # uploaded once, not in every epoch
            epoch._given, epoch._uploaded = np.array(index), self._xp.asarray(index)
        if shuffle:
            shuffle(epoch._uploaded, out=order)
        else:
            order[...] = epoch._uploaded
        return replaced

    def window(self, epoch: Epoch, begin: int) -> Window:
        return Window(0, self.images, self.labels, epoch.order, end=epoch.size)

    def release(self, epoch: Epoch, window: Window) -> None:
        """The rows of `window` have been asked for; what comes next may be fetched."""


@dataclass
class _Slot(Window):
    """A window that is filled again and again; on a GPU through pinned host memory, by a stream of its own."""

    owner: tuple = ()  # epoch, its serial number
    host: tuple = ()  # pinned images, labels and numbers
    copied: object = None  # event: the copy to the device is done
    used: object = None  # event: all that reads the device's arrays is; None while that is not known


class Streamed:
    """The data set in host memory, and two windows of `rows` images on the device: one is read while the other is
    filled. Gathering the rows into pinned memory is the CPU's work, while the GPU computes what it was given before."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, device: Device, rows: int):
        self._images, self._labels, self._device, self._rows = images, labels, device, rows
        self._copies = None  # the stream on which windows are filled; they are read on the current one
        xp, D = device.xp, images.shape[1]
        index = xp.arange(rows, dtype=np.int32)
        self._slots = [
            _Slot(key, xp.empty((rows, D), np.uint8), xp.empty(rows, np.int32), index, xp.empty(rows, np.int32))
            for key in range(2)
        ]
        if device.kind == "cuda":
            import cupyx

            self._copies = xp.cuda.Stream(non_blocking=True)
            for slot in self._slots:
                slot.host = tuple(cupyx.empty_pinned(*of) for of in (((rows, D), np.uint8), *[(rows, np.int32)] * 2))
                slot.used = self._copies.record()

    def begin(self, epoch: Epoch, index, shuffle=None) -> bool:
        """As Resident.begin(); the order stays on the host."""
        if shuffle:
            index = self._device.numpy(shuffle(self._device.xp.asarray(index)))
        epoch.order, epoch.size, epoch.serial = np.array(index), len(index), epoch.serial + 1
        return False

    def window(self, epoch: Epoch, begin: int) -> Window:
        """The window that begins with row `begin`, for the stream that reads it; filled now if it was not before."""
        slot = next((s for s in self._slots if s.owner == (epoch, epoch.serial) and s.begin <= begin < s.end), None)
        if slot is None or slot.end < epoch.pieces_end(begin, 0):
            slot = self._fill(epoch, begin, min(self._slots, key=lambda s: s.owner == (epoch, epoch.serial)))
        if self._copies:
            self._reader().wait_event(slot.copied)
            slot.used = None
        return slot

    def release(self, epoch: Epoch, window: _Slot) -> None:
        """The rows of `window` have been asked for: fetch those after it into the other one."""
        if self._copies:
            window.used = self._reader().record()
        if window.end < epoch.size:
            self._fill(epoch, window.end, self._slots[1 - window.key])

    def _reader(self):
        return self._device.xp.cuda.get_current_stream()

    def _fill(self, epoch: Epoch, begin: int, slot: _Slot) -> _Slot:
        slot.owner, slot.begin, slot.end = (epoch, epoch.serial), begin, epoch.pieces_end(begin, self._rows)
        chosen, n = epoch.order[begin : slot.end], slot.end - begin
        targets = slot.images[:n], slot.labels[:n], slot.numbers[:n]
        if not self._copies:
            self._gather(chosen, *targets)
            return slot
        if slot.copied:
            slot.copied.synchronize()  # the pinned memory may be written again
        self._copies.wait_event(slot.used or self._reader().record())
        self._gather(chosen, *(pinned[:n] for pinned in slot.host))
        for pinned, target in zip(slot.host, targets):
            target.set(pinned[:n], self._copies)
        slot.copied = self._copies.record()
        return slot

    def _gather(self, chosen, images, labels, numbers) -> None:
        """Copy the images `chosen`, their labels and their numbers into host arrays."""
        np.take(self._images, chosen, axis=0, out=images, mode="clip")  # else NumPy gathers into a copy first
        np.take(self._labels, chosen, out=labels, mode="clip")
        numbers[...] = chosen
