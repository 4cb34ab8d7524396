"""What the routes share that answer with numbers: embeddings, scores and the order of documents."""

from __future__ import annotations

import time
from collections.abc import Sequence

from llmc.runtime import Logits
from llmc.serve.request import Request
from llmc.serve.routes.transport import client_gone, wait
from llmc.serve.service import Service


def pooled(service: Service, model: str, requests: Sequence[Request]) -> list[Logits]:
    """The vector of each request.

    They are handed to the engine as many at a time as it runs, so that a long list leaves the queue to others.

    Raises:
        LlmcError: One of them is wrong, or failed.
        ClientGone: Nobody waits for the answer any more.
    """
    gone, began, most = client_gone(), time.monotonic(), service.engine.limits.max_sequences
    for request in requests:
        service.engine.check(request)
    found: list[Logits] = []
    for begin in range(0, len(requests), most):
        handle = service.submit(model, *requests[begin : begin + most])
        events = list(wait(service, handle, gone, began=began))
        vectors = {event.choice: event.vector for event in events if event.vector is not None}
        found += [vectors[choice] for choice in range(handle.choices)]
    return found


def usage(requests: Sequence[Request]) -> dict[str, int]:
    """OpenAI's counts of tokens."""
    count = sum(len(request.prompt) for request in requests)
    return {"prompt_tokens": count, "total_tokens": count}
