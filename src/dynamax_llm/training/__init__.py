"""Training exits on a frozen backbone, in one streaming pass.

sources, data   text into documents, documents into batches, at a position that can be resumed
exit batch         what one frozen forward tells about every exit
objective       the loss, on the inputs that heads will meet when decoding
learner, lens   one head's, and the translators', optimisation
trainer         the pass itself; ``checkpoint`` and ``progress`` beside it
multi_exit      the loss of a backbone that is itself trained for exits; ``tuning`` trains one
held_out        how good the result is; ``curves`` turns a trace into depth against agreement
"""
