"""Packing: nothing lost, nothing twice, and no document sees another."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from llmc.trainers.data import indexed
from llmc.trainers.data.packing import IGNORE, Rows

EOS = 0


def rows_of(folder: Path, documents: list[list[int]], length: int) -> Rows:
    indexed.write(folder / "t", documents, vocab_size=300)
    return Rows(indexed.Tokens(folder / "t"), length, padding=EOS)


@given(
    documents=st.lists(st.lists(st.integers(1, 299), max_size=40).map(lambda ids: [*ids, EOS]), min_size=1, max_size=8),
    length=st.integers(2, 24),
)
def test_every_token_is_in_one_row_once(documents: list[list[int]], length: int) -> None:
    stream = [token for document in documents for token in document]
    begins = {sum(map(len, documents[:index])) for index in range(len(documents))}
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(Path(folder), documents, length)
        assert len(rows) == -(-len(stream) // length)
        packed = [rows[index] for index in range(len(rows))]
    ids = torch.cat([row["input_ids"] for row in packed]).tolist()
    labels = torch.cat([row["labels"] for row in packed]).tolist()
    assert ids == stream + [EOS] * (len(ids) - len(stream))
    assert labels[len(stream) :] == [IGNORE] * (len(ids) - len(stream))
    for place, token in enumerate(stream):
        first_of_document = place in begins and place % length
        assert labels[place] == (IGNORE if first_of_document else token)
    expected = []
    for place in range(len(ids)):
        fresh = place in begins or place % length == 0 or place == len(stream)
        expected.append(0 if fresh else expected[-1] + 1)
    assert torch.cat([row["position_ids"] for row in packed]).tolist() == expected


def test_a_row_past_the_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IndexError):
        rows_of(tmp_path, [[1, 2, EOS]], 4)[1]


def test_a_packed_document_gets_the_logits_it_gets_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            initializer_range=0.3,
        )
    ).eval()
    documents = [[5, 9, 33, EOS], [7, 8, 9, 10, 11, EOS], [60, EOS]]
    rows = rows_of(tmp_path, documents, 16)
    assert len(rows) == 1
    with torch.no_grad():
        batch = {name: values[None] for name, values in rows[0].items()}
        packed = model(**batch, use_cache=False)
        alone = [model(torch.tensor([document]), use_cache=False).logits[0] for document in documents]
        together = model(batch["input_ids"], use_cache=False).logits[0, :12]
    torch.testing.assert_close(packed.logits[0, :12], torch.cat(alone), rtol=0, atol=1e-5)
    assert (together - torch.cat(alone)).abs().max() > 0.1, "the documents would not have shown a leak"
    losses = [
        torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(document[1:]), reduction="sum")
        for logits, document in zip(alone, documents, strict=True)
    ]
    torch.testing.assert_close(packed.loss, sum(losses, torch.zeros(())) / (12 - 3), rtol=0, atol=1e-5)
