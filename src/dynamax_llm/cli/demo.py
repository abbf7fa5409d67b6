"""``dynamax demo``: both shipped backbones with their exits, on real prompts."""

from __future__ import annotations

from dynamax_llm.cli import options as opt


@opt.verb()
def demo() -> None:
    """Continue real prompts with both shipped backbones, tinted by depth, and print what exits save."""
    from dynamax_llm.demo import main

    main()
