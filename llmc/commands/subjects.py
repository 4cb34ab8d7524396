"""What `llmc evaluate` may measure: how it is opened, how it reads a text, how it continues prompts. Not a command."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from llmc.commands import runners
from llmc.commands.sides import locate
from llmc.errors import UserError


@dataclass
class Model:
    """Something that the user named.

    Attributes:
        kind: "hf", "checkpoint", "engine" or "server".
        runner: See llmc/runtime.py; None for a server, and once it was closed.
        server: See llmc.evaluate.remote; None for the others.
        tokenizer: None for a server.
        size: Bytes on disk; None for a server.
    """

    name: str
    kind: str
    runner: Any
    server: Any
    tokenizer: Any
    size: int | None

    def close(self) -> None:
        """Give its memory back."""
        for each in (self.runner, self.server):
            if each:
                each.close()


@contextmanager
def opened(names: Sequence[str], longest: int, sequences: int) -> Iterator[list[Model]]:
    """What the user named, open for as long as the block runs.

    Args:
        longest: Tokens of a sequence that PyTorch must have room for.
        sequences: As many at a time.
    """
    with ExitStack() as stack:
        models = []
        for name in names:
            model = _open(name, longest, sequences)
            stack.callback(model.close)
            models.append(model)
        yield models


def _open(name: str, longest: int, sequences: int) -> Model:
    kind, folder = locate(name)
    if kind == "server":
        from llmc.evaluate.remote import open_server

        return Model(name, kind, None, open_server(name), None, None)
    from llmc.tokenizer import Tokenizer

    runner = runners.opened(kind, folder, sequences=sequences, longest=longest)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Model(name, kind, runner, None, Tokenizer.load(folder), size)


def reading(models: Sequence[Model], text: str, window: int, max_tokens: int | None) -> list[Any]:
    """A Subject (see llmc.evaluate.agreement) for each: a server reads the tokens of the first that has a tokenizer."""
    from llmc import text as texts
    from llmc.evaluate.agreement import Subject
    from llmc.evaluate.samples import short_texts
    from llmc.serve.stream import Vocabulary

    def cut(tokenizer: Any) -> Any:
        if tokenizer is None:
            return short_texts((text,), window, max_tokens)
        return texts.windows(text, tokenizer, window, limit=max_tokens)

    known = next((model.tokenizer for model in models if model.tokenizer), None)
    words = Vocabulary(known).text if known and any(model.server for model in models) else str
    return [
        Subject(
            model.name,
            model.kind,
            cut(model.tokenizer or known),
            runner=model.runner,
            score=model.server and model.server.score,
            word=words,
            size=model.size,
        )
        for model in models
    ]


def completions(model: Model, prompts: Sequence[str], max_tokens: int, stops: Sequence[str]) -> list[str]:
    """What a model writes after each prompt, taking the likeliest token every time. A runner is closed with it.

    Raises:
        UserError: A prompt does not fit.
    """
    if model.server:
        from llmc.evaluate.remote import complete

        return [complete(model.name, prompt, max_tokens, stops) for prompt in prompts]
    from llmc.prompt import completion_ids
    from llmc.serve.engine import Engine
    from llmc.serve.request import Request, Sampling

    sampling = Sampling(temperature=0, stop=list(stops))
    engine = Engine(model.runner, model.tokenizer, max_queue=len(prompts), stuck_after=3600)
    requests = []
    for prompt in prompts:
        ids = completion_ids(model.tokenizer, prompt)
        if len(ids) >= engine.budget.longest:
            raise UserError(f"a prompt has {len(ids)} tokens, {model.name} has room for {engine.budget.longest}")
        requests.append(Request(tuple(ids), sampling, min(max_tokens, engine.budget.longest - len(ids))))
    found = [""] * len(prompts)
    engine.start()
    try:
        for event in engine.submit(*requests).events():
            found[event.choice] += event.text
    finally:
        engine.close()
        model.runner = None  # which its engine has closed
    return found
