"""What the parts of evaluation share: documents, intervals, provenance, random models."""

#: A confidence measure without cost that is never below 0: at a threshold of 0 every token leaves by it.
FREE_MEASURE = "state_similarity"
