"""Block sizes of the products, found with an earlier form of ``recipes/speed/tiles.py`` on one H200."""

from __future__ import annotations

from typing import NamedTuple

import torch

#: Most vectors one program multiplies with; more are shared out over a second grid axis.
MOST_VECTORS = 64
#: Fewest that tensor cores take.
LEAST_VECTORS = 16
#: Shared memory, in bytes, that the blocks on their way may fill.
SHARED = 224 * 1024


class Tile(NamedTuple):
    """Rows and columns of a block of weights, vectors, warps, and stages of the pipeline that loads blocks."""

    rows: int
    columns: int
    vectors: int
    warps: int
    stages: int


def tile(outputs: int, inputs: int, vectors: int, dtype: torch.dtype, *, pairs: bool = False, group: int = 0) -> Tile:
    """For (outputs, inputs) weights; ``pairs``: two rows of weights per output; ``group``: columns must divide it."""
    few = outputs <= 4096
    if vectors == 1:
        rows, columns, warps, stages = (8, 1024, 4, 1) if few else (4, 2048, 8, 1)
        rows = max(2, rows // 2) if pairs else rows
    else:
        rows, columns, warps, stages = (32, 256, 4, 5) if few else (64, 128, 8, 3)
        if pairs:
            rows, columns, warps, stages = (64, 256, 4, 3)
    wide = dtype == torch.float32
    columns = min(columns // 2 if wide else columns, power_of_two(inputs))
    block = 1 if vectors == 1 else min(max(power_of_two(vectors), LEAST_VECTORS), MOST_VECTORS)
    if vectors > 1:
        columns = max(columns, LEAST_VECTORS)
        stages = 2 if wide else stages
        held = (rows * (1 + pairs) + block) * (4 if wide else 2)  # bytes of a column, of weights and of vectors
        stages = min(stages, max(2, SHARED // (held * columns)))
        while columns > LEAST_VECTORS and stages * held * columns > SHARED:
            columns //= 2
    while group and group % columns:
        columns //= 2
    least = 1 if vectors == 1 else LEAST_VECTORS
    rows = max(min(rows, power_of_two(outputs)), least)
    return Tile(rows, columns, block, warps, stages)


def power_of_two(number: int) -> int:
    """The least power of two that is not below ``number``."""
    return 1 << (max(number, 1) - 1).bit_length()


def blocks(whole: int, part: int) -> int:
    """How many parts cover the whole."""
    return -(-whole // part)
