"""What the parts of evaluation share: intervals, provenance, documents, random models."""
