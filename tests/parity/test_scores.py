"""Scoring heads from end to end: transformers, the reference decoder, the engine, the server and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file

from llmc.builders import ort as builder
from llmc.checkpoint import Checkpoint
from llmc.converters import export, hf
from llmc.errors import LlmcError, UserError
from llmc.evaluate import scores
from llmc.model import load
from llmc.serve.app import create_app
from llmc.serve.opening import Settings, open_service
from llmc.serve.runners import open_runner
from llmc.spec import Score

CASES = {
    "llama": 1,
    "qwen2": 1,
    "qwen2.5-tied": 3,
    "qwen3": 2,
    "mistral-window": 1,
    "mixtral": 1,
    "glm": 2,
    "glm4": 1,
    "gemma3": 2,
    "gemma3-tied": 1,
    "qwen2-moe": 1,
    "qwen3-moe": 3,
    "gpt2": 2,
    "opt": 1,
    "opt-350m": 2,
    "bloom": 1,
}
# Among these are texts that end with the padding token, which is not what is scored then, and one that is nothing else.
PROMPTS = [*(tiny.tokens(count, count) for count in (1, 2, 9, 40)), [*tiny.tokens(7), 0], [5, 0, 6, 0, 0], [0, 0]]


def save(name: str, labels: int, folder: Path, dtype: Any = torch.float32) -> Any:
    """A tiny model with a scoring head as a Hugging Face folder; returns it."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    case = tiny.TINY[name]
    config = AutoConfig.for_model(case.model_type, **{**case.base, **case.config}, num_labels=labels)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    body, plain = dict(model.named_parameters()), dict(case.build().named_parameters())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in body.items():
            drawn = key.removesuffix(".weight") == "score" or key not in plain
            parameter.copy_(torch.randn(parameter.shape, generator=generator) if drawn else plain[key])
    model.to(dtype).save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()


def theirs(model: Any, ids: list[int]) -> list[float]:
    with torch.no_grad():
        found: list[float] = model(torch.tensor([ids])).logits[0].tolist()
    return found


@pytest.mark.parametrize("name", CASES)
def test_from_transformers_to_the_server_and_back(name: str, tmp_path: Path) -> None:
    labels = CASES[name]
    model = save(name, labels, tmp_path / "hf", torch.bfloat16)
    assert model.config.pad_token_id == 0
    wanted = [theirs(model, ids) for ids in PROMPTS]
    checkpoint = hf.convert(tmp_path / "hf", tmp_path / "checkpoint")
    assert checkpoint.spec.score == Score(labels=labels, pad=0)
    decoder = load(checkpoint)
    with torch.inference_mode():
        rows = decoder(torch.tensor([PROMPTS[3]]))[0]
    assert rows.shape == (40, labels)
    np.testing.assert_allclose(rows[-1].numpy(), wanted[3], atol=1e-5, rtol=1e-5)

    export.export("hf", tmp_path / "checkpoint", tmp_path / "again")
    original, again = (load_file(tmp_path / each / "model.safetensors") for each in ("hf", "again"))
    assert original.keys() == again.keys()
    assert all(original[key].tobytes() == again[key].tobytes() for key in original)
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "hf" / "config.json").read_text()

    builder.build(tmp_path / "checkpoint", tmp_path / "engine", max_length=64)
    runner = open_runner(tmp_path / "engine", threads=1, max_sequences=1)
    from llmc.prompt import without_padding

    offline = [scores.scores(runner, without_padding(ids, 0)) for ids in PROMPTS]
    runner.close()
    np.testing.assert_allclose(offline, wanted, atol=1e-4, rtol=1e-5)
    service = open_service(tmp_path / "engine", Settings(name="judge", threads=1, max_sequences=3, max_step_tokens=5))
    service.engine.start()
    try:
        answer = create_app(service).test_client().post("/v1/score", json={"input": PROMPTS}).get_json()
    finally:
        service.engine.close()
    online = [each["score"] if labels > 1 else [each["score"]] for each in answer["data"]]
    np.testing.assert_allclose(online, offline, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"deterministic": True}, {"speculate": "ngram"}], ids=str)
def test_scores_with_the_options_of_texts(options: Any, tmp_path: Path) -> None:
    """Blocks and drafts change no score, however many are asked for at a time and whatever is in the cache."""
    name = next(iter(CASES))
    model = save(name, CASES[name], tmp_path / "hf")
    hf.convert(tmp_path / "hf", tmp_path / "checkpoint")
    builder.build(tmp_path / "checkpoint", tmp_path / "engine", max_length=64)
    settings = Settings(name="judge", threads=1, max_sequences=3, **options)
    service = open_service(tmp_path / "engine", settings)
    service.engine.start()
    try:
        client = create_app(service).test_client()
        alone = [client.post("/v1/score", json={"input": [ids]}).get_json()["data"][0]["score"] for ids in PROMPTS]
        for _ in range(2):
            answer = client.post("/v1/score", json={"input": PROMPTS}).get_json()["data"]
            together = [each["score"] for each in answer]
            np.testing.assert_allclose(together, alone, atol=0 if "deterministic" in options else 1e-5, rtol=0)
    finally:
        service.engine.close()
    wanted = np.array([theirs(model, ids) for ids in PROMPTS])
    np.testing.assert_allclose(np.array(alone).reshape(wanted.shape), wanted, atol=1e-4)


def test_a_config_that_is_written_reads_back(tmp_path: Path) -> None:
    """Also without the authors' config, and for transformers."""
    from transformers import AutoModelForSequenceClassification

    model = save("qwen2.5-tied", 3, tmp_path / "hf")
    checkpoint = hf.convert(tmp_path / "hf", tmp_path / "checkpoint")
    from llmc.converters import families

    family = families.by_name("qwen2")
    written = families.write_config(family, checkpoint.spec)
    assert families.read_spec(json.loads(json.dumps(written)), "config") == (family, checkpoint.spec)
    export.export("hf", tmp_path / "checkpoint", tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    (tmp_path / "again" / "config.json").write_text(json.dumps(written | {"dtype": config["dtype"]}))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert theirs(again, PROMPTS[3]) == theirs(model, PROMPTS[3])


@pytest.mark.parametrize("kind", ["gguf", "paddle"])
def test_formats_without_a_place_for_it_say_so(kind: str, tmp_path: Path) -> None:
    save("llama", 1, tmp_path / "hf")
    hf.convert(tmp_path / "hf", tmp_path / "checkpoint")
    with pytest.raises(LlmcError, match="scoring head"):
        export.export(kind, tmp_path / "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "awq"])
def test_a_quantized_scorer_keeps_its_head(algorithm: str, tmp_path: Path) -> None:
    from llmc.quant.quantize import quantize
    from llmc.recipe import QuantRecipe, WeightFormat

    model = save("llama", 1, tmp_path / "hf")
    hf.convert(tmp_path / "hf", tmp_path / "checkpoint")
    recipe = QuantRecipe(algorithm=algorithm, weights=WeightFormat(bits=8, group_size=32))

    def judge(*_: Any) -> Any:
        raise AssertionError("a scorer has no perplexity")

    quantize(tmp_path / "checkpoint", tmp_path / "small", recipe, judge=judge)
    with pytest.raises(UserError, match="gives scores"):
        quantize(tmp_path / "checkpoint", tmp_path / "none", recipe, judge=judge, max_increase=0.1)
    small = Checkpoint(tmp_path / "small")
    assert "score.weight" in small
    builder.build(tmp_path / "small", tmp_path / "engine", max_length=64, arithmetic="float32")
    runner = open_runner(tmp_path / "engine", threads=1, max_sequences=1)
    with torch.inference_mode():
        reference = load(small)(torch.tensor([PROMPTS[3]]))[0, -1].tolist()
    found = scores.scores(runner, PROMPTS[3])
    runner.close()
    np.testing.assert_allclose(found, reference, atol=1e-4)
    assert abs(found[0] - theirs(model, PROMPTS[3])[0]) < 0.3


def test_llmc_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's scores and accuracy are transformers', on an engine and on a checkpoint."""
    from click.testing import CliRunner

    from llmc.commands.score import command
    from llmc.prompt import chat_ids
    from llmc.tokenizer import Tokenizer

    monkeypatch.setenv("COLUMNS", "200")
    model = save("llama", 1, tmp_path / "hf")
    hf.convert(tmp_path / "hf", tmp_path / "checkpoint")
    builder.build(tmp_path / "checkpoint", tmp_path / "engine", max_length=128)
    tokenizer = Tokenizer.load(tmp_path / "hf")
    words = ["the quick fox", "lazy dog", "there and the other", "it was in the dog", "over"]
    rows = [{"prompt": "who is it", "chosen": words[i], "rejected": words[i - 1]} for i in range(5)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def truth(answer: str) -> float:
        turns = [{"role": "user", "content": "who is it"}, {"role": "assistant", "content": answer}]
        return theirs(model, chat_ids(tokenizer, turns, add_generation_prompt=False))[0]

    wins = sum(truth(row["chosen"]) > truth(row["rejected"]) for row in rows)
    assert 0 < wins < 5
    for folder in ("engine", "checkpoint"):
        out = tmp_path / "scores.jsonl"
        arguments = [str(tmp_path / folder), str(tmp_path / "pairs.jsonl"), "--json", str(out)]
        result = CliRunner().invoke(command, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert f"chosen over rejected: {wins / 5:.1%} of 5" in result.output
        for row, line in zip(rows, out.read_text().splitlines(), strict=True):
            found = json.loads(line)
            assert found["scores"] == pytest.approx([truth(row["chosen"])], abs=1e-4)
            assert found["rejected"] == pytest.approx([truth(row["rejected"])], abs=1e-4)
    plain = tmp_path / "plain.jsonl"
    plain.write_text(
        json.dumps({"text": words[0]}) + "\n" + json.dumps({"messages": [{"role": "user", "content": "a"}]})
    )
    result = CliRunner().invoke(command, [str(tmp_path / "engine"), str(plain)], catch_exceptions=False)
    assert f"{theirs(model, tokenizer.encode(words[0]))[0]:.4f}"[:-1] in result.output
    plain.write_text('{"text": 5}\n')
    failed = CliRunner().invoke(command, [str(tmp_path / "engine"), str(plain)])
    assert isinstance(failed.exception, UserError)
    assert "row 1" in str(failed.exception)


def test_a_scorer_has_no_perplexity_and_writes_nothing(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    from llmc.evaluate.perplexity import perplexity

    save("llama", 1, tmp_path / "hf")
    hf.convert(tmp_path / "hf", tmp_path / "checkpoint")
    builder.build(tmp_path / "checkpoint", tmp_path / "engine", max_length=64)
    runner = open_runner(tmp_path / "engine", threads=1, max_sequences=1)
    with pytest.raises(UserError, match="gives scores"):
        perplexity(runner, [np.array(tiny.tokens(9))])
    runner.close()
    builder.build(tiny_checkpoint("llama"), tmp_path / "plain", max_length=64)
    runner = open_runner(tmp_path / "plain", threads=1, max_sequences=1)
    with pytest.raises(UserError, match=r"score\.weight"):
        scores.scores(runner, [5])
    runner.close()


def test_what_else_is_said_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llmc verify compares every token's scores with transformers'; llmc inspect and build-engine name the head."""
    from click.testing import CliRunner

    from llmc.commands import build_engine, inspect, verify

    monkeypatch.setenv("COLUMNS", "200")
    save("llama", 3, tmp_path / "hf")
    hf.convert(tmp_path / "hf", tmp_path / "checkpoint")

    def run(command: Any, *arguments: Any) -> str:
        result = CliRunner().invoke(command, [str(each) for each in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    assert "scores of 3 labels" in run(build_engine.command, tmp_path / "checkpoint", tmp_path / "engine")
    for kind in ("checkpoint", "engine"):
        assert "3 labels, of the last token that is not 0" in run(inspect.command, tmp_path / kind)
        assert "within the tolerance" in run(verify.command, tmp_path / "hf", tmp_path / kind)
