"""A Ray cluster of this machine alone, whose processes take vLLM's CPU platform for Ray's GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.fresh_process import end_tree, environment
from benchmarks.serving import HOST, free_port

#: Seconds until a cluster has to be up, and has for going down.
START_SECONDS, STOP_SECONDS = 60, 20
#: Bytes of shared memory: nothing large goes through Ray's store.
STORE = 100 * 2**20


def install(folder: Path) -> None:
    """Write what makes Python find the entry point where ``folder`` is on PYTHONPATH."""
    info = folder / "ray_on_cpu-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ray-on-cpu\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.platform_plugins]\nray_on_cpu = tests.engine.ray_on_cpu:platform\n"
    )


@contextmanager
def ray_cluster(variables: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Start a cluster with two devices; yields the variables by which ``vllm serve`` finds it.

    Args:
        variables: of the cluster's processes, which vLLM's workers inherit.
    """
    # Of a short name: a socket's path has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        install(Path(folder))
        address = f"{HOST}:{free_port()}"
        own = environment(**variables, RAY_AUTH_MODE="disabled", RAY_ADDRESS=address)
        own["PYTHONPATH"] = os.pathsep.join([own["PYTHONPATH"], folder])
        ray = Path(sys.executable).parent / "ray"
        head = ["start", "--head", "--block", "--node-ip-address", HOST]
        head += ["--port", address.split(":")[1], "--temp-dir", folder, "--disable-usage-stats"]
        head += ["--num-cpus", "2", "--num-gpus", "2", "--include-dashboard", "false"]
        head += ["--object-store-memory", str(STORE)]
        with open(f"{folder}/log", "w") as log:
            process = subprocess.Popen(
                [ray, *head], env=own, stdout=log, stderr=log, text=True, start_new_session=True
            )
        try:
            _wait(ray, own, process, Path(folder, "log"))
            yield {key: own[key] for key in ("PYTHONPATH", "RAY_ADDRESS", "RAY_AUTH_MODE")}
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            end_tree(process)


def _wait(ray: Path, env: dict[str, str], process: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while subprocess.run([ray, "status"], env=env, capture_output=True).returncode:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"Ray did not start:\n{log.read_text()}")
        time.sleep(0.5)
