"""``vllm-am compact``: a document becomes a file that servers load instead of reading it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any


class Role(StrEnum):
    """What a document is in the prompts of the requests to come."""

    SYSTEM = "system"
    USER = "user"
    RAW = "raw"


class NotCompacted(Exception):
    """It could not be compacted, or not be saved."""


def compact_document(
    text: str, model: str, ratio: str, out: Path, role: Role, salt: str | None, more: Sequence[str]
) -> dict[str, Any]:
    """Start an engine, have it read a document and compact it, and save that.

    Args:
        role: as whose message requests bring it; raw: at the beginning of their prompts.
        salt: the cache salt of the requests that it is for.
        more: arguments of ``vllm serve``.

    Returns:
        what the engine says of it.

    Raises:
        NotCompacted: with what a user can do.
    """
    # Compaction is all that this engine does.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.plugins import load_general_plugins
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.async_llm import AsyncLLM

    load_general_plugins()
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm-am compact"))
    flags = ["--kv-compaction", "attention-matching", "--kv-compaction-ratio", ratio]
    arguments = AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", model, *flags, *more]))

    async def run() -> dict[str, Any]:
        # In the loop that its answers come to.
        engine = AsyncLLM.from_engine_args(arguments, usage_context=UsageContext.ENGINE_CONTEXT)
        try:
            return await _compact(engine, text, out, role, salt)
        finally:
            engine.shutdown()

    return asyncio.run(run())


async def _compact(
    engine: Any, text: str, out: Path, role: Role, salt: str | None
) -> dict[str, Any]:
    from vllm.renderers.online_renderer import OnlineRenderer

    from vllm_am.engine.frontend.prefixes import Prefixes, prefix_of_chats
    from vllm_am.engine.prefix_requests import PrefixRefused

    prefixes = Prefixes(engine)
    try:
        if role is Role.RAW:
            ids = list(engine.renderer.get_tokenizer().encode(text))
        else:
            renderer = OnlineRenderer(
                engine.model_config,
                engine.renderer,
                request_logger=None,
                chat_template=None,
                chat_template_content_format="auto",
            )
            ids = await prefix_of_chats(renderer, [{"role": role.value, "content": text}])
        await prefixes.create(out.stem, ids, salt=salt)
        answers = await prefixes.ask("save", name=out.stem, path=str(out.absolute()))
    except PrefixRefused as refused:
        raise NotCompacted(str(refused)) from None
    return {**answers[0], "of": len(ids)}
