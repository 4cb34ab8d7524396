"""How fast any server of OpenAI's API answers streaming clients, as its users see it.

    closed loop   as many clients as asked for, each sends its next request when the last is answered
    open loop     requests come at random at a given rate (a Poisson process), however long the answers take

The time to the first token is from sending to the first text; the time between tokens from one event to the next. One
thread a client and the standard library's HTTP: on a loaded machine this client's own work is in the figures.

Knows: HTTP and the stream of a completion. Does not know: llmc's engine.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from llmc.errors import LlmcError, UserError

WORDS = (  # noqa: SIM905
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend"
).split()
PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the server.

    Attributes:
        url: Where it is, without "/v1".
        model: The name to ask for; None takes the first that it lists.
        prompt_tokens: Fewest and most words of a prompt, which are about as many tokens.
        output_tokens: Fewest and most tokens to ask for.
        requests: How many; each has another prompt. Lengths are drawn evenly, the same ones every time.
        ignore_eos: Ask for all of the tokens, in the way of vLLM and llama.cpp.
    """

    url: str
    model: str | None = None
    api_key: str | None = None
    prompt_tokens: tuple[int, int] = (128, 128)
    output_tokens: tuple[int, int] = (64, 64)
    requests: int = 32
    ignore_eos: bool = True
    timeout: float = 600.0


@dataclass(slots=True)
class Answer:
    """What one client saw; times in seconds since it sent its request."""

    arrivals: list[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


def find_model(load: Load) -> str:
    """The name to ask for.

    Raises:
        UserError: Nobody answers there, or not in OpenAI's way.
    """
    if load.model is not None:
        return load.model
    try:
        connection = _connect(load)
        connection.request("GET", _path(load, "/v1/models"), headers=_headers(load))
        response = connection.getresponse()
        data = response.read()
        connection.close()
        return str(json.loads(data)["data"][0]["id"])
    except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{load.url} does not say which models it serves: {type(error).__name__}: {error}") from None


def measure(load: Load, *, concurrency: int | None = None, rate: float | None = None) -> dict[str, Any]:
    """Send all requests, and sum up; exactly one of `concurrency` (clients) and `rate` (requests a second) is given.

    Raises:
        UserError: Nobody answers.
        LlmcError: No request succeeded; says why the first failed.
    """
    model = find_model(load)
    _ask(load, model, -1)
    began = time.perf_counter()
    answers = _closed(load, model, concurrency) if concurrency is not None else _open(load, model, rate or 1.0)
    took = time.perf_counter() - began
    good = [answer for answer in answers if answer.error is None]
    if not good:
        raise LlmcError(f"no request succeeded at {load.url}: {answers[0].error}")
    return {"concurrency": concurrency, "rate": rate, **_summary(good, took), "failed": len(answers) - len(good)}


def _closed(load: Load, model: str, concurrency: int) -> list[Answer]:
    numbers = iter(range(load.requests))
    lock = threading.Lock()
    answers: list[Answer] = []

    def client() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            answers.append(_ask(load, model, number))

    _run([threading.Thread(target=client) for _ in range(concurrency)])
    return answers


def _open(load: Load, model: str, rate: float) -> list[Answer]:
    gaps = random.Random(0)  # noqa: S311
    answers: list[Answer] = []
    threads = []
    due = time.perf_counter()
    for number in range(load.requests):
        time.sleep(max(0.0, due - time.perf_counter()))
        threads.append(threading.Thread(target=lambda each=number: answers.append(_ask(load, model, each))))
        threads[-1].start()
        due += gaps.expovariate(rate)
    for thread in threads:
        thread.join()
    return answers


def _run(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _ask(load: Load, model: str, number: int) -> Answer:
    answer = Answer()
    draw = random.Random(number)  # noqa: S311
    words = draw.choices(WORDS, k=draw.randint(*load.prompt_tokens))
    body: dict[str, Any] = {
        "model": model,
        "prompt": " ".join(words),
        "max_tokens": draw.randint(*load.output_tokens),
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if load.ignore_eos:
        body["ignore_eos"] = True
    connection = _connect(load)
    began = time.perf_counter()
    try:
        connection.request("POST", _path(load, "/v1/completions"), json.dumps(body), _headers(load))
        response = connection.getresponse()
        if response.status != http.client.OK:
            said = response.read(500).decode("utf-8", "replace")
            answer.error = f"status {response.status}: {said}"
        else:
            _read(response, answer, began)
    except (OSError, http.client.HTTPException, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    answer.end = time.perf_counter() - began
    return answer


def _read(response: http.client.HTTPResponse, answer: Answer, began: float) -> None:
    done = False
    for line in response:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if done := data == b"[DONE]":
            break
        event = json.loads(data)
        if "error" in event:
            raise ValueError(str(event["error"])[:500])
        if event.get("choices") and event["choices"][0].get("text"):
            answer.arrivals.append(time.perf_counter() - began)
        if usage := event.get("usage"):
            answer.prompt_tokens, answer.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    if not done:
        raise ValueError("the stream broke off")
    answer.output_tokens = answer.output_tokens or len(answer.arrivals)
    if not answer.arrivals:
        raise ValueError("an answer without text")


def _summary(answers: Sequence[Answer], took: float) -> dict[str, Any]:
    tokens = sum(answer.output_tokens for answer in answers)
    gaps = [gap for answer in answers for gap in np.diff(answer.arrivals)]
    return {
        "requests": len(answers),
        "seconds": took,
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "output_tokens": tokens,
        "output_tokens_per_second": tokens / took,
        "requests_per_second": len(answers) / took,
        "time_to_first_token": _percentiles([answer.arrivals[0] for answer in answers]),
        "inter_token_latency": _percentiles(gaps),
        "request_latency": _percentiles([answer.end for answer in answers]),
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles in milliseconds; empty when there is nothing (answers of a single piece)."""
    if not len(seconds):
        return {}
    found = {f"p{each}": 1000 * float(np.percentile(seconds, each)) for each in PERCENTILES}
    return {"mean": 1000 * float(np.mean(seconds)), **found}


def _connect(load: Load) -> http.client.HTTPConnection:
    parts = urlsplit(load.url)
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        raise UserError(f"'{load.url}' is not the address of a server: http://HOST:PORT")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.hostname, parts.port, timeout=load.timeout)


def _path(load: Load, path: str) -> str:
    return urlsplit(load.url).path.rstrip("/").removesuffix("/v1") + path


def _headers(load: Load) -> dict[str, str]:
    key = {} if load.api_key is None else {"Authorization": f"Bearer {load.api_key}"}
    return {"Content-Type": "application/json", **key}
