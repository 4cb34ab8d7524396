"""From the options of `llmc serve` to a service, and what it says of itself when it is up."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from llmc.adapter import Adapter
from llmc.config import Strict
from llmc.engine import describe
from llmc.errors import UserError
from llmc.serve.engine import MAX_QUEUE, Engine
from llmc.serve.runners import GIB, open_runner
from llmc.serve.service import Service
from llmc.serve.speculate import Drafting, open_speculation
from llmc.tokenizer import Tokenizer


class Settings(Strict):
    """What may be chosen when an engine is served; the command's options say what each means."""

    name: str | None = None
    api_key: str | None = None
    api_key_file: Path | None = None
    threads: int | None = None
    max_sequences: int | None = None
    kv_cache_gib: float | None = None
    max_step_tokens: int | None = None
    max_queue: int = MAX_QUEUE
    max_queued_tokens: int | None = None
    max_body: int = 4
    request_timeout: float | None = None
    metrics_prefix: Annotated[str, Field(pattern="^[a-zA-Z_]+$")] = "llmc"
    allow_origin: tuple[str, ...] = ()
    deterministic: bool = False
    speculate: Annotated[Drafting, BeforeValidator(Drafting.read)] | None = None
    strict: bool = False
    pooling: Literal["mean", "last"] = "last"
    lora: tuple[str, ...] = ()

    @property
    def adapters(self) -> dict[str, Path]:
        """Name -> folder of the low-rank adapters.

        Raises:
            UserError: One is not given as NAME=FOLDER, or a name is there twice.
        """
        found: dict[str, Path] = {}
        for given in self.lora:
            name, _, folder = given.partition("=")
            if not re.fullmatch(r"[\w.:/@-]{1,100}", name) or not folder:
                raise UserError(f"--lora {given}: expected NAME=FOLDER", param="lora")
            if name in found or name == self.name:
                raise UserError(f"--lora {given}: there is another model named '{name}'", param="lora")
            found[name] = Path(folder)
        return found


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


def open_service(folder: Path, settings: Settings, adapters: Sequence[Adapter] = ()) -> Service:
    """Open the engine in `folder` for serving; see open_runner for what is raised.

    Args:
        adapters: Those that the settings name, read for this engine's model.
    """
    keys, name = api_keys(settings), settings.name or folder.resolve().name
    if name in settings.adapters:
        raise UserError(f"--lora {name}=...: that is the name of the model itself; give it another", param="lora")
    tokenizer = Tokenizer.load(folder)
    runner = open_runner(
        folder,
        threads=settings.threads,
        max_sequences=settings.max_sequences,
        cache_gib=settings.kv_cache_gib,
        deterministic=settings.deterministic,
        adapters=adapters,
    )
    speculation = None
    if (how := settings.speculate) is not None:
        speculation = open_speculation(how, tokenizer, runner.limits.vocab_size, threads=settings.threads)
    engine = Engine(
        runner,
        tokenizer,
        max_step_tokens=settings.max_step_tokens,
        max_queue=settings.max_queue,
        max_queued_tokens=settings.max_queued_tokens,
        deterministic=settings.deterministic,
        speculation=speculation,
    )
    score = describe(folder).spec.score
    return Service(
        engine,
        name,
        int(time.time()),
        adapters=tuple(adapter.name for adapter in adapters),
        api_keys=keys,
        allow_origins=settings.allow_origin,
        max_body=settings.max_body << 20,
        request_timeout=settings.request_timeout or float("inf"),
        metrics_prefix=settings.metrics_prefix,
        strict=settings.strict,
        pad=score.pad if score else None,
        pooling=settings.pooling,
    )


def welcome(service: Service, url: str) -> str:
    """What is served, within which limits, and a first request to try."""
    budget, limits = service.engine.budget, service.engine.limits
    key = " -H 'Authorization: Bearer KEY'" if service.api_keys else ""
    chat = service.tokenizer.chat_template is not None
    route = "chat/completions" if chat else "completions"
    body = '{"messages": [{"role": "user", "content": "Hello"}]}' if chat else '{"prompt": "Once upon a time"}'
    beside = f"  with the adapters {', '.join(service.adapters)}\n" if service.adapters else ""
    if service.engine.limits.num_scores:
        route, body = "score", '{"input": "Once upon a time"}'
    return (
        f"Serving '{service.model}' at {url}\n{beside}"
        f"  {budget.max_sequences} sequences at a time of {budget.longest} tokens at most, "
        f"{budget.cache_tokens} tokens in the cache ({limits.cache_bytes / GIB:.2f} GiB), "
        f"{budget.max_queue} sequences in the queue\n"
        f"Try:\n  curl {url}/v1/{route}{key} -H 'Content-Type: application/json' \\\n    -d '{body}'"
    )
