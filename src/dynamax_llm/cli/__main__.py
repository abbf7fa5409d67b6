"""``python -m dynamax_llm.cli``, and so ``accelerate launch -m dynamax_llm.cli``."""

from dynamax_llm.cli import main

main()
