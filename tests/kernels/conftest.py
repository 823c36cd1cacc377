"""Kernel tests run on the GPU if there is one, else through Triton's interpreter on CPU tensors.

Triton decides between the two when a kernel is decorated, that is when its module is imported: so
the switch is on while pytest imports the test modules (``tests/conftest.py``, as those of other
folders may import Triton, too), and off when tests run: some start engines, whose processes must
not inherit it. Test modules may import kernels at their top.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.conftest import INTERPRETER
from tests.kernels.device import DEVICE, ON_GPU
from vllm_am.compaction.accelerate import use_kernels

if not ON_GPU:
    # Decorates tl.sum and the like for the interpreter; with the switch off they are compiled ones.
    assert os.environ.get(INTERPRETER) == "1"
    import triton.language  # noqa: F401


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """For kernel modules that are imported, or launchers that look at the switch, in a test."""
    if not ON_GPU:
        monkeypatch.setenv(INTERPRETER, "1")


@pytest.fixture(autouse=True)
def plain_references() -> Iterator[None]:
    """The stages of ``vllm_am.compaction`` are references here, and stay in torch on a GPU too."""
    with use_kernels(False):
        yield


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The device of the test's tensors. Waits for its kernels, so that a fault is this test's."""
    yield DEVICE
    if ON_GPU:
        torch.cuda.synchronize()
