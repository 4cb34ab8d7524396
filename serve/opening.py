"""From the options of `llmc serve` to a service, and what it says of itself when it is up."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from llmc.config import Strict
from llmc.engine import describe
from llmc.errors import UserError
from llmc.serve.engine import MAX_WAITING, Engine
from llmc.serve.runners import open_runner
from llmc.serve.service import Service
from llmc.tokenizer import Tokenizer


class Settings(Strict):
    """What may be chosen when an engine is served; the command's options say what each means."""

    name: str | None = None
    api_key: str | None = None
    api_key_file: Path | None = None
    threads: int | None = None
    max_sequences: int | None = None
    cache_tokens: int | None = None
    step_tokens: int | None = None
    max_waiting: int = MAX_WAITING
    max_waiting_tokens: int | None = None
    max_body: int = 4
    allow_origin: tuple[str, ...] = ()
    strict: bool = False
    pooling: Literal["mean", "last"] = "last"


def api_keys(settings: Settings) -> tuple[str, ...]:
    """The key that was given, and those of the file: one a line, `#` begins a remark.

    Raises:
        UserError: The file cannot be read, or has no key: the server would be open to all.
    """
    keys = () if settings.api_key is None else (settings.api_key,)
    path = settings.api_key_file
    if path is None:
        return keys
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the API keys in {path}: {error}") from None
    found = tuple(line for line in lines if line and not line.startswith("#"))
    if not found:
        raise UserError(f"{path} has no API key: write one a line")
    return keys + found


def open_service(folder: Path, settings: Settings) -> Service:
    """Open the engine in `folder` for serving; see open_runner for what is raised."""
    keys = api_keys(settings)
    tokenizer = Tokenizer.load(folder)
    runner = open_runner(
        folder,
        threads=settings.threads,
        max_sequences=settings.max_sequences,
        cache_tokens=settings.cache_tokens,
    )
    engine = Engine(
        runner,
        tokenizer,
        step_tokens=settings.step_tokens,
        max_waiting=settings.max_waiting,
        max_waiting_tokens=settings.max_waiting_tokens,
    )
    score = describe(folder).spec.score
    return Service(
        engine,
        settings.name or folder.resolve().name,
        int(time.time()),
        api_keys=keys,
        allow_origins=settings.allow_origin,
        max_body=settings.max_body << 20,
        strict=settings.strict,
        pad=score.pad if score else None,
        pooling=settings.pooling,
    )


def welcome(service: Service, url: str) -> str:
    """What is served, within which limits, and a first request to try."""
    budget = service.engine.budget
    key = " -H 'Authorization: Bearer KEY'" if service.api_keys else ""
    chat = service.tokenizer.chat_template is not None
    route = "chat/completions" if chat else "completions"
    body = '{"messages": [{"role": "user", "content": "Hello"}]}' if chat else '{"prompt": "Once upon a time"}'
    return (
        f"Serving '{service.model}' at {url}\n"
        f"  {budget.max_sequences} sequences at a time of {budget.longest} tokens at most, "
        f"{budget.cache_tokens} tokens in the cache, {budget.max_waiting} sequences in the queue\n"
        f"Try:\n  curl {url}/v1/{route}{key} -H 'Content-Type: application/json' \\\n    -d '{body}'"
    )
