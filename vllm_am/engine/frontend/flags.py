"""The command line: ``--kv-compaction`` and its companions.

vLLM symbol touched: ``engine.arg_utils.EngineArgs.add_cli_args`` is wrapped, and with it
``parse_known_args`` of each parser that it fills. Why: vLLM has no extension point for a plugin's
own flags. They only add; without ``--kv-compaction`` nothing else changes. This can go when vLLM
lets plugins register argument groups.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

from vllm.engine.arg_utils import EngineArgs

from vllm_am.config import (
    CACHE_MODES,
    CONFIG_KEY,
    DEFAULT_THRESHOLD_TOKENS,
    CompactionConfig,
    CompactionConfigError,
    parse_json,
    parse_ratio,
    parse_threshold,
    shown,
)
from vllm_am.config.option_help import option_help

METHOD_NAME = "attention-matching"


def _checked(parse: Any) -> Any:
    """``parse`` for argparse, which prints the message of an ArgumentTypeError and the usage."""

    def convert(text: str) -> Any:
        try:
            parse(text)
        except CompactionConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return convert


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"--kv-compaction-config: not valid JSON ({error})"
        ) from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"--kv-compaction-config: expected a JSON object, got {shown(text)}"
        )
    return value


def _help_of_options() -> str:
    """What else can be set: a list, whose items vLLM's formatter keeps apart."""
    own_flags = {"ratio", "threshold", "cache", "preload"}
    items = (
        f"- {option.name} (default: {option.default}): {option.text}"
        for option in option_help()
        if option.name not in own_flags
    )
    return "\n".join(items).replace("%", "%%").replace("`", "").replace("*", "")


def add_flags(parser: Any) -> Any:
    """Add our argument group to ``parser``."""
    group = parser.add_argument_group(
        title="KV compaction (vllm-am)",
        description="Compact the KV cache of long sequences in place by Attention Matching.",
    )
    group.add_argument(
        "--kv-compaction",
        choices=["none", METHOD_NAME],
        default="none",
        help="Compact the KV cache of sequences that cross the threshold, and give the freed "
        "blocks back to the pool.",
    )
    group.add_argument(
        "--kv-compaction-ratio",
        type=_checked(parse_ratio),
        default=None,
        help="Fraction of the compacted KV that is KEPT, in (0, 1]; '50x' is the same as 0.02. "
        "(Some libraries count the fraction removed.) Default: "
        f"{CompactionConfig.ratio:g}.",
    )
    group.add_argument(
        "--kv-compaction-threshold",
        type=_checked(parse_threshold),
        default=None,
        help="Uncompacted tokens that a sequence may hold before it is compacted, such as 4096; "
        "or a share of the KV pool, such as '80%%': sequences are then compacted when more of "
        "the pool is in use, longest first, instead of being preempted. Default: "
        f"{DEFAULT_THRESHOLD_TOKENS}, or half of --max-model-len if that is less.",
    )
    group.add_argument(
        "--kv-compaction-cache",
        choices=list(CACHE_MODES),
        default=None,
        help="Keep compacted prefixes for all requests that begin with the same text: these are "
        "neither computed nor compacted nor stored again. Default: auto, which is on where vLLM "
        "caches exact prefixes.",
    )
    group.add_argument(
        "--kv-compaction-preload",
        nargs="+",
        default=None,
        metavar="FILE",
        help="Load compacted prefixes that `vllm-am compact` or a server has saved, and keep them "
        "for requests that begin with their text.",
    )
    group.add_argument(
        "--kv-compaction-config",
        type=_json_object,
        default=None,
        metavar="JSON",
        help="All other options as a JSON object, e.g. '{\"recent_tokens\": 128}':\n"
        + _help_of_options(),
    )
    return parser


def options_from_args(args: argparse.Namespace) -> dict[str, Any] | None:
    """The normalised options, or None when compaction is off.

    Raises:
        CompactionConfigError: a companion flag without ``--kv-compaction``, the same option given
            twice, or an invalid value.
    """
    named = {
        "ratio": getattr(args, "kv_compaction_ratio", None),
        "threshold": getattr(args, "kv_compaction_threshold", None),
        "cache": getattr(args, "kv_compaction_cache", None),
        "preload": getattr(args, "kv_compaction_preload", None),
    }
    more: dict[str, Any] | None = getattr(args, "kv_compaction_config", None)
    given = {name: value for name, value in named.items() if value is not None}
    if getattr(args, "kv_compaction", "none") == "none":
        if given or more is not None:
            flag = f"--kv-compaction-{next(iter(given), 'config')}"
            raise CompactionConfigError(
                f"{flag} has no effect without --kv-compaction {METHOD_NAME}; add it"
            )
        return None
    if twice := sorted(set(given) & set(more or {})):
        raise CompactionConfigError(
            f"--kv-compaction-{twice[0]} is also given in --kv-compaction-config; drop one"
        )
    return CompactionConfig.from_dict({**(more or {}), **given}).to_dict()


def move_options(parser: Any) -> None:
    """Let ``parser`` put the options where every process finds them: ``args.additional_config``.

    Done as soon as the command line is parsed: vLLM hands the arguments, not a configuration, to
    API servers that it spawns, and these read them before any plugin is loaded.
    """
    parse = parser.parse_known_args

    @functools.wraps(parse)
    def parse_known_args(*args: Any, **kwargs: Any) -> Any:
        namespace, rest = parse(*args, **kwargs)
        try:
            options = options_from_args(namespace)
        except CompactionConfigError as error:
            parser.error(str(error))
        if options is not None:
            others = getattr(namespace, "additional_config", None) or {}
            namespace.additional_config = {**others, CONFIG_KEY: options}
        return namespace, rest

    parser.parse_known_args = parse_known_args


def install() -> None:
    """Wrap ``EngineArgs.add_cli_args`` so that the flags exist and reach ``additional_config``."""
    original = EngineArgs.add_cli_args

    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = add_flags(original(parser))
        move_options(parser)
        return parser

    EngineArgs.add_cli_args = staticmethod(add_cli_args)
