"""vLLM's CPU platform, made known to Ray: a platform plugin (``vllm.platform_plugins``).

vLLM asks its platform under which name Ray counts its devices; its CPU platform has no such name,
and so "current platform cpu does not support ray". That is all that stands in the way.
"""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform


class RayOnCpu(CpuPlatform):
    """The CPU platform, whose devices are what a cluster was told to be its GPUs."""

    ray_device_key = "GPU"


def platform() -> str:
    """The entry point: where vLLM finds the class."""
    return f"{__name__}.{RayOnCpu.__name__}"
