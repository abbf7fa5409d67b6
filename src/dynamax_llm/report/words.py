"""How each number was measured, in one sentence each: the report's own glossary."""

from __future__ import annotations

from dynamax_llm.report.markup import Markup, tag

MEASURED = {
    "depth": "Layers run for a token, 1 to L; mean depth is shown as a share of L. The prompt runs at full depth and "
    "is not in these means; the first new token comes out of its pass and counts at full depth.",
    "task metric": "The score that lm-evaluation-harness gives, under its own name. Δ is the paired difference to the "
    "full model on the same samples; ▴ and ▾ mark differences whose whole interval lies on one side of zero.",
    "agreement": "Share of tokens equal to the full model's, given the same prefix (teacher-forced on the full "
    "model's own output). It says nothing of two free generations, which drift apart after their first difference.",
    "ROUGE-L": "Longest common subsequence of words with the full model's text, F-measure (Lin 2004), no stemming.",
    "identical": "Share of outputs equal to the full model's, token for token.",
    "first divergence": "Median index of the first token that differs, among outputs that differ.",
    "degenerate": "Share of outputs that say nothing: blank, or at least half of their runs of four tokens repeat "
    "earlier ones. They are counted and scored like all others, never left out.",
    "counted reduction": "Share of multiply-accumulates saved, counted, with checks, readouts and state updates "
    "included; negative where the checks cost more than the exits saved. It is no measurement of time.",
    "pass reduction": "Share of full-depth decoding's passes over a layer's weights that were not made. Counted too.",
    "speed-up": "Wall clock against the full model in the same engine and the same run, batch 1, in pairs; above 1× "
    "is faster. It holds for the hardware named below and for no other.",
    "intervals": "95\u00a0% bootstrap intervals over samples, not over tokens: tokens of one text are not independent.",
    "reliability": "Tokens binned by the confidence a head gave; the share of them that the exit got right stands "
    "against it. The expected calibration error (ECE) is the mean gap, weighted by tokens.",
    "static, pruned": "Baselines. static: every token leaves at one exit. pruned: layers before the last are removed "
    "from the model altogether, as in arXiv 2504.20922.",
    "state policy": "What happens to the state of layers a token skipped. propagate, copy and stale are approximate; "
    "defer keeps the state exact; verify keeps the output exact.",
}


def measured() -> Markup:
    """The definitions as a list."""
    return tag("dl", [tag("div", tag("dt", word), tag("dd", text)) for word, text in MEASURED.items()], class_="words")
