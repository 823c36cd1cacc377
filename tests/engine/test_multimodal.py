"""Multimodal classes: texts are compacted, requests that bring media stay exact."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.fresh_process import environment, run_fresh
from benchmarks.real_models.packages import cache_folder
from tests.engine.alike import assert_alike
from tests.engine.multimodal_case import CLASSES, IN_BFLOAT16

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def variables():
    """Of a process that has torchvision, which vLLM's CPU build does without for text models."""
    major, minor = map(int, torch.__version__.split(".")[:2])
    assert major == 2
    version = f"0.{minor + 15}.0"  # the two are released together
    folder = cache_folder() / f"torchvision-{version}"
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        half_done = folder.with_suffix(".part")
        done = subprocess.run(
            [*command, str(half_done), f"torchvision=={version}"], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"torchvision {version} cannot be had here: {done.stderr[-200:]}")
        half_done.rename(folder)
    path = [str(folder), str(Path(__file__).parent / "torchvision_on_cpu")]
    path += filter(None, [os.environ.get("PYTHONPATH")])
    return environment() | {
        "PYTHONPATH": os.pathsep.join([environment()["PYTHONPATH"], *path]),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }


@pytest.mark.parametrize("family", sorted(set(CLASSES) - set(IN_BFLOAT16)))
def test_texts_are_compacted(family, variables):
    """With nothing but the language model; Gemma 3's has windows, Qwen's rotates by three axes."""
    case = {"family": family, "media": False}
    found = run_fresh("tests.engine.multimodal_case", case, variables, timeout=300)
    ours = found["ours"]
    assert ours["outputs"] == found["stock"]["outputs"]
    assert len(set(map(tuple, ours["outputs"].values()))) > 8
    assert ours["compactions"] >= 8 and not ours["failures"] and ours["used_blocks"] == 0
    assert all(ours["rotated"]) and ours["media_requests"] == 0


@pytest.mark.parametrize("family", IN_BFLOAT16)
def test_texts_are_compacted_beside_linear_attention(family, variables):
    case = {"family": family, "media": False}
    found = run_fresh("tests.engine.multimodal_case", case, variables, timeout=400)
    ours, stock = found["ours"], found["stock"]
    assert_alike(list(ours["likely"].values()), [stock["likely"][name] for name in ours["likely"]])
    assert ours["compactions"] == len(ours["outputs"]) == 4
    assert not ours["failures"] and ours["used_blocks"] == 0
    assert all(ours["rotated"])


def test_a_request_with_an_image_stays_exact(variables):
    """Twice, so that its prefix is found; texts beside it are compacted."""
    case = {"family": "Qwen2_5_VL", "media": True}
    found = run_fresh("tests.engine.multimodal_case", case, variables, timeout=300)
    ours = found["ours"]
    assert ours["outputs"] == found["stock"]["outputs"]
    assert ours["outputs"]["image"] == ours["outputs"]["image again"]
    assert ours["media_requests"] == 2
    assert ours["compactions"] >= 8 and not ours["failures"] and ours["used_blocks"] == 0
