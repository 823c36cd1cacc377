"""Benchmarks and the bundled models they run on."""
