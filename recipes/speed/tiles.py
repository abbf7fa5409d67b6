"""Which tiles suit a device: every product of a 7B layer alone, in a chain of copies, swept over block sizes.

    PYTHONPATH=src python recipes/speed/tiles.py [--vectors 1 16] [--seconds 200]

Prints, per product, the fastest tiles in microseconds and as a share of the bandwidth of a copy measured beside them.
``engines/cuda/tiles.py`` holds what an earlier form of this found on one H200.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamax_llm.engines.cuda import launch
from dynamax_llm.engines.cuda.passes import Pass
from dynamax_llm.engines.cuda.tiles import LEAST_VECTORS, Tile, power_of_two


@dataclass(frozen=True)
class Product:
    """Outputs and inputs of a matrix; ``gated``: of a pair of them; ``added``: to the residual stream."""

    name: str
    outputs: int
    inputs: int
    gated: bool = False
    added: bool = False

    @property
    def nbytes(self) -> int:
        return self.outputs * self.inputs * 2 * (1 + self.gated)


#: Of Mistral 7B, then of Codestral Mamba 7B.
PRODUCTS = (
    Product("qkv", 6144, 4096),
    Product("o", 4096, 4096, added=True),
    Product("gate_up", 14336, 4096, gated=True),
    Product("down", 4096, 14336, added=True),
    Product("head", 32768, 4096),
    Product("in_proj", 18560, 4096),
    Product("out_proj", 4096, 8192, added=True),
)
ONE = list(itertools.product((2, 4, 8, 16), (512, 1024, 2048), (4, 8), (1,)))
SEVERAL = list(itertools.product((16, 32, 64), (128, 256), (4, 8), (3, 5)))


def chain(product: Product, vectors: int, copies: int) -> Callable[[], None]:
    """Work that multiplies with ``copies`` different matrices, one after the other."""
    kind = {"dtype": torch.bfloat16, "device": "cuda"}
    x = torch.randn(vectors, product.inputs, **kind)
    weights = [torch.randn(product.outputs, product.inputs, **kind) * product.inputs**-0.5 for _ in range(copies)]
    sums = torch.rand(vectors, 512, device="cuda")
    out = torch.zeros(vectors, product.outputs, **kind)
    norm = torch.ones(product.outputs, **kind)
    p = Pass(1, vectors, out, torch.zeros(1, dtype=torch.int32, device="cuda"))

    def work() -> None:
        for index, weight in enumerate(weights):
            if product.added:
                launch.add_linear(x, weight, p, norm)
            else:
                second: Tensor | None = weights[index - 1] if product.gated else None
                launch.linear(x, weight, out, second=second, eps=1e-5, sums=sums)

    return work


def microseconds(work: Callable[[], None], repeats: int = 7) -> float:
    """Median time of a recorded program."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return timed(graph.replay, repeats)


def timed(call: Callable[[], object], repeats: int = 7) -> float:
    times = []
    for _ in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[2:])


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / timed(lambda: target.copy_(source)) * 1e6


def sweep(product: Product, vectors: int, bandwidth: float, until: float) -> None:
    """Print the fastest tiles of one product."""
    copies = max(6, min(24, int(1.2e9 // product.nbytes)))
    work, found = chain(product, vectors, copies), []
    block = 1 if vectors == 1 else max(LEAST_VECTORS, power_of_two(vectors))
    chosen = launch.tile
    for rows, columns, warps, stages in ONE if vectors == 1 else SEVERAL:
        if time.time() > until:
            break
        made = Tile(rows, columns, block, warps, stages)
        launch.tile = lambda *arguments, made=made, **options: made
        try:
            found.append((microseconds(work) / copies, made))
        except Exception as error:  # a tile that does not fit
            print(f"   {made}: {str(error).splitlines()[0][:80]}")
        finally:
            launch.tile = chosen
    floor = product.nbytes / bandwidth * 1e6
    own = microseconds(work) / copies
    print(f"{product.name}, {vectors} vectors: floor {floor:.1f} us, as shipped {own:.2f} us ({floor / own:.1%})")
    for spent, made in sorted(found)[:5]:
        print(f"   {spent:7.2f} us {floor / spent:5.1%} {made}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--seconds", type=float, default=200)
    args = parser.parse_args()
    until = time.time() + args.seconds
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: a copy moves {bandwidth / 1e12:.2f} TB/s", flush=True)
    for vectors, product in itertools.product(args.vectors, PRODUCTS):
        sweep(product, vectors, bandwidth, until)


if __name__ == "__main__":
    main()
