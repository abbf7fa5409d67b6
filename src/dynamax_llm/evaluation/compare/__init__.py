"""Confidence estimators compared on the same text at the same agreement."""

from dynamax_llm.evaluation.compare.heads import HeadComparison, HeadResult, HeadSetting
from dynamax_llm.evaluation.compare.table import comparison_table

__all__ = ["HeadComparison", "HeadResult", "HeadSetting", "comparison_table"]
