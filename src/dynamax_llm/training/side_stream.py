"""Work beside the current CUDA stream: heads learn from one batch while the backbone reads the next.

A head's step is some hundred kernels of microseconds each. In the backbone's own stream the device would wait for the
host to launch them; in a stream of their own they fill the gaps between the large products, at almost no cost.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class SideStream:
    """A second stream on a GPU; on other devices work runs at once."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._alive: tuple[object, ...] = ()

    def run(self, work: Callable[[], None], *inputs: object) -> None:
        """Queue ``work`` after what the device was given so far, and after earlier work; does not wait for it.

        ``inputs`` are what it reads: kept alive until it has, because their memory belongs to the current stream.
        """
        if self.stream is None:
            work()
            return
        self.join()
        self._alive = inputs
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            work()

    def join(self) -> None:
        """Order everything that the device is given from here on after the work; the host does not wait."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
