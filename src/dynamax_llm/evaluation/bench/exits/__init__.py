"""Wall clock of saved exits on prompts: ``modes``, ``run`` them beside plain generate, ``document``, ``verdict``."""
