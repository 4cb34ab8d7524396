"""Adapters beside a served model: each request in a mixed batch gets what PEFT's own model computes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake
import numpy as np
import packed_folders
import pytest
import tiny
import torch
from adapters import ADAPTERS, make
from click.testing import CliRunner
from flask.testing import FlaskClient

from llmc.adapter import Adapter, joined, kind_of, separate
from llmc.builders import ort as builder
from llmc.checkpoint import Checkpoint
from llmc.converters import lora
from llmc.errors import NotFoundError, UserError
from llmc.runtime import Chunk
from llmc.serve.app import create_app
from llmc.serve.engine import Engine
from llmc.serve.opening import Settings, open_service
from llmc.serve.request import Request
from llmc.serve.runners import open_runner
from llmc.serve.service import Service
from llmc.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")

Folder = Callable[[str], Path]
MakeEngine = Callable[..., Engine]
# Base -> adapters that stand beside it at a time; of other ranks, modules and layers each.
SETS = {
    "llama": ["lora", "patterns", "one-layer"],
    "qwen2": ["all-linear"],
    "qwen3": ["rslora"],
    "gpt2": ["conv1d"],
    "bloom": ["fused-by-heads"],
    "glm": ["fused-mlp"],
    "mixtral": ["experts-left-alone"],
}


class Opened:
    """A base, its engine, and its adapters by name; "" is the base itself."""

    def __init__(self, base: str, folder: Path, source: Path, checkpoint: Path) -> None:
        spec = Checkpoint(checkpoint).spec
        self.models: dict[str, Any] = {"": tiny.TINY[base].build()}
        self.folders = {name: folder / name for name in SETS[base]}
        for name, at in self.folders.items():
            self.models[name] = make(name, source, at)
        self.adapters = [lora.read(name, at, spec) for name, at in self.folders.items()]
        self.engine = folder / "engine"
        builder.build(checkpoint, self.engine, max_length=96, lora=True)

    def logits(self, name: str, tokens: list[int]) -> Any:
        with torch.no_grad():
            return self.models[name](torch.tensor([tokens])).logits[0].numpy()

    def greedy(self, name: str, prompt: list[int], count: int) -> list[int]:
        text = list(prompt)
        for _ in range(count):
            text.append(int(self.logits(name, text)[-1].argmax()))
        return text[len(prompt) :]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, tiny_source: Folder, tiny_checkpoint: Folder) -> Any:
    made: dict[str, Opened] = {}

    def get(base: str) -> Opened:
        if base not in made:
            folder = tmp_path_factory.mktemp(base)
            made[base] = Opened(base, folder, tiny_source(base), tiny_checkpoint(base))
        return made[base]

    return get


@pytest.mark.parametrize("base", SETS)
def test_a_mixed_batch_is_what_peft_computes(base: str, opened: Callable[[str], Opened]) -> None:
    """Prefill in pieces, then decoding side by side, each with its own adapter and some with none."""
    case = opened(base)
    runner = open_runner(case.engine, threads=1, max_sequences=6, adapters=case.adapters)
    names = ["", *case.folders, "", *list(case.folders)[:1]]
    texts = [tiny.tokens(5 + index, seed=index) for index in range(len(names))]
    assert any(ADAPTERS[name][0] == base for name in case.folders)
    for index, (name, text) in enumerate(zip(names, texts, strict=True)):
        runner.claim(index, np.array(text), name)
        for begin, end in ((0, 3), (3, len(text))):
            (rows,) = runner.step([Chunk(index, begin, np.array(text[begin:end]), end - begin, adapter=name)])
            np.testing.assert_allclose(rows, case.logits(name, text)[begin:end], atol=2e-4, rtol=0)
    for step in range(4):
        # The batch grows smaller, so that its adapters change.
        alive = range(step, len(names))
        for index in alive:
            texts[index].append(int(tiny.tokens(1, seed=50 + index + step)[0]))
        chunks = [Chunk(i, len(texts[i]) - 1, np.array(texts[i][-1:]), 1, adapter=names[i]) for i in alive]
        for index, rows in zip(alive, runner.step(chunks), strict=True):
            np.testing.assert_allclose(rows[0], case.logits(names[index], texts[index])[-1], atol=2e-4, rtol=0)
    runner.close()


def test_adapters_differ_from_their_base(opened: Callable[[str], Opened]) -> None:
    case = opened("llama")
    rows = [case.logits(name, tiny.tokens(9))[-1] for name in case.models]
    assert min(np.abs(a - b).max() for i, a in enumerate(rows) for b in rows[:i]) > 0.1


@pytest.fixture
def served(opened: Callable[[str], Opened]) -> Iterator[tuple[Opened, FlaskClient, Service]]:
    case = opened("llama")
    settings = Settings(name="tiny", threads=1, max_sequences=4, max_step_tokens=8)
    service = open_service(case.engine, settings, case.adapters)
    service.engine.start()
    yield case, create_app(service).test_client(), service
    service.engine.close()


def test_models_of_one_server(served: tuple[Opened, FlaskClient, Service]) -> None:
    """All at once over HTTP, the same prompt for all: nothing of one is reused for another."""
    case, client, service = served
    listed = client.get("/v1/models").get_json()["data"]
    assert [each["id"] for each in listed] == ["tiny", *case.folders]
    assert [each.get("parent") for each in listed] == [None, "tiny", "tiny", "tiny"]
    assert client.get("/v1/models/patterns").get_json()["parent"] == "tiny"
    prompt = tiny.tokens(20)
    for _ in range(2):
        handles = {name: service.submit(name or "tiny", Request(tuple(prompt), max_tokens=8)) for name in case.models}
        for name, handle in handles.items():
            text = "".join(event.text for event in handle.events(60))
            assert text == service.tokenizer.decode(case.greedy(name, prompt, 8)), name
            handle.cancel()
    assert handle.cached_tokens == 19, "each reuses its own"
    for name in case.models:
        body = {"model": name or "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0}
        answer = client.post("/v1/completions", json=body).get_json()
        assert answer["model"] == (name or "tiny")
        assert answer["choices"][0]["text"] == service.tokenizer.decode(case.greedy(name, prompt, 8))
        found = client.post("/v1/embeddings", json={"model": name or "tiny", "input": [prompt]}).get_json()
        assert found["model"] == (name or "tiny")
        base = getattr(case.models[name], "base_model", None)
        decoder = case.models[name].base_model if not name else base.model.model
        with torch.no_grad():
            state = decoder(torch.tensor([prompt])).last_hidden_state[0, -1].numpy()
        np.testing.assert_allclose(found["data"][0]["embedding"], state / np.linalg.norm(state), atol=1e-4)
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 1}),
    ):
        assert client.post(path, json=body | {"model": "lora"}).get_json()["model"] == "lora"
        assert client.post(path, json=body | {"model": "other"}).status_code == 404
    with pytest.raises(NotFoundError, match="'tiny', 'lora', 'patterns', 'one-layer'"):
        service.check_model("other")


def test_which_adapters_have_work(make_engine: MakeEngine, tokenizer: Tokenizer) -> None:
    """vLLM's gauge; and a text of the toy model with an adapter, whose cache nobody else reads."""
    runner = fake.FakeRunner(max_sequences=1)
    engine = make_engine(runner)
    service = Service(engine, "toy", 1, adapters=("a", "b"))
    client = create_app(service).test_client()
    prompt = tuple(tiny.tokens(9))
    for name in ("toy", "a", "b", "a"):
        handle = service.submit(name, Request(prompt, max_tokens=5, cache_salt="a\0" if name == "toy" else ""))
        text = "".join(event.text for event in handle.events(30))
        known = [*name.encode(), *prompt] if name != "toy" else list(prompt)
        assert text == tokenizer.decode(fake.greedy(known, 5))
    assert handle.cached_tokens == 8
    runner.gate.clear()
    handles = [service.submit(name, Request(prompt, max_tokens=5)) for name in ("a", "b")]
    try:
        import time

        deadline = time.monotonic() + 5
        while engine.adapters != ({"a"}, {"b"}) and time.monotonic() < deadline:
            time.sleep(0.01)
        text = client.get("/metrics").get_data(as_text=True)
        wanted = 'llmc:lora_requests_info{max_lora="2",running_lora_adapters="a",waiting_lora_adapters="b"}'
        assert wanted in text
    finally:
        runner.gate.set()
        for handle in handles:
            list(handle.events(30))


@pytest.mark.parametrize("in_act_order", [False, True])
def test_a_quantized_base(
    in_act_order: bool, tmp_path: Path, opened: Callable[[str], Opened], tiny_source: Folder, tiny_checkpoint: Folder
) -> None:
    """What an adapter adds is not rounded with its base, nor of inputs in its base's order."""
    from llmc.converters.convert import convert
    from llmc.model import load
    from llmc.quant.quantize import quantize
    from llmc.recipe import QuantRecipe, WeightFormat

    case = opened("llama")
    if in_act_order:
        convert(packed_folders.in_act_order(tiny_source("llama"), tmp_path / "packed"), tmp_path / "small")
    else:
        recipe = QuantRecipe(algorithm="rtn", weights=WeightFormat(bits=4, group_size=32))
        quantize(tiny_checkpoint("llama"), tmp_path / "small", recipe)
    builder.build(tmp_path / "small", tmp_path / "engine", max_length=64, arithmetic="float32", lora=True)
    decoder = load(Checkpoint(tmp_path / "small"))
    adapter = case.adapters[1]
    with torch.no_grad():
        for module, (a, b) in adapter.factors.items():
            decoder.get_parameter(f"{module}.weight").add_(torch.from_numpy((a.T @ b).T))
        tokens = np.array(tiny.tokens(30))
        wanted = decoder(torch.from_numpy(tokens)[None])[0].numpy()
    runner = open_runner(tmp_path / "engine", threads=1, max_sequences=1, adapters=case.adapters)
    runner.claim(1, tokens)
    (rows,) = runner.step([Chunk(1, 0, tokens, 30, adapter=adapter.name)])
    runner.close()
    np.testing.assert_allclose(rows, wanted, atol=2e-4)


def test_what_is_refused_at_the_start(opened: Callable[[str], Opened], tmp_path: Path, tiny_checkpoint: Folder) -> None:
    case = opened("llama")
    builder.build(tiny_checkpoint("llama"), tmp_path / "plain", max_length=64)
    with pytest.raises(UserError, match="build-engine --lora"):
        open_runner(tmp_path / "plain", adapters=case.adapters)
    wrong = Adapter("wrong", {"layers.9.attn.q": case.adapters[0].factors["layers.0.attn.q"]})
    with pytest.raises(UserError, match=r"'wrong' changes layers\.9\.attn\.q"):
        open_runner(case.engine, adapters=[wrong])
    for given, word in (
        (("a",), "NAME=FOLDER"),
        (("=b",), "NAME=FOLDER"),
        (("a b=c",), "NAME=FOLDER"),
        (("a=b", "a=c"), "another model"),
        (("tiny=b",), "another model"),
    ):
        with pytest.raises(UserError, match=word):
            assert not Settings(name="tiny", lora=given).adapters
    with pytest.raises(UserError, match="the model itself"):
        open_service(case.engine, Settings(lora=("engine=x",)))


def test_the_command_reads_adapters_without_torch(opened: Callable[[str], Opened], tmp_path: Path) -> None:
    """As the worker of `llmc serve` does, on a host that has no PyTorch."""
    case = opened("llama")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from llmc.converters import lora\nfrom llmc.engine import describe\n"
        "engine, adapter = map(Path, sys.argv[1:])\n"
        "print(len(lora.read('x', adapter, describe(engine).spec).factors))\n"
    )
    command = [sys.executable, "-c", code, str(case.engine), str(case.folders["lora"])]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "4"
    from llmc.commands.serve import command as serve

    result = CliRunner().invoke(serve, [str(case.engine), "--lora", "nothing"])
    assert isinstance(result.exception, UserError)


@pytest.mark.slow
def test_llmc_serve_with_adapters(opened: Callable[[str], Opened]) -> None:
    """The command and the openai client, unchanged."""
    from openai import OpenAI

    from llmc.serve.local import serving

    case = opened("llama")
    options = [part for name, folder in case.folders.items() for part in ("--lora", f"{name}={folder}")]
    prompt = tiny.tokens(12)
    with (
        serving(case.engine, "--name", "tiny", *options) as url,
        OpenAI(base_url=f"{url}/v1", api_key="none") as openai,
    ):
        assert [model.id for model in openai.models.list()] == ["tiny", *case.folders]
        tokenizer = Tokenizer.load(case.engine)
        for name in case.models:
            found = openai.completions.create(model=name or "tiny", prompt=prompt, max_tokens=6, temperature=0)
            assert found.choices[0].text == tokenizer.decode(case.greedy(name, prompt, 6))


def test_names_there_and_back() -> None:
    modules = ["layers.3.attn.q", "layers.3.attn.k", "layers.3.attn.v"]
    assert joined(modules) == "layers.3.attn.q+k+v"
    assert separate("layers.3.attn.q+k+v") == modules
    assert kind_of("layers.3.attn.q+k+v") == "attn.q+k+v"
