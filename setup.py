"""Everything is declared in pyproject.toml.

This file is where the kernels work adds what TOML cannot express: the top-level folder `kernels/`
installed as `vllm_am.kernels` (package_dir), and the native extension built from `csrc/`.
"""

from setuptools import setup

setup()
