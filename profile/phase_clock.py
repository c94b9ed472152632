"""Where a step's time goes: a clock in the place of NVTX on the ranges of mlp/ranges.py."""

import time

import measure  # noqa: F401 (first: it puts the repository on the path)
import numpy as np

from mlp.device import Device

RANGES = ("gather", "forward", "loss", "backward", "optimizer")
PHASES = (*RANGES, "rest")


class PhaseClock:
    """An `annotate` for ranges.attach() that keeps the time of each phase, on a GPU by CUDA events."""

    def __init__(self, device: Device):
        self.records = []  # (phase, begin, end), a step after its phases
        if device.kind == "cpu":
            self.now, self.seconds = time.perf_counter, lambda begin, end: end - begin
        else:
            event, elapsed = device.xp.cuda.Event, device.xp.cuda.get_elapsed_time
            self.now, self.seconds = lambda: _recorded(event()), lambda begin, end: elapsed(begin, end) * 1e-3

    def __call__(self, name: str):
        return _Span(self, name.partition("/")[0])

    def by_phase(self) -> dict[str, np.ndarray]:
        """Seconds in each phase, one per step; `rest` is what the step spends between them."""
        steps, current = [], dict.fromkeys(RANGES, 0.0)
        for phase, begin, end in self.records:
            if phase == "step":
                steps.append(current | {"rest": self.seconds(begin, end) - sum(current.values())})
                current = dict.fromkeys(RANGES, 0.0)
            else:
                current[phase] += self.seconds(begin, end)
        return {phase: np.array([step[phase] for step in steps]) for phase in PHASES}


class _Span:
    __slots__ = ("clock", "phase", "begin")

    def __init__(self, clock, phase):
        self.clock, self.phase = clock, phase

    def __enter__(self):
        self.begin = self.clock.now()

    def __exit__(self, *_):
        self.clock.records.append((self.phase, self.begin, self.clock.now()))


def _recorded(event):
    event.record()
    return event
