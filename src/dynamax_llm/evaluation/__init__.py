"""What exits are worth: estimators compared on the same text, under the state policy in use, with every cost."""

from dynamax_llm.evaluation.compare.heads import Candidate, Comparison, Outcome, check_microseconds, compare
from dynamax_llm.evaluation.compare.table import comparison_table

__all__ = ["Candidate", "Comparison", "Outcome", "check_microseconds", "compare", "comparison_table"]
