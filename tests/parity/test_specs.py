"""Whatever a spec can say, the decoder and the engine compute alike: also what no family combines (yet)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from llmc import checkpoint as checkpoints
from llmc import manifest as manifests
from llmc.builders import ort as builder
from llmc.model import Decoder
from llmc.runtime import Chunk
from llmc.serve.runners import open_runner
from llmc.spec import Alibi, Attention, Learned, Mlp, ModelSpec, Moe, Norm, Prefix, Rope, Score
from llmc.tensors import TensorInfo

TOKENS = np.array(tiny.tokens(40))
HIDDEN = 64
SEEDS = 60
# Within the first chunk of those below.
PREFIX = Prefix(end=int(TOKENS[17]), marks=(int(TOKENS[5]),))


def any_spec(draw: random.Random) -> ModelSpec:
    """A spec of a tiny model, each switch thrown at random."""

    def flag() -> bool:
        return draw.random() < 0.5

    positions: list[Any] = [Rope(), Rope(fraction=0.5, interleaved=flag()), Rope(window_theta=500.0), Learned(offset=2)]
    mlp = Mlp(
        intermediate_size=96,
        activation=draw.choice(["silu", "gelu", "gelu_tanh", "relu"]),
        gated=flag(),
        bias=flag(),
    )
    experts = Moe(num_experts=4, top_k=2, intermediate_size=32, shared_size=draw.choice([None, 32]), dense_layers=(1,))
    kind = draw.choice(["rms", "layer"])
    spec = ModelSpec(
        family="none",
        vocab_size=tiny.VOCAB_SIZE,
        hidden_size=HIDDEN,
        num_layers=3,
        max_positions=64,
        norm=Norm(
            kind=kind,  # type: ignore[arg-type]
            eps=1e-5,
            plus_one=kind == "rms" and flag(),
            embedding=flag(),
            order=draw.choice(["before", "after", "both"]),
        ),
        position=draw.choice([*positions, Alibi(), Alibi()]),
        attention=Attention(
            num_heads=6,
            num_kv_heads=draw.choice([2, 6]),
            head_dim=32,
            qk_norm=flag(),
            qkv_bias=flag(),
            o_bias=flag(),
            scale=draw.choice([None, 0.1]),
            window=draw.choice([None, 8]),
            full_layers=draw.choice([(), (1,)]),
        ),
        mlp=mlp,
        moe=experts if mlp.gated and not mlp.bias and flag() else None,
        tied=flag(),
        normalised_head=flag(),
        embedding_size=draw.choice([None, 32]),
        embedding_scale=draw.choice([1.0, 3.0]),
    )
    if spec.norm.order == "before" and flag():
        spec = spec.model_copy(update={"norm": spec.norm.model_copy(update={"residual_scale": 2.5})})
    if spec.attention.window is None and flag():
        position: Any = spec.position
        if isinstance(position, Rope):
            position = position.model_copy(update={"axes": draw.choice([1, 2]), "half": flag()})
        spec = spec.model_copy(update={"prefix": PREFIX, "position": position})
    if flag():
        score = Score(labels=draw.choice([1, 3]))
        spec = spec.model_copy(update={"score": score, "tied": False, "normalised_head": False})
    return ModelSpec.model_validate_json(spec.model_dump_json())


def random_decoder(spec: ModelSpec, seed: int) -> Decoder:
    decoder, generator = Decoder(spec), torch.Generator().manual_seed(seed)
    for name, parameter in decoder.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            parameter.copy_(1.2 + 0.4 * noise if name.endswith("norm.weight") else 0.18 * noise)
    return decoder.eval()


def save(decoder: Decoder, folder: Path) -> None:
    state = {name: values.numpy() for name, values in decoder.state_dict().items()}
    infos = {name: TensorInfo(values.dtype, values.shape) for name, values in state.items()}
    with manifests.creating(folder) as work:
        checkpoints.write(work, decoder.spec, infos, state.__getitem__)
        manifests.seal(work, manifests.Manifest(kind="checkpoint", tools=manifests.tools()))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_decoder_and_engine(seed: int, tmp_path: Path) -> None:
    spec = any_spec(random.Random(seed))
    decoder = random_decoder(spec, seed)
    with torch.inference_mode():
        expected = decoder(torch.from_numpy(TOKENS)[None])[0].numpy()
        states = decoder.hidden(torch.from_numpy(TOKENS)[None])[0].numpy()
    save(decoder, tmp_path / "checkpoint")
    builder.build(tmp_path / "checkpoint", tmp_path / "engine")
    runner = open_runner(tmp_path / "engine", threads=1, max_sequences=1)
    runner.claim(1, TOKENS)
    found = []
    for begin, end in ((0, 20), (20, 21), (21, 22), (22, 40)):
        (part,) = runner.step([Chunk(1, begin, TOKENS[begin:end], end - begin)])
        found.append(part.copy())
    runner.free(1)
    runner.claim(2, TOKENS[:1])
    (read,) = runner.step([Chunk(2, 0, TOKENS, 30, states=True)])
    runner.close()
    np.testing.assert_allclose(read, states[10:], rtol=0, atol=1e-4 * max(1, np.abs(states).max()))
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=0, atol=1e-4 * max(1, np.abs(expected).max()))


def test_the_specs_above_say_everything() -> None:
    """Every kind of every switch is met, and so is every pair of kinds of norms and positions."""
    specs = [any_spec(random.Random(seed)) for seed in range(SEEDS)]
    orders = {(spec.norm.kind, spec.norm.order) for spec in specs}
    assert len(orders) == 6
    assert {spec.position.kind for spec in specs} == {"rope", "learned", "alibi"}
    turned = [spec for spec in specs if isinstance(spec.position, Rope)]
    assert {(spec.rope.axes, spec.rope.interleaved) for spec in turned} == {
        (1, False),
        (1, True),
        (2, False),
        (2, True),
    }
    assert {spec.position.kind for spec in specs if spec.prefix} == {"rope", "learned", "alibi"}
    assert {bool(spec.norm.residual_scale) for spec in specs} == {True, False}
    assert {spec.mlp.activation for spec in specs} == {"silu", "gelu", "gelu_tanh", "relu"}
    flags = [
        (spec.moe is None, spec.mlp.gated, spec.mlp.bias, spec.attention.qk_norm, spec.attention.window is None)
        for spec in specs
    ]
    assert all({True, False} == set(column) for column in zip(*flags, strict=True))
