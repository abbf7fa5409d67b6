"""Training exits on a frozen backbone, in one streaming pass.

settings, presets   every number a user may turn, and named sets of them
trainer             from text to exits: the phases of a run, and the record it leaves
phases              what is learned one after another: a readout, heads, heads again on policy
run                 any resumable run: its loop, counters, checkpoint and identity
learner, lens       the optimisation of heads, and of the lens readout
held_out            how good the exits are on text they were not trained on
"""
