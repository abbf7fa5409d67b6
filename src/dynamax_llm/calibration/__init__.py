"""Thresholds that keep a promise, and the proof: one loss per sequence, a path of thresholds, a test along it.

bounds      p-values, fixed-sequence testing, conformal risk control, how many prompts are needed
prompts     sequences out of documents: the unit that is drawn, and the only one treated as independent
risks       what a promise limits, as one loss in [0, 1] per sequence
path        thresholds per exit along one parameter; ``fit`` learns it on sequences of its own
calibrate   all of it together: from a promise in words to its record
"""
