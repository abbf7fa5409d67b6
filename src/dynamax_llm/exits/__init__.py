"""What sits at an exit: readouts, confidence estimators, what they remember, and the artifact that holds them.

config       where the exits are, which head and which readout they have
features     what an estimator reads of an exit's logits and hidden state
state        what exits remember of earlier tokens
readouts     h at an exit to logits, one file a kind
confidence   measures and exit heads, one file a kind; the recurrent heads' arithmetic is in ``blocks``
registries   the kinds by name, open to your own
artifact     all of it as a folder of safetensors and JSON; ``promise`` is one record in it, ``files`` writes atomically
"""
