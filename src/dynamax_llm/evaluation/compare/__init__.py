"""Confidence estimators compared on the same text at the same agreement."""
