"""A checkpoint as a GGUF file: read back it is the same, and others read what was meant."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_gguf
import tiny_sentencepiece
import tokenizers
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants

from llmc import manifest as manifests
from llmc.checkpoint import Checkpoint
from llmc.converters import gguf_tokenizer, gguf_vocabulary, gguf_writer, hf
from llmc.converters.convert import convert
from llmc.converters.difficult import DIFFICULT
from llmc.converters.gguf_tokenizer import PRE_TOKENIZERS
from llmc.errors import CheckpointError, UnsupportedModelError, UserError
from llmc.spec import Rope, YarnScaling
from llmc.tokenizer import Tokenizer

Folder = Callable[[str], Path]

# What GGUF has no place for, or llama.cpp would compute otherwise -> what the refusal names.
REFUSED = {
    "llama-dynamic": "'position.scaling'",
    "llama-longrope": "'position.scaling'",
    "llama-yarn-mscale": "'position.scaling.beta_fast' = 16.0",
    "llama-yarn-no-truncate": "'position.scaling.truncate' = False",
    "qwen2-window": "'attention.window' = 8",
    "qwen3-bias-window": "'attention.window' = 8",
    "qwen2-moe": "'moe.dense_layers' = [1]",
    "qwen2-moe-window": "'attention.window' = 8",
    "qwen3-moe-sparse": "'moe.renormalise' = False",
    "gpt2-untied": "'mlp.activation' = 'gelu'",
    "glm": "heads of 32",
    "glm-tied": "heads of 64",
    "chatglm3": "heads of 32",
    "chatglm3-32k": "heads of 32",
    "chatglm2-32k": "heads of 32",
    "baichuan-7b": "2 layers",
    "baichuan-13b": "2 layers",
    "baichuan2-7b": "2 layers",
    "baichuan2-13b": "3 layers",
    "opt": "the family 'opt'",
    "gemma3": "'attention.scale'",
    "gemma3-tied": "'attention.scale'",
}
WRITTEN = [name for name in tiny_gguf.CASES if name not in REFUSED]


def made(name: str, folder: Path, dtype: str = "float32") -> Checkpoint:
    case = tiny_gguf.CASES.get(name) or tiny.TINY[name]
    return hf.convert(tiny.save(case, folder / "source", dtype=dtype), folder / "checkpoint")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_reads_back_the_same(name: str, dtype: str, tmp_path: Path) -> None:
    original = made(name, tmp_path, dtype)
    gguf_writer.export(original.folder, tmp_path / "out")
    found = convert(tmp_path / "out", tmp_path / "back", dtype=dtype)
    assert list(found) == list(original)
    for tensor in original:
        assert found[tensor].dtype == original[tensor].dtype
        if original.spec.norm.plus_one and "norm" in tensor:
            # The one is added and taken away again in float32, which rounds the smallest weights.
            near = found[tensor].astype(np.float32), original[tensor].astype(np.float32)
            assert np.allclose(*near, rtol=0.01 if dtype != "float32" else 0, atol=2**-22), tensor
        else:
            assert np.array_equal(found[tensor].view(np.uint8), original[tensor].view(np.uint8)), tensor
    spec = original.spec.model_copy(update={"family": found.spec.family})
    if isinstance(spec.position, Rope) and isinstance(spec.position.scaling, YarnScaling):
        assert found.spec.rope.scaling is not None
        spec = spec.model_copy(update={"position": found.spec.position})
    assert found.spec == spec
    ours, theirs = Tokenizer.load(found.folder), Tokenizer.load(original.folder)
    for text in DIFFICULT:
        assert ours.encode(text) == theirs.encode(text)
    assert (ours.eos_ids, ours.special_ids) == (theirs.eos_ids, theirs.special_ids)
    assert (ours.eos_token, ours.pad_token, ours.chat_template) == (
        theirs.eos_token, theirs.pad_token, theirs.chat_template,
    )  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_gguf_cannot_say_is_named(name: str, tmp_path: Path) -> None:
    original = made(name, tmp_path)
    with pytest.raises(UnsupportedModelError) as caught:
        gguf_writer.export(original.folder, tmp_path / "out")
    assert REFUSED[name] in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen2.5-tied"])
def test_transformers_own_reader_computes_the_same(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    original = made(name, tmp_path)
    gguf_writer.export(original.folder, tmp_path / "out")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=gguf_writer.FILE, dtype=torch.float32)
    ids = torch.tensor([tiny.tokens(40)])
    with torch.no_grad():
        found, expected = read(ids).logits, tiny.TINY[name].build()(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "f16", "bf16"])
@pytest.mark.parametrize("name", ["llama-bias", "qwen2-moe-all", "gpt2"])
def test_types_are_what_the_gguf_package_makes_of_them(name: str, kind: str, tmp_path: Path) -> None:
    original = made(name, tmp_path)
    gguf_writer.export(original.folder, tmp_path / "whole", kind="f32")
    made_of = gguf_writer.export(original.folder, tmp_path / "out", kind=kind)
    assert made_of.settings == {"format": "gguf", "type": kind}
    whole = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "whole" / gguf_writer.FILE).tensors}
    number = GGMLQuantizationType[kind.upper()]
    kinds = set()
    for tensor in GGUFReader(tmp_path / "out" / gguf_writer.FILE).tensors:
        expected = whole.pop(tensor.name).data
        is_full = expected.ndim == 1 or "gate_inp" in tensor.name or "position" in tensor.name
        assert tensor.tensor_type == (GGMLQuantizationType.F32 if is_full else number), tensor.name
        encoded = expected if is_full else quants.quantize(expected, number)
        assert np.array_equal(np.asarray(tensor.data).view(np.uint8), encoded.view(np.uint8)), tensor.name
        kinds.add(tensor.tensor_type)
    assert not whole
    assert len(kinds) == 2


def test_rows_that_are_not_whole_blocks_become_float16(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = tiny.Case("llama", {"intermediate_size": 48})
    original = hf.convert(tiny.save(case, tmp_path / "source"), tmp_path / "checkpoint")
    gguf_writer.export(original.folder, tmp_path / "out", kind="q8_0")
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "out" / gguf_writer.FILE).tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")
    assert "'blk.0.ffn_down.weight'" in caplog.text


def test_a_normalised_head_is_written_normalised(tmp_path: Path) -> None:
    """llama.cpp does not normalise it; that it is one shows in the size of Baichuan2's vocabulary."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 32, "vocab_size": 125696}
    case = tiny.Case("baichuan", {**sizes, "max_position_embeddings": 256}, base=tiny.BAICHUAN_BASE)
    original = hf.convert(tiny.save(case, tmp_path / "source"), tmp_path / "checkpoint")
    assert original.spec.normalised_head
    gguf_writer.export(original.folder, tmp_path / "out")
    found = convert(tmp_path / "out", tmp_path / "back")
    assert found.spec == original.spec
    expected = torch.nn.functional.normalize(torch.from_numpy(original["head.weight"])).numpy()
    assert np.allclose(found["head.weight"], expected, rtol=1e-6, atol=0)
    assert np.array_equal(found["embed.weight"], original["embed.weight"])


def test_a_value_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    case, source = tiny.TINY["llama"], tmp_path / "source"
    model = case.build()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = 1e6
    model.save_pretrained(source)
    tiny.save_tokenizer(source)
    hf.convert(source, tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight"):
        gguf_writer.export(tmp_path / "checkpoint", tmp_path / "out", kind="f16")
    assert {item.name for item in tmp_path.iterdir()} == {"source", "checkpoint"}


def test_what_cannot_be_exported(tiny_checkpoint: Folder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'q3_k'"):
        gguf_writer.export(tiny_checkpoint("llama"), tmp_path / "out", kind="q3_k")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    with pytest.raises(UserError, match="exists"):
        gguf_writer.export(tiny_checkpoint("llama"), tmp_path / "out")
    manifest = manifests.read(tiny_checkpoint("llama"))
    assert manifest.kind == "checkpoint"


def test_a_window_that_llama_cpp_does_not_apply_is_told(
    tiny_checkpoint: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gguf_writer.export(tiny_checkpoint("mistral-window"), tmp_path / "out")
    assert "sliding window of 8" in caplog.text


def saved(tokenizer: tokenizers.Tokenizer, folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def again(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    return gguf_tokenizer.build(metadata, where="m.gguf")


def byte_level(name: str) -> tokenizers.Tokenizer:
    """A byte-level BPE that cuts words in a way of this name, with tokens added of both kinds."""
    found = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=PRE_TOKENIZERS[name].whole_words))
    PRE_TOKENIZERS[name].install(found)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    found.train_from_iterator(DIFFICULT, trainer)
    found.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    found.add_special_tokens([tokenizers.AddedToken("<|end|>", normalized=False)])
    return found


@pytest.mark.parametrize("name", [name for name in PRE_TOKENIZERS if name != "default"])
def test_byte_level_tokenizers_of_every_cut(name: str, tmp_path: Path) -> None:
    original = byte_level(name)
    size = original.get_vocab_size() + 7
    metadata = gguf_vocabulary.write(saved(original, tmp_path / "t", eos_token="<|end|>"), size)
    written = PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]]
    assert (written.pattern, written.digits, written.nfc) == (
        PRE_TOKENIZERS[name].pattern, PRE_TOKENIZERS[name].digits, PRE_TOKENIZERS[name].nfc,
    )  # fmt: skip
    assert len(metadata["tokenizer.ggml.tokens"]) == size
    assert metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{size - 1}]"
    assert metadata["tokenizer.ggml.token_type"][-9:] == [4, 3, 5, 5, 5, 5, 5, 5, 5]
    assert metadata["tokenizer.ggml.eos_token_id"] == size - 8
    found = again(metadata)
    for text in DIFFICULT:
        assert found.encode(text).ids == original.encode(text).ids


def test_a_tokenizer_as_its_authors_saved_it_is_recognised(tmp_path: Path) -> None:
    """GPT-2's and Llama 3's own files spell the same steps otherwise than llmc does."""
    pre = tokenizers.pre_tokenizers
    plain = byte_level("gpt-2")
    plain.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, trim_offsets=True)
    assert gguf_vocabulary.write(saved(plain, tmp_path / "a"), 600)["tokenizer.ggml.pre"] == "gpt-2"
    third = byte_level("llama-bpe")
    split = pre.Split(tokenizers.Regex(PRE_TOKENIZERS["llama-bpe"].pattern), behavior="isolated", invert=False)
    third.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    assert gguf_vocabulary.write(saved(third, tmp_path / "b"), 600)["tokenizer.ggml.pre"] == "llama-bpe"


def test_a_cut_without_a_name_is_refused(tmp_path: Path) -> None:
    other = byte_level("qwen2")
    other.normalizer = tokenizers.normalizers.NFKC()
    with pytest.raises(UnsupportedModelError, match="cuts words"):
        gguf_vocabulary.write(saved(other, tmp_path / "a"), 600)
    other = byte_level("gpt-2")
    other.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(UnsupportedModelError, match="cuts words"):
        gguf_vocabulary.write(saved(other, tmp_path / "b"), 600)
    with pytest.raises(UnsupportedModelError, match="the embedding 300 rows"):
        gguf_vocabulary.write(saved(byte_level("gpt-2"), tmp_path / "c"), 300)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(UnsupportedModelError, match="WordLevel"):
        gguf_vocabulary.write(saved(words, tmp_path / "d"), 600)


@pytest.mark.parametrize("settings", [{}, {"add_dummy_prefix": False}], ids=["space", "no-space"])
def test_sentencepiece_gets_scores_again(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_sentencepiece.train(list(DIFFICULT[:5]), **settings)
    (tmp_path / "source").mkdir()
    (tmp_path / "source/tokenizer.model").write_bytes(model.serialized_model_proto())
    from llmc.converters import hf_tokenizer

    (tmp_path / "checkpoint").mkdir()
    hf_tokenizer.copy(tmp_path / "source", tmp_path / "checkpoint", {})
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "checkpoint/tokenizer_config.json").write_text(json.dumps(config))
    original = Tokenizer.load(tmp_path / "checkpoint")
    metadata = gguf_vocabulary.write(tmp_path / "checkpoint", original.vocab_size + 3)
    assert metadata["tokenizer.ggml.add_space_prefix"] == (not settings)
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert metadata["tokenizer.ggml.add_bos_token"]
    assert not metadata["tokenizer.ggml.add_eos_token"]
    types = metadata["tokenizer.ggml.token_type"]
    assert [types.count(kind) for kind in (2, 3, 4, 5, 6)] == [1, 2, 1, 3, 256]
    found = again(metadata)
    for text in DIFFICULT:
        assert found.encode(text).ids == original.encode(text)
        if text.strip("\x00 ") and "\x00" not in text and "\u2581" not in text and "<" not in text:
            assert found.encode(text, add_special_tokens=False).ids == model.EncodeAsIds(text)


def test_merges_without_scores_are_refused(tmp_path: Path) -> None:
    vocabulary = {token: number for number, token in enumerate(["<unk>", "a", "b", "c", "ab", "bc", "abc"])}
    merges = [("a", "b"), ("b", "c"), ("a", "bc")]
    model = tokenizers.models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>")
    with pytest.raises(UnsupportedModelError, match="scores"):
        gguf_vocabulary.write(saved(tokenizers.Tokenizer(model), tmp_path / "t"), 10)
