"""What a saved prefix was made for: the model, its numbers, and the options that shape a fit.

vLLM symbols touched (read): ``config.VllmConfig``; ``huggingface_hub`` finds the files of a model
that is named, not a folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from vllm.config import VllmConfig

from vllm_am.config import CONFIG_KEY, CompactionConfig
from vllm_am.engine.layers import full_layers
from vllm_am.engine.limits import EngineLimits
from vllm_am.engine.prefix_file import PrefixFile, PrefixFileError, PrefixHeader

#: Read of each weight file, at its beginning and at its end.
_PIECE = 1 << 16
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
#: Of a model's configuration: what does not bear on its numbers, or is said apart.
_VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}
#: Options that say when and where something is done, and not what becomes of a span. The ratio is
#: a file's own.
_NOT_OF_A_FIT = {
    "ratio",
    "threshold",
    "recent_tokens",
    "protected_tokens",
    "min_span_tokens",
    "max_span_tokens",
    "merge_slots",
    "cache",
    "step_ms",
    "pressed_step_ms",
    "query_pool_share",
    "prompts_file",
    "preload",
    "load_any_options",
    "prefix_folder",
    "pinned_share",
}


def header_for(
    vllm_config: VllmConfig,
    ratio: float,
    salt: str | None,
    spans: tuple[tuple[int, int], ...],
) -> PrefixHeader:
    """What a file of this engine says of itself."""
    model = vllm_config.model_config
    heads = range(model.get_total_num_kv_heads())
    layers = full_layers(model.hf_text_config)
    return PrefixHeader(
        model=str(model.model),
        model_digest=model_digest(vllm_config),
        dtype=str(model.dtype).removeprefix("torch."),
        heads=tuple(f"L{layer}H{head}" for layer in layers for head in heads),
        head_dim=model.get_head_size(),
        options=fit_options(CompactionConfig.from_dict(vllm_config.additional_config[CONFIG_KEY])),
        ratio=ratio,
        salt=salt,
        spans=spans,
        plugin=version("vllm-am"),
    )


def checked_file(
    path: Path, vllm_config: VllmConfig, limits: EngineLimits, any_options: bool
) -> PrefixFile:
    """A file that this engine can load.

    Args:
        any_options: it may have been compacted with other options.

    Raises:
        PrefixFileError: naming what differs.
    """
    file = PrefixFile.read(path)
    if not limits.caches_prefixes:
        raise PrefixFileError(f"{path}: this server shares no compacted prefixes")
    expected = header_for(vllm_config, file.header.ratio, file.header.salt, ())
    vocabulary = vllm_config.model_config.get_vocab_size()
    file.check(expected, vocabulary, any_options or limits.config.load_any_options)
    size = limits.block_size
    for start, end in file.header.spans:
        if start % size or end % size:
            raise PrefixFileError(
                f"{path}: spans: tokens [{start}, {end}) are not whole blocks of {size} tokens; "
                "choose another --block-size, or make the file with this one"
            )
    if file.header.tokens > limits.max_model_len:
        raise PrefixFileError(
            f"{path}: has {file.header.tokens} tokens; raise --max-model-len, which is "
            f"{limits.max_model_len}"
        )
    return file


def fit_options(config: CompactionConfig) -> dict[str, Any]:
    """What shapes a fit, of all options; long ones by their digest."""
    options = {k: v for k, v in config.to_dict().items() if k not in _NOT_OF_A_FIT}
    plain = json.loads(json.dumps(options))  # as they are when they have been in a file
    return {
        name: value if len(json.dumps(value)) < 500 else _digest(value)
        for name, value in plain.items()
    }


def model_digest(vllm_config: VllmConfig) -> str:
    """Of a model's configuration, as the engine uses it, and of its weights.

    Of the weights, size, head and tail of each file; of such as are not files on this machine,
    nothing.
    """
    model = vllm_config.model_config
    config = {k: v for k, v in model.hf_text_config.to_dict().items() if k not in _VOLATILE}
    weights = _weights_digest(str(model.model), model.revision)
    return _digest({"config": config, "quantized": model.quantization, "weights": weights})


@cache
def _weights_digest(model: str, revision: str | None) -> str:
    """Of the files as they are when it is first asked for: what an engine has loaded. Not read
    again for every file, which may be while others are served."""
    found = hashlib.sha256()
    for path in _weight_files(model, revision):
        size = path.stat().st_size
        found.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            found.update(file.read(_PIECE))
            file.seek(max(0, size - _PIECE))
            found.update(file.read(_PIECE))
    return found.hexdigest()


def _weight_files(model: str, revision: str | None) -> Iterator[Path]:
    path = Path(model)
    if path.is_file():
        yield path
        return
    if not path.is_dir():
        try:
            cached = try_to_load_from_cache(model, "config.json", revision=revision)
        except ValueError:  # no name of a repository: an address of another kind
            return
        if not isinstance(cached, str):
            return
        path = Path(cached).parent
    for pattern in _WEIGHTS:
        yield from sorted(path.glob(pattern))


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
