"""How an exit turns its hidden state into logits, one file a kind, all of ``base``."""
