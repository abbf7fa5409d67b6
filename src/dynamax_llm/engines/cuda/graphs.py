"""Programs: work on memory that stays where it is, recorded once as a CUDA graph and replayed.

On a device without graphs a program is simply called again; that is how tests run the engine.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import torch

#: Held while a program is recorded, replayed or interpreted, and while a session prepares memory that programs read: a
#: recording is spoiled by work of another thread, and Triton's interpreter runs one kernel at a time.
LOCK = threading.RLock()


class Programs:
    """Named programs that share one memory pool. Recorded in the order in which they are to be replayed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._work: dict[str, Callable[[], None]] = {}
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self._pool = None
        self._stream: torch.cuda.Stream | None = None

    def add(self, name: str, work: Callable[[], None]) -> None:
        """Know ``work`` by ``name``. It may launch kernels, and neither wait for the device nor allocate what it does
        not keep. It is tried out once before it is recorded, so it must do no harm then."""
        self._work[name] = work

    def record(self) -> None:
        """Record what was added since.

        Garbage is collected before and not meanwhile: destroying an older program would spoil a recording.
        """
        gc.collect()
        collects = gc.isenabled()
        gc.disable()
        try:
            for name, work in self._work.items():
                if self.device.type == "cuda" and name not in self._graphs:
                    self._record(name, work)
        finally:
            if collects:
                gc.enable()

    def _record(self, name: str, work: Callable[[], None]) -> None:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        # Kernels are compiled and libraries set up outside of the recording.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        if self._pool is None:
            self._pool = graph.pool()
        self._graphs[name] = graph

    def run(self, name: str) -> None:
        """Replay a program; it is done when the device's stream says so."""
        with LOCK:
            self._graphs[name].replay() if self.device.type == "cuda" else self._work[name]()
