"""The versions of vLLM that this tree is written for, and where they differ.

vLLM symbols touched: ``__version__`` and the configuration (read), ``outputs.RequestError``. What
the versions have in common is in ``contacts.toml``; ``python -m scripts.check_vllm VERSION`` holds
all of it against the files of any other version, and says what would break.

Where they differ for us:

- ``Scheduler._get_local_prefix_cache_hit`` takes a limit from 0.33 on: ours passes on what it gets.
- ``AsyncModelRunnerOutput.get_kv_connector_output`` is abstract from 0.33 on: ours always has it.
- ``Scheduler.grammar_compile_error_reqs`` is a set of ids in 0.32, and a dict from ids to errors
  from 0.33 on: :func:`note_error`.
- The CPU's default block size is settled with the configuration in 0.32, and with the loaded model
  from 0.33 on: :func:`settle_block_size`.
"""

from __future__ import annotations

from typing import Any

from vllm import __version__
from vllm.config import VllmConfig
from vllm.outputs import RequestError
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend

from vllm_am.config import CompactionConfigError

#: Series whose contacts with us are tested.
SUPPORTED = ("0.32", "0.33")

#: What vLLM takes on a CPU where nobody asks for a block size.
CPU_BLOCK_SIZE = 128


def check(version: str | None = None) -> None:
    """Refuse a vLLM that this tree was not written for; where compaction is asked for, only.

    Args:
        version: default: the installed one.

    Raises:
        CompactionConfigError: naming the versions and the fix.
    """
    found = __version__ if version is None else version
    if not any(found == series or found.startswith(f"{series}.") for series in SUPPORTED):
        raise CompactionConfigError(
            f"--kv-compaction: this vllm-am supports vLLM {' and '.join(SUPPORTED)}, and vLLM "
            f"{found} is installed: install one of these (or the vllm-am that goes with "
            f"vLLM {found}), or drop --kv-compaction"
        )


def note_error(noted: set[str] | dict[str, RequestError], request_id: str, error: Any) -> None:
    """Have the scheduler finish a request with an error in its next outputs.

    Args:
        noted: its ``grammar_compile_error_reqs``.
        error: a ``RequestError``, which the client gets where vLLM passes one on.
    """
    if isinstance(noted, set):
        noted.add(request_id)
    else:
        noted[request_id] = error


def settle_block_size(vllm_config: VllmConfig) -> None:
    """Set the block size that vLLM is going to choose: what we check at startup depends on it.

    Where layers have a state, vLLM enlarges blocks until one holds it, once the model is loaded; to
    enlarge them again changes nothing.
    """
    cache = vllm_config.cache_config
    if current_platform.is_cpu() and not cache.user_specified_block_size:
        cache.block_size = CPU_BLOCK_SIZE
    if vllm_config.model_config.is_hybrid:
        # By any backend that has no wishes of its own: whole multiples of the size there is.
        type(current_platform)._align_hybrid_block_size(vllm_config, AttentionBackend)
