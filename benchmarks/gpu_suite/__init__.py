"""Everything that only a GPU can show: device tests, end-to-end tests, speed against peers.

    python -m benchmarks.gpu_suite            # all parts, at most 10 minutes each
    python -m benchmarks.gpu_suite --list

Needs a CUDA build of vLLM 0.32 and pytest, nothing else (no network, no weights: models have dummy
weights of the real shapes); ``offline.sh`` beside this file brings vLLM up on a machine without
network first. Results go to ``benchmarks/out/gpu/``, with ``--record`` to the committed
``benchmarks/results/gpu/``: a CSV and a Markdown table per part; ``python -m benchmarks.gpu_suite
--plot`` draws them, on that machine or any other.
"""
