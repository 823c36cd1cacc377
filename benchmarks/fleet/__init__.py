"""What compaction would be worth on a GPU that serves a day's requests, on paper.

    python -m benchmarks.fleet            # a table and plots, over ratios and memory
    python -m benchmarks.fleet --check    # the simulation of a small engine against that engine

A trace of requests (``traces.py``) drives a simulation of vLLM's scheduler and of ours
(``simulate.py``), whose steps take as long as the costs of a device say (``costs.py``).
``check.py`` fits the costs of the CPU engine where memory is ample, and holds what they predict for
tight pools against the real engine.
"""
