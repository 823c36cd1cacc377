"""KV-cache compaction by Attention Matching (arXiv 2602.16284): the mathematics, in torch alone.

The public function is ``compact``. Its stages, joined in ``fitting``: ``statistics`` (what queries
see in the original cache), the selection of a method in ``methods``, ``fit_bias`` (restores mass),
``fit_values`` (restores outputs), and ``quality`` (judges). Selections are in files of their own:
``omp``, ``eliminate``, ``peaks`` with ``coverage``, ``eviction``; ``problem`` says what they get to
see. Around it: ``budgets`` (pages per head), ``guard`` (slots that a head needs), ``segments``
(merging), ``rotate_queries`` (reference queries from behind the text). ``attend`` is the reference
for attention over the result, ``attend_pages`` that over a batch's pages, which the CPU backend
runs; ``streaming`` is the blocking that all stages share.
"""

from vllm_am.compaction.compact import compact, evaluate_fit
from vllm_am.compaction.methods import METHODS
from vllm_am.compaction.result import CompactedKV, FitError

__all__ = ["METHODS", "CompactedKV", "FitError", "compact", "evaluate_fit"]
