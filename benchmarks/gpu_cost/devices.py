"""What a device can do, and how long counted work takes on it."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu_cost.counting import Counts, Launch


@dataclass(frozen=True)
class Device:
    """Ceilings of a device.

    Attributes:
        rate: floating-point operations per second, by precision.
        bandwidth: bytes per second, read and written together.
        kernel: seconds that the shortest kernel takes.
        launch: seconds that the host takes to launch one, from Python.
        shares: of the ceiling that kernels of ours reach, by name and head size.
    """

    name: str
    rate: dict[str, float]
    bandwidth: float
    kernel: float
    launch: float
    shares: dict[tuple[str, int], float]

    def seconds(self, launch: Launch, head_dim: int) -> float:
        """On the device."""
        rate = self.rate[launch.precision] * self.shares.get((launch.name, head_dim), 1.0)
        return max(launch.flop / rate, launch.bytes / self.bandwidth, launch.seconds, self.kernel)

    def time(self, counts: Counts, head_dim: int) -> float:
        """Of a stage: the device's work, or the host's launches where they take longer."""
        work = sum(self.seconds(launch, head_dim) for launch in counts.launches)
        return max(work, self.launch * len(counts.launches))


#: Measured (benchmarks/results/gpu): bf16 products and copies; the shortest kernel, by what a
#: launch that finds nothing to do takes; the host, by stages that waited for it; the shares, by the
#: times of the kernels alone. fp32 and fp64 are published.
H200 = Device(
    "H200",
    {"bf16": 784e12, "fp32": 67e12, "fp64": 67e12},
    4.3e12,
    2e-6,
    12e-6,
    {
        ("attention_forward", 128): 0.53,
        ("key_scores", 128): 0.36,
        ("attention_forward", 256): 0.62,
        ("key_scores", 256): 0.51,
    },
)
