"""The engine core: one process per data-parallel rank, beside vLLM's scheduler.

What is compacted when (planner.py, sequences.py, jobs.py), from which queries (query_pool.py,
query_sources.py, reference_queries.py, and the passes of reference_pass.py and study.py), who owns
which block (blocks.py), how a fit ends (commit.py, give_up.py), and what is said about it
(journal.py). Token ids, block ids and counts only: no tensors, no model.
"""
