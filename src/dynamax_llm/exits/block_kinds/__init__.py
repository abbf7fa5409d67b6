"""The blocks that readouts train: one layer each, with a state that belongs to the exit; one file a kind, all of ``base``."""
