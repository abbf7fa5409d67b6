"""Which tiles suit a device: every product of a 7B layer alone, in a chain of layers, swept over block sizes.

    python recipes/speed/tiles.py [--vectors 1 16] [--seconds 200]

Prints, per product and tile, microseconds and the share of the measured copy bandwidth; the tables in
``engines/cuda/tiles.py`` are what this found on one H200.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

import torch

from dynamax_llm.engines.cuda.kernels.product import linear_kernel

#: Name: outputs, inputs, norm, gated, added; of Mistral 7B, then of Codestral Mamba 7B.
PRODUCTS = {
    "qkv": (6144, 4096, "whole", False, False),
    "o": (4096, 4096, "none", False, True),
    "gate_up": (14336, 4096, "whole", True, False),
    "down": (4096, 14336, "none", False, True),
    "head": (32768, 4096, "whole", False, False),
    "in_proj": (18560, 4096, "whole", False, False),
    "out_proj": (4096, 8192, "groups", False, True),
}
SINGLE = [(bn, bk, warps, 1) for bn, bk, warps in itertools.product((2, 4, 8, 16), (512, 1024, 2048), (4, 8))]
SINGLE = [tile for tile in SINGLE if 2048 <= tile[0] * tile[1] <= 16384]
SEVERAL = [
    (bn, bk, warps, stages)
    for bn, bk, warps, stages in itertools.product((16, 32, 64), (128, 256), (4, 8), (3, 5))
    if bn * bk * stages <= 48 * 1024 * 2 and not (bn == 16 and warps == 8)
]


def launch(name, tile, m, tensors, pdl, warmup=False):
    n, k, norm, gated, add = PRODUCTS[name]
    bn, bk, warps, stages = tile
    x, w, w2, weight, groups, live, out = tensors
    grid = (-(-n // bn), 1)
    size, parts = (1024, 32) if norm == "groups" else (1, 1)
    bm = 1 if m == 1 else max(16, 1 << (m - 1).bit_length())
    arguments = (
        x,
        w,
        w2,
        w,
        weight,
        groups,
        live,
        out,
        m,
        n,
        k,
        bm,
        bn,
        bk,
        norm,
        size,
        parts,
        1e-5,
        gated,
        False,
        add,
    )
    settings = {"num_warps": warps, "launch_pdl": pdl}
    if warmup:
        linear_kernel.warmup(*arguments, stages, pdl, grid=grid, **settings)
    else:
        linear_kernel[grid](*arguments, stages, pdl, **settings)


def make(name, m, copies):
    n, k, *_ = PRODUCTS[name]
    kind = {"dtype": torch.bfloat16, "device": "cuda"}
    x = torch.randn(m, k, **kind)
    weights = [torch.randn(n, k, **kind) * k**-0.5 for _ in range(copies * (2 if PRODUCTS[name][3] else 1))]
    groups = torch.rand(m, k // 1024 * 32, device="cuda") * 100
    live = torch.ones(m, dtype=torch.int32, device="cuda")
    return x, weights, torch.ones(k, **kind), groups, live, torch.zeros(m, n, **kind)


def compile_all(jobs):
    for name, m, tile, pdl in jobs:
        x, w, weight, groups, live, out = make(name, m, 1)
        try:
            launch(name, tile, m, (x, w[0], w[-1], weight, groups, live, out), pdl, warmup=True)
        except Exception as error:
            print(name, m, tile, str(error).splitlines()[0][:100], flush=True)


def graph_time(work, repeats=7):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[2:])


def copy_bandwidth():
    a = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / graph_time(lambda: b.copy_(a)) * 1e6


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--vectors", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--names", nargs="+", default=list(PRODUCTS))
    parser.add_argument("--seconds", type=float, default=200)
    args = parser.parse_args()
    began = time.time()
    jobs = [
        (name, m, tile, pdl)
        for m in args.vectors
        for name in args.names
        for tile in (SINGLE if m == 1 else SEVERAL)
        for pdl in (True,)
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(14, mp_context=context) as pool:
        list(pool.map(compile_all, [jobs[i::14] for i in range(14)]))
    print(f"compiled {len(jobs)} in {time.time() - began:.0f} s", flush=True)
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s, {torch.cuda.get_device_name()}", flush=True)
    for m in args.vectors:
        for name in args.names:
            n, k, _, gated, _ = PRODUCTS[name]
            size = n * k * 2 * (2 if gated else 1)
            copies = max(6, min(24, int(1.2e9 // size)))
            x, weights, weight, groups, live, out = make(name, m, copies)
            pairs = list(zip(weights[:copies], weights[-copies:], strict=True))
            found = []
            for tile in SINGLE if m == 1 else SEVERAL:
                for pdl in (True,):

                    def work(tile=tile, pdl=pdl):
                        for w, w2 in pairs:
                            launch(name, tile, m, (x, w, w2, weight, groups, live, out), pdl)

                    if time.time() - began > args.seconds:
                        break
                    try:
                        found.append((graph_time(work) / copies, tile, pdl))
                    except Exception as error:
                        print(name, tile, str(error).splitlines()[0][:80], flush=True)
            found.sort()
            floor = size / bandwidth * 1e6
            print(f"{name} m={m}: floor {floor:.1f} us", flush=True)
            for us, tile, pdl in found[:6] + found[-1:]:
                print(f"   {us:7.2f} us {floor / us:5.1%} tile {tile} pdl {pdl}", flush=True)
            if found:
                best = found[0][1]

                def again(tile=best):
                    for w, w2 in pairs:
                        launch(name, tile, m, (x, w, w2, weight, groups, live, out), False)

                us = graph_time(again) / copies
                print(f"   {us:7.2f} us {floor / us:5.1%} tile {best} without overlap", flush=True)
            del pairs, weights


if __name__ == "__main__":
    main()
