"""The engine's loop on real runners: requests that come and go at random get transformers' greedy tokens."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from devices import cpu_as_a_device

from llmc.runtime import Runner
from llmc.serve.engine import Engine
from llmc.serve.request import Request, Sampling
from llmc.tokenizer import Tokenizer

LENGTH = 96
FAMILIES = ["llama", "mistral-window", "qwen2.5-tied", "qwen3"]


def reference(checkpoint: Path, folder: Path) -> Runner:
    from llmc.checkpoint import Checkpoint
    from llmc.evaluate.reference import ReferenceRunner
    from llmc.model import load

    return ReferenceRunner(load(Checkpoint(checkpoint)), max_sequences=5, max_length=LENGTH, cache_tokens=200)


def onnx(checkpoint: Path, folder: Path) -> Runner:
    from llmc.builders import ort as builder
    from llmc.serve.runners import open_runner

    builder.build(checkpoint, folder, max_length=LENGTH)
    return open_runner(folder, threads=1, max_sequences=5, cache_tokens=200)


def onnx_with_a_device_s_cache(checkpoint: Path, folder: Path) -> Runner:
    with pytest.MonkeyPatch.context() as patch:
        cpu_as_a_device(patch)
        return onnx(checkpoint, folder)


def truth(name: str, prompts: list[tuple[int, ...]], counts: list[int], ends: frozenset[int]) -> list[list[int]]:
    import torch

    model = tiny.TINY[name].build()
    found = []
    for prompt, count in zip(prompts, counts, strict=True):
        tokens = list(prompt)
        with torch.no_grad():
            while len(tokens) < len(prompt) + count and (len(tokens) == len(prompt) or tokens[-1] not in ends):
                tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        found.append(tokens[len(prompt) :])
    return found


@pytest.mark.parametrize("make", [reference, onnx, onnx_with_a_device_s_cache])
@pytest.mark.parametrize("name", FAMILIES)
def test_random_arrivals_give_transformers_tokens(
    name: str, make: Callable[[Path, Path], Runner], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint(name)
    tokenizer = Tokenizer.load(checkpoint)
    choose = random.Random(3)
    system = tiny.tokens(20, seed=99)
    # Some begin alike, so that caches are shared; all together do not fit, so that some are preempted or wait.
    prompts = [
        tuple((system if number % 2 else []) + tiny.tokens(choose.randrange(1, 25), seed=number))
        for number in range(14)
    ]
    counts = [choose.randrange(1, 40) for _ in prompts]
    wanted = truth(name, prompts, counts, tokenizer.eos_ids)
    engine = Engine(make(checkpoint, tmp_path / "engine"), tokenizer, max_step_tokens=16)
    engine.start()
    texts: dict[int, str] = {}

    def ask(number: int) -> None:
        time.sleep(random.Random(number).random() * 0.05)
        request = Request(prompts[number], Sampling(temperature=0), counts[number])
        texts[number] = "".join(event.text for event in engine.submit(request).events(60))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    engine.close()
    for number, tokens in enumerate(wanted):
        assert texts[number] == tokenizer.decode(tokens)
    assert engine.stats.failed_steps == 0
    shared: Any = engine.stats.prefix_hits
    assert (shared > 0) == (make is not reference)
