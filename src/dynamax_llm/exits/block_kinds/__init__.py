"""The blocks that readouts train: one layer each, with a state of the exit's own; one file a kind."""
