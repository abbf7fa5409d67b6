"""What sits at an exit: statistics and measures, learned heads, readouts, and the artifact that holds them.

config       where the exits are, which head judges, which readout speaks
confidence   features of a readout, the ConfidenceEstimator, the fixed measures
heads        the learned judges; their recurrent blocks are in ``blocks``
readout      h at an exit to logits
artifact     all of it as a folder of safetensors and JSON; ``files`` writes without leaving halves
"""
