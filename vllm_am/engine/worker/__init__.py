"""The workers: one process per tensor- and pipeline-parallel rank, where the tensors are.

Fit (fitting.py), write pages, attend (attention_cpu.py, attention_cuda.py, live_batch.py), keep
sampled queries (state.py). Every rank does the same by the scheduler's messages, in their order.
"""
