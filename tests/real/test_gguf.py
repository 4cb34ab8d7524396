"""A real GGUF file: its tokenizer, its tensors, and what converting it costs."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmc.checkpoint import Checkpoint
from llmc.converters import gguf_file
from llmc.tokenizer import Tokenizer

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

MEASURE = """
import sys
from pathlib import Path

def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

from gguf import constants, quants
from llmc.converters import gguf
before = kilobytes("VmRSS")
made = gguf.convert(Path(sys.argv[1]), Path(sys.argv[2]))
print(kilobytes("VmHWM") - before, max(info.nbytes for info in made.infos.values()))
"""


@pytest.fixture(scope="module")
def checkpoint(converted: Path) -> Checkpoint:
    return Checkpoint(converted)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return Tokenizer.load(checkpoint.folder)


def test_tokens_that_end_and_begin(tokenizer: Tokenizer) -> None:
    ends = {"<|im_end|>": 151645, "<|endoftext|>": 151643}
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_ids == set(ends.values())
    assert tokenizer.vocab_size == 151665
    for token in (
        "<|im_start|>",
        "<tool_call>",
        "</tool_call>",
        "<|fim_prefix|>",
        "<|fim_middle|>",
        "<|file_sep|>",
        *ends,
    ):
        (number,) = tokenizer.encode(token)
        assert number >= 151643
        assert tokenizer.decode([number], skip_special_tokens=False) == token
    assert not tokenizer.special_ids & set(tokenizer.encode("<tool_call></tool_call>"))
    assert tokenizer.chat_template is not None
    assert "<|im_start|>" in tokenizer.chat_template


def test_known_ids(tokenizer: Tokenizer) -> None:
    """From the model card of Qwen2.5 and its tokenizer's published examples: digits stand alone, spaces lead."""
    assert tokenizer.encode("Hello world") == [9707, 1879]
    assert len(tokenizer.encode("12345")) == 5
    assert tokenizer.decode(tokenizer.encode("12345")) == "12345"


def test_transformers_own_builder_gives_the_same_ids(source: Path, tokenizer: Tokenizer) -> None:
    """transformers' Qwen2Tokenizer, made of the file's vocabulary and merges."""
    from transformers import Qwen2Tokenizer

    metadata = gguf_file.read(source).metadata
    tokens = metadata["tokenizer.ggml.tokens"][:151643]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    theirs = Qwen2Tokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=merges)
    generator = random.Random(0)
    texts = [Path(subprocess.__file__).read_text(encoding="utf-8")]
    ranges = [(32, 127), (160, 1400), (0x900, 0xA00), (0x4E00, 0x9FFF), (0x1F300, 0x1F650), (0x300, 0x370)]
    for _ in range(300):
        low, high = generator.choice(ranges)
        texts.append(
            "".join(generator.choice([chr(generator.randrange(low, high)), " ", "\n", "a", "1"]) for _ in range(40))
        )
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == theirs.backend_tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == tokenizer.backend.normalizer.normalize_str(text)


def test_tensors_are_those_that_the_gguf_package_dequantizes(source: Path, checkpoint: Checkpoint) -> None:
    from gguf import GGUFReader, quants

    pairs = {
        "layers.3.attn.q.weight": "blk.3.attn_q.weight",
        "layers.3.attn.k.bias": "blk.3.attn_k.bias",
        "layers.23.mlp.down.weight": "blk.23.ffn_down.weight",
        "head.weight": "output.weight",
    }
    stored = {tensor.name: tensor for tensor in GGUFReader(source).tensors}
    for ours, theirs in pairs.items():
        tensor = stored[theirs]
        assert np.array_equal(checkpoint[ours], quants.dequantize(tensor.data, tensor.tensor_type)), ours
    assert not checkpoint.spec.tied
    assert len(checkpoint.infos) == len(stored)


def test_memory_stays_under_the_largest_tensor_and_300_mb(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out")]
    grown, largest = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(grown) * 1024 < int(largest) + 300e6
