"""Run vLLM's model runner V2 on the CPU, through Triton's interpreter: import before vLLM.

V2 is what GPUs use. vLLM's CPU build takes it only where Triton has a "cpu" backend, which the
package from PyPI lacks; its interpreter runs V2's kernels all the same, slowly but exactly.
"""

from __future__ import annotations

import os
import types

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

import triton.backends


class _InterpreterDriver:
    @staticmethod
    def is_active() -> bool:
        return True


triton.backends.backends.clear()
triton.backends.backends["cpu"] = types.SimpleNamespace(driver=_InterpreterDriver, compiler=None)
