"""Work beside the current CUDA stream: heads learn from one batch while the backbone reads the next.

A head's step is some hundred kernels of microseconds each. In the backbone's own stream the device would wait for the
host to launch them; beside it they fill the gaps of the large products, and cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class Aside:
    """A stream of its own on a GPU; elsewhere work is simply done."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._held: tuple[object, ...] = ()

    def run(self, work: Callable[[], None], *inputs: object) -> None:
        """Do ``work`` once what was asked of the device so far is done, and after earlier work; do not wait for it.

        ``inputs`` are what it reads: kept alive until it has, because their memory belongs to the current stream.
        """
        if self.stream is None:
            work()
            return
        self.join()
        self._held = inputs
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            work()

    def join(self) -> None:
        """Whatever is asked of the device from here on sees what the work left; the host does not wait."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
