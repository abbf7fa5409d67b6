"""What exits are worth: estimators compared on the same text, under the state policy in use, with every cost."""

from dynamax_llm.evaluation.compare import HeadComparison, HeadResult, HeadSetting, comparison_table

__all__ = ["HeadComparison", "HeadResult", "HeadSetting", "comparison_table"]
