"""Thresholds that keep a promise, and the proof: one loss per sequence, a path of thresholds, a test along it.

bounds      Hoeffding-Bentkus p-values, fixed-sequence testing, conformal risk control
betting     p-values that use how losses vary
proof       one of these methods with a limit: what keeps it, and how many prompts that takes
prompts     sequences out of documents: the unit that is drawn, and the only one treated as independent
risks       what a promise limits, as one loss in [0, 1] per sequence
path        thresholds per exit along one parameter; ``fit`` learns it on sequences of its own
calibrate   all of it together: from a promise in words to its record
"""
