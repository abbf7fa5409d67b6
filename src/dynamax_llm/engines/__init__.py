"""Engines: what runs layers and exits for the rows of a session, behind one interface.

base     the interface, and the registry of engines
plan     what a session carries out: exits, estimator, readout, state policy
eager    plain PyTorch, any device and family: the reference
cuda     recorded programs of own kernels, on a CUDA device
choose   which engine takes a plan
"""
