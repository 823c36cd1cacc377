"""Everything that only a GPU can show: device tests, end-to-end tests, speed against peers.

    python -m benchmarks.gpu_suite --act 1 --seconds 540    # what tells most, in nine minutes
    python -m benchmarks.gpu_suite                          # all stages, an hour
    python -m benchmarks.gpu_suite --list

Needs a CUDA build of vLLM and pytest, nothing else (no network, no weights: models have dummy
weights of the real shapes); ``short.sh`` beside this file brings vLLM up on a machine without
network first. Results go to ``benchmarks/out/gpu/``, with ``--record`` to the committed
``benchmarks/results/gpu/``: a CSV and a Markdown table per stage, a log, a table of the stages;
``python -m benchmarks.gpu_suite --plot`` draws them, on that machine or any other.

Each stage runs in processes of its own under a time limit of its own. One that fails or hangs hides
nothing of those behind it, and the rows that it has made are kept.
"""
