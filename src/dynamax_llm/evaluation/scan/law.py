"""The laws of ``estimate``, and what they were fitted on; ``recipes/scan/trained_modes.py --fit`` makes them."""

from __future__ import annotations

from dynamax_llm.evaluation.scan.trained_modes import Law

FITTED_ON = (
    "the law was fitted on one model, SmolLM2-135M with transformer blocks and a draft trained on 24 M tokens of its "
    "own answers; its intervals are from kinds of prompt that were left out, so another model may lie outside them."
)
#: Root mean square error with each of four kinds of prompt left out in turn: .048 of the depth.
BLOCKS = Law(
    (1.8706, 0.2499, 0.1939, 0.9701, 0.2399, -1.3491, 0.1675, 0.0665, -0.0448, -0.2335, 1.9514),
    sharpness=1.25,
    error=0.10,
)
#: The same: 8 % of the speed-up.
DRAFT = Law(
    (1.7327, 0.4671, 0.1796, 1.6637, 0.1676, -0.2419, -0.089, -0.0983, 0.5598, 0.069, 0.8693),
    sharpness=1.25,
    error=0.17,
)
