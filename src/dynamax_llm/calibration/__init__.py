"""Thresholds that keep a promise: one loss per sequence, a path of thresholds, a statistical test along it.

bounds      Hoeffding-Bentkus p-values, fixed-sequence testing, conformal risk control
betting     p-values that use how losses vary
risk_test   one of these methods with a limit: which losses it accepts, and how many prompts that takes
prompts     sequences drawn from documents: the unit that is treated as independent
risks       what a promise limits, as one loss in [0, 1] per sequence
path        thresholds per exit along one parameter; ``fit`` learns it on sequences that are not tested
calibrate   from a promise in words to its record
"""
