"""The GPU engine: own kernels in recorded programs, for the families it knows. Needs Triton; ``support`` does not."""
