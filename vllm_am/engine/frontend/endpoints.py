"""HTTP for operators: name, list, save, load and drop compacted prefixes.

An endpoint plugin of vLLM (group ``vllm.endpoint_plugins``), which API servers load where
``VLLM_PLUGINS`` names ``vllm_am``:

    POST   /v1/kv_compaction/prefixes               {"name", "messages" or "prompt", ...}
    GET    /v1/kv_compaction/prefixes
    DELETE /v1/kv_compaction/prefixes/{name}
    POST   /v1/kv_compaction/prefixes/{name}/save

Files are written to and read from ``prefix_folder`` only. As all paths under ``/v1`` they want the
API key where there is one.

vLLM symbols touched: ``plugins.endpoint_plugins.interface.EndpointPlugin`` (its protocol), and
``app.state`` as vLLM's own routes use it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Awaitable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Request
from fastapi import Path as PathParameter
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from vllm_am.config import CONFIG_KEY, CompactionConfig, CompactionConfigError, parse_ratio
from vllm_am.engine.frontend.prefixes import Prefixes, prefix_of_chats
from vllm_am.engine.prefix_requests import Answer, PrefixRefused, Refusal

ROUTE = "/v1/kv_compaction/prefixes"
#: Ending of saved prefixes.
ENDING = ".kv"
_NAME = r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$"
_STATUS = {
    Refusal.UNKNOWN: 404,
    Refusal.TAKEN: 409,
    Refusal.NO_ROOM: 409,
    Refusal.WRONG: 400,
    Refusal.OFF: 400,
}

router = APIRouter()
Name = Annotated[str, PathParameter(pattern=_NAME)]


class NewPrefix(BaseModel):
    """A prefix that is to be there: of a text, or of a file."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=_NAME)
    messages: list[dict[str, Any]] | None = None
    """That the requests' chats begin with."""
    goes_on: bool | None = None
    """The last message goes on in them (a document, then the question); default: a user's does."""
    prompt: str | None = None
    """In place of messages: a text as the completions endpoint takes it."""
    load: bool = False
    """In place of both: the file that was saved under this name."""
    force: bool = False
    """Load it although it was compacted with other options."""
    ratio: float | str | None = None
    cache_salt: str | None = Field(default=None, min_length=1)


@router.post(ROUTE)
async def create(new: NewPrefix, raw: Request) -> JSONResponse:
    """Compact a text and pin it, or load and pin a file."""
    return await answered(_create(new, raw))


async def _create(new: NewPrefix, raw: Request) -> Answer:
    given = [field for field in ("messages", "prompt", "load") if getattr(new, field)]
    if len(given) != 1:
        raise PrefixRefused(Refusal.WRONG, "give one of messages, prompt and load")
    prefixes = Prefixes(raw.app.state.engine_client)
    if new.load:
        path = _folder(raw) / f"{new.name}{ENDING}"
        if not path.is_file():
            raise PrefixRefused(Refusal.UNKNOWN, f"name={new.name!r}: there is no such file")
        return await prefixes.load(new.name, str(path), new.force)
    if new.messages is not None:
        renderer = raw.app.state.online_renderer
        ids = await prefix_of_chats(renderer, new.messages, new.goes_on)
    else:
        ids = list(raw.app.state.engine_client.renderer.get_tokenizer().encode(new.prompt))
    try:
        ratio = None if new.ratio is None else parse_ratio(new.ratio, "ratio")
    except CompactionConfigError as error:
        raise PrefixRefused(Refusal.WRONG, str(error)) from None
    return await prefixes.create(new.name, ids, ratio, new.cache_salt)


@router.get(ROUTE)
async def list_all(raw: Request) -> JSONResponse:
    """All that are pinned."""
    return await answered(_first(raw, "list"))


@router.delete(ROUTE + "/{name}")
async def drop(name: Name, raw: Request) -> JSONResponse:
    """Pin it no more."""
    return await answered(_first(raw, "drop", name=name))


@router.post(ROUTE + "/{name}/save")
async def save(name: Name, raw: Request) -> JSONResponse:
    """Write it to a file of its name."""
    return await answered(_save(name, raw))


async def _save(name: str, raw: Request) -> Answer:
    return await _first(raw, "save", name=name, path=str(_folder(raw) / f"{name}{ENDING}"))


async def _first(raw: Request, action: str, **arguments: Any) -> Answer:
    answers = await Prefixes(raw.app.state.engine_client).ask(action, **arguments)
    return answers[0]


def _folder(raw: Request) -> Path:
    """Where files are; raises :class:`PrefixRefused` where there are to be none."""
    options = (raw.app.state.vllm_config.additional_config or {}).get(CONFIG_KEY)
    folder = None if options is None else CompactionConfig.from_dict(options).prefix_folder
    if folder is None:
        raise PrefixRefused(
            Refusal.OFF,
            "this server neither saves nor loads prefixes: start it with "
            '--kv-compaction-config \'{"prefix_folder": "FOLDER"}\'',
        )
    return Path(folder)


async def answered(doing: Awaitable[Answer]) -> JSONResponse:
    """What was done, or why not, in the form of vLLM's other errors."""
    try:
        return JSONResponse(await doing)
    except PrefixRefused as refused:
        status = _STATUS[refused.why]
        error = {"message": str(refused), "type": refused.why.value, "param": None, "code": status}
        return JSONResponse({"error": error}, status)


class PrefixEndpoints:
    """What vLLM makes of the entry point."""

    name = "vllm_am"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Nothing of its own: the routes use what vLLM's do."""
