"""Parity of two sides, made up and of PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from llmc.errors import CheckpointError, UnsupportedModelError, UserError
from llmc.evaluate.modules import open_checkpoint, open_hugging_face
from llmc.evaluate.parity import Array, Parity, Reading, Scores, Side, compare
from llmc.evaluate.perplexity import log_softmax
from llmc.evaluate.samples import TEXTS, pieces
from llmc.tokenizer import Tokenizer

RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((40, 7)).astype(np.float32)
STATES = [RNG.standard_normal((40, 3)).astype(np.float32) for _ in range(4)]
TOKENS = RNG.integers(0, 7, 40)


def made(logits: Array, states: list[Array] | None = None) -> Side:
    """A side that says what it is told to."""
    return Side(
        "made",
        "engine",
        close=lambda: None,
        vocab_size=7,
        read=lambda tokens, with_states: Reading(logits, (states or []) if with_states else ()),
        has_states=states is not None,
    )


def between(a: Side, b: Side, tolerance: float = 1e-4) -> Parity:
    return compare(a, b, [TOKENS], tolerance=tolerance)


def test_figures_are_their_definitions() -> None:
    import torch

    other = LOGITS + 0.01 * RNG.standard_normal(LOGITS.shape).astype(np.float32)
    found = between(made(LOGITS), made(other))
    figures = found.figures()
    distance = np.abs(LOGITS.astype(np.float64) - other)
    assert figures["max_difference"] == distance.max()
    assert figures["mean_difference"] == pytest.approx(distance.mean())
    assert figures["relative_difference"] == pytest.approx(distance.max() / np.abs(LOGITS).max())
    p, q = (torch.log_softmax(torch.from_numpy(each).double(), -1) for each in (LOGITS, other))
    assert figures["kl"] == pytest.approx(
        torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").item()
    )
    assert figures["top1"] == float((LOGITS.argmax(1) == other.argmax(1)).mean())
    assert figures["tokens"] == 40
    assert figures["layers"] is None
    assert not figures["within"]
    assert between(made(LOGITS), made(other), tolerance=figures["relative_difference"]).is_within


def test_nothing_differs_from_itself() -> None:
    figures = between(made(LOGITS, STATES), made(LOGITS, STATES), tolerance=0).figures()
    assert (figures["max_difference"], figures["kl"], figures["top1"], figures["first_layer"]) == (0, 0, 1, None)
    assert figures["layers"] == dict.fromkeys(["embeddings", "layer 0", "layer 1", "layer 2"], 0.0)
    assert figures["within"]


def test_the_first_layer_that_differs() -> None:
    changed = [*STATES[:2], STATES[2].copy(), STATES[3] + 1]
    changed[2][17] *= 1.5
    found = between(made(LOGITS, STATES), made(LOGITS, changed))
    assert found.figures()["first_layer"] == "layer 1"
    assert found.states is not None
    assert found.states[:3] == [0, 0, pytest.approx(0.5)]


@pytest.mark.parametrize("place", ["logits", "states"])
def test_a_nan_is_never_within(place: str) -> None:
    logits, states = LOGITS.copy(), [state.copy() for state in STATES]
    (logits if place == "logits" else states[3])[39, 2] = math.nan
    for a, b in ((made(logits, states), made(LOGITS, STATES)), (made(LOGITS, STATES), made(logits, states))):
        figures = between(a, b, tolerance=1e9).figures()
        assert figures["within"] == (place == "states")
        assert figures["first_layer"] == (None if place == "logits" else "layer 2")
        assert (figures["max_difference"] if place == "logits" else figures["layers"]["layer 2"]) is None


def test_what_a_server_says_is_what_logits_say() -> None:
    rows = log_softmax(LOGITS)
    scores = Scores(
        [str(token) for token in TOKENS],
        [float(rows[at, TOKENS[at + 1]]) for at in range(39)],
        [{str(token): float(rows[at, token]) + 0.25 * (token == 2) for token in range(7)} for at in range(39)],
    )
    server = Side("http://here", "server", close=lambda: None, score=lambda piece: scores)
    for a, b in ((made(LOGITS), server), (server, made(LOGITS))):
        figures = compare(a, b, [TOKENS], tolerance=1e-4).figures()
        assert figures["compared"] == "log-probabilities"
        assert figures["tokens"] == 39
        assert figures["max_difference"] == 0
        assert figures["top_max_difference"] == pytest.approx(0.25)
        assert figures["kl"] is None
        assert figures["top1"] == np.mean((rows[:39] + 0.25 * (np.arange(7) == 2)).argmax(1) == rows[:39].argmax(1)) < 1
    other = replace(server, score=lambda piece: Scores(["x", *scores.words[1:]], scores.logprobs, scores.top))
    with pytest.raises(UserError, match="different tokenizers"):
        compare(server, other, [TOKENS], tolerance=1e-4)


def test_different_shapes_are_said() -> None:
    with pytest.raises(UserError, match="logits of 7 tokens, made of 6"):
        between(made(LOGITS), made(LOGITS[:, :6]))
    with pytest.raises(UserError, match="3 layers of width 3, made 2 of width 3"):
        between(made(LOGITS, STATES), made(LOGITS, STATES[:3]))
    with pytest.raises(UserError, match="made chooses among 7 tokens, made among 8"):
        pieces(made(LOGITS), replace(made(LOGITS), vocab_size=8), None, window=64, max_tokens=None)


@pytest.mark.parametrize("name", ["qwen2", "opt-350m", "gpt2", "bloom", "mixtral", "glm4", "llama-longrope"])
def test_transformers_and_the_reference_agree_layer_by_layer(
    name: str, tiny_source: Callable[[str], Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    a = open_hugging_face(tiny_source(name), name="hf", tokenizer=Tokenizer.load(tiny_source(name)))
    b = open_checkpoint(tiny_checkpoint(name), name="checkpoint", tokenizer=Tokenizer.load(tiny_checkpoint(name)))
    given = pieces(a, b, None, window=64, max_tokens=None)
    assert len(given) == len(TEXTS) + 4
    found = compare(a, b, given, tolerance=1e-5)
    assert found.is_within
    assert found.first is None
    assert found.states is not None
    assert len(found.states) == tiny.TINY[name].build().config.num_hidden_layers + 1
    assert max(found.states) > 0 or name == "opt-350m"


def test_tokenizers_that_differ_are_said(tiny_source: Callable[[str], Path]) -> None:
    tokenizer, changed = (Tokenizer.load(tiny_source("qwen2")) for _ in range(2))
    changed.backend.add_special_tokens(["quick"])
    a, b = (replace(made(LOGITS), name=name, tokenizer=each) for name, each in (("A", tokenizer), ("B", changed)))
    with pytest.raises(UserError, match="A and B have different tokenizers: at token"):
        pieces(a, b, None, window=64, max_tokens=None)


def test_without_tokenizers_random_tokens_are_left() -> None:
    a, b = made(LOGITS), replace(made(LOGITS), max_length=20)
    given = pieces(a, b, None, window=64, max_tokens=None)
    assert [len(piece) for piece in given] == [20] * 4
    assert all(
        np.array_equal(one, two) for one, two in zip(given, pieces(a, b, None, window=64, max_tokens=None), strict=True)
    )
    with pytest.raises(UserError, match="neither made nor made has a tokenizer"):
        pieces(a, b, "a text", window=64, max_tokens=None)


def test_texts_for_two_servers_fit() -> None:
    server = Side("http://here", "server", close=lambda: None, max_length=30)
    given = pieces(server, server, None, window=64, max_tokens=None)
    assert all(isinstance(piece, str) and len(piece.encode()) <= 26 for piece in given)
    assert "".join(map(str, given))[:30] == TEXTS[0][:30]
    assert pieces(server, server, "abcdef" * 10, window=64, max_tokens=40) == [
        "abcdef" * 4 + "ab",
        "cdef" + "abcdef" * 1 + "abcd",
    ]


def test_folders_that_transformers_cannot_load(tmp_path: Path, tiny_source: Callable[[str], Path]) -> None:
    import shutil

    folder = tmp_path / "hf"
    shutil.copytree(tiny_source("llama"), folder)
    config = folder / "config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tensors are missing or misshapen, the first is model\.layers\.2"):
        open_hugging_face(folder, name="hf")
    config.write_text(text.replace('"llama"', '"quack"'), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match=r"cannot load .*a checkpoint, or an export of one"):
        open_hugging_face(folder, name="hf")
