"""Wall clock of decoding, every setting against full depth in one run: ``plan`` what, ``run`` it, ``document`` it."""

from dynamax_llm.evaluation.bench.document import Bench
from dynamax_llm.evaluation.bench.plan import BenchSettings
from dynamax_llm.evaluation.bench.run import bench

__all__ = ["Bench", "BenchSettings", "bench"]
