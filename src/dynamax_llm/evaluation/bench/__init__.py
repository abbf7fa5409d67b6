"""Wall clock of decoding, every setting against full depth in one run: ``plan`` what, ``run`` it, ``document`` it."""

from typing import TYPE_CHECKING

from dynamax_llm.evaluation.bench.settings import BenchSettings
from dynamax_llm.lazy import lazy

if TYPE_CHECKING:
    from dynamax_llm.evaluation.bench.document import Bench
    from dynamax_llm.evaluation.bench.run import bench

__all__ = ["Bench", "BenchSettings", "bench"]

__getattr__ = lazy(__name__, {"Bench": "document", "bench": "run"})
