"""A training step as a list of op calls: recorded once, then executed call by call, or as one CUDA graph.

The same arguments serve every step: arrays are allocated before, and what changes from step to step (where the batch
begins, the number of the step, the learning rate) lies on the device and is changed there. So a list can be captured,
and what is tested on a CPU is what a GPU launches.
"""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import groupby


@dataclass(frozen=True)
class Call:
    """One call of an op. In a graph those that are `beside` make a branch of their own, in their order, next to the
    calls that follow; the next one that `joins` waits for it. Where the program is repeated, those that are `early` run
    on that branch next to the last calls of the repetition before, from the one that joins on."""

    phase: str  # what the call belongs to: "gather", "forward/layer0", ...; see ranges.py
    function: Callable
    args: tuple
    kwargs: dict
    beside: bool = False
    joins: bool = False
    early: bool = False

    def __call__(self):
        self.function(*self.args, **self.kwargs)


class Recorder:
    """Calls functions, or while recording() notes the calls down. What they return is lost either way: the code that
    is recorded names its outputs."""

    def __init__(self):
        self._calls, self._phase, self._beside, self._joins, self._early = None, "", False, False, False

    def __call__(self, function, *args, **kwargs) -> None:
        if self._calls is None:
            function(*args, **kwargs)
        else:
            how = self._beside, self._joins, self._early
            self._calls.append(Call(self._phase, function, args, kwargs, *how))
            self._joins = False

    @contextmanager
    def recording(self):
        """The list to which the calls are added until the end of the block."""
        self._calls = []
        try:
            yield self._calls
        finally:
            self._calls = None

    @contextmanager
    def phase(self, name: str):
        self._phase = name
        yield
        self._phase = ""

    @contextmanager
    def beside(self):
        """What is called in this block may run next to what follows it, until join()."""
        self._beside = True
        yield
        self._beside = False

    @contextmanager
    def early(self):
        """What is called in this block needs nothing of the calls from join() on and overwrites nothing of theirs."""
        self._early = True
        yield
        self._early = False

    def join(self) -> None:
        """The next call uses what was computed beside."""
        self._joins = True


class Recorded:
    """The functions of `owner`, a module or an object, through a recorder."""

    def __init__(self, owner, recorder: Recorder):
        self.owner, self._recorder = owner, recorder

    def __getattr__(self, name):
        function, recorder = getattr(self.owner, name), self._recorder

        def call(*args, **kwargs):
            recorder(function, *args, **kwargs)

        setattr(self, name, call)
        return call


class Program:
    """Recorded calls, to be executed one after another."""

    def __init__(self, calls: list[Call]):
        self.calls = tuple(calls)
        self._bare = [(call.function, call.args, call.kwargs) for call in calls]

    @classmethod
    def of(cls, recorder: Recorder, body: Callable[[], None]) -> "Program":
        """What body() calls through the recorder."""
        with recorder.recording() as calls:
            body()
        return cls(calls)

    def run(self) -> None:
        for function, args, kwargs in self._bare:
            function(*args, **kwargs)

    def run_annotated(self, annotate) -> None:
        """The same, with neighbouring calls of one phase inside `with annotate(phase):`."""
        for phase, calls in groupby(self.calls, lambda call: call.phase):
            with annotate(phase) if phase else nullcontext():
                for call in calls:
                    call()

    def issue(self, main, side, repeats: int = 1) -> None:
        """Launch the calls `repeats` times on CuPy's stream `main`, which is the current one, and those beside them on
        `side`."""
        early = [call for call in self.calls if call.early]
        ahead = False  # whether those of this repetition have been launched
        for repetition in range(repeats):
            forked = False
            for call in self.calls:
                if call.early and ahead:
                    continue
                if call.beside:
                    self._beside(call, main, side)
                    forked = True
                    continue
                if call.joins and forked:
                    main.wait_event(side.record())
                    forked = ahead = bool(early) and repetition + 1 < repeats
                    for following in early if ahead else ():
                        self._beside(following, main, side)
                call()
            if forked:
                main.wait_event(side.record())

    @staticmethod
    def _beside(call, main, side) -> None:
        side.wait_event(main.record())
        with side:
            call()


@cache
def _streams(cupy, device: int):
    """Two streams of a GPU: for a graph, and for what is beside it. They are the same for all graphs, because a library
    of matrix products keeps a workspace for each."""
    return cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)


class Graphs:
    """Programs as CUDA graphs, ordered with CuPy's current stream.

    state: the arrays that a program changes for the next one. Before a capture everything runs once, so that kernels
    are loaded, plans of matrix products made and memory is there; then the state is put back as it was. What ops
    allocate while they are captured lies in a pool that lives as long as the graphs, which keep its addresses.
    """

    def __init__(self, cupy, state: list):
        self._cupy, self._state = cupy, state
        self.stream, self._side = _streams(cupy, cupy.cuda.Device().id)
        self._pool = cupy.cuda.MemoryPool()

    def capture(self, program: Program, repeats: int):
        """A graph of `repeats` executions of `program`, one after another; launch() launches it."""
        kept = [array.copy() for array in self._state]
        self._follow_current_stream()
        with self._cupy.cuda.using_allocator(self._pool.malloc), self.stream:
            program.issue(self.stream, self._side)
            for array, before in zip(self._state, kept):
                array[...] = before
            self.stream.synchronize()
            self.stream.begin_capture()
            try:
                program.issue(self.stream, self._side, repeats)
            finally:
                graph = self.stream.end_capture()  # also after an error, or the stream could not be used any more
        graph.upload(self.stream)
        return graph

    def launch(self, graph) -> None:
        self._follow_current_stream()
        graph.launch(self.stream)
        self._cupy.cuda.get_current_stream().wait_event(self.stream.record())

    def _follow_current_stream(self):
        self.stream.wait_event(self._cupy.cuda.get_current_stream().record())


class Replayer:
    """Programs by key: recorded when a key is new, and executed as often as asked for.

    graphs: where they are captured, one graph per key and number of repeats; None: executed call by call.
    annotate: if set, they are executed call by call and every phase inside `with annotate(phase):`.
    """

    def __init__(self, recorder: Recorder, graphs: Graphs | None = None):
        self.recorder, self.graphs, self.annotate = recorder, graphs, None
        self._programs, self._captured = {}, {}

    def forget(self) -> None:
        """Drop all programs, because arrays that they use have been replaced."""
        self._programs.clear()
        self._captured.clear()

    def __call__(self, key, body: Callable[[], None], repeats: int = 1) -> None:
        if key not in self._programs:
            self._programs[key] = Program.of(self.recorder, body)
        program = self._programs[key]
        if self.annotate:
            for _ in range(repeats):
                program.run_annotated(self.annotate)
        elif self.graphs is None:
            for _ in range(repeats):
                program.run()
        else:
            if (key, repeats) not in self._captured:
                self._captured[key, repeats] = self.graphs.capture(program, repeats)
            self.graphs.launch(self._captured[key, repeats])
