"""Kernels of the GPU engine, in Triton's language; launched from the room above."""
