"""How sure an exit is: fixed measures (``measures``) and exit heads (``heads``, one file a kind), all of ``base``."""
