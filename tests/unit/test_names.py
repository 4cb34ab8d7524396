"""llmc.names: the promises that quantizers and sharding build on, tried on the decoder itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from llmc import names
from llmc.checkpoint import Checkpoint
from llmc.model import Decoder, Mlp, load

CASES = [
    "llama",
    "llama-bias",
    "llama-multi-head",
    "qwen2",
    "qwen3",
    "qwen3-tied",
    "mistral-window",
    "mixtral",
    "qwen2-moe",
    "glm4",
    "gemma3",
    "gpt2",
]
CASES += ["opt", "opt-350m", "bloom-6-heads", "baichuan2-13b"]


@pytest.fixture(params=CASES)
def decoder(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path]) -> Decoder:
    return load(Checkpoint(tiny_checkpoint(request.param)))


def test_tensors_are_the_parameters_of_the_decoder(decoder: Decoder) -> None:
    met = {name: tuple(values.shape) for name, values in decoder.named_parameters()}
    assert met == names.tensors(decoder.spec)


def test_matrices(decoder: Decoder) -> None:
    found = names.matrices(decoder.spec)
    linears = [name for name, module in decoder.named_modules() if isinstance(module, torch.nn.Linear)]
    routers = [name for name in linears if name.endswith((".router", ".shared_gate"))]
    assert sorted(found) == sorted({"embed", *linears} - set(routers))
    assert bool(routers) == (decoder.spec.moe is not None)
    assert ("head" in found) == (not decoder.spec.tied)


@torch.inference_mode()
def test_smoothing_groups_hold(decoder: Decoder) -> None:
    """A scale moved from the inputs of the targets into the output of the source changes no logit."""
    tokens = torch.tensor([tiny.tokens(30)])
    before = decoder(tokens)
    state = dict(decoder.named_parameters())
    groups = names.smoothing_groups(decoder.spec)
    through_mlp = decoder.spec.mlp.gated or decoder.spec.mlp.activation == "relu"
    mlps = [name for name, module in decoder.named_modules() if isinstance(module, Mlp)]
    in_attention = 1 if decoder.spec.norm.order == "after" or decoder.spec.norm.plus_one else 3
    assert len(groups) == in_attention * decoder.spec.num_layers + through_mlp * len(mlps)
    generator = torch.Generator().manual_seed(0)
    for group in groups:
        source = state[f"{group.source}.weight"]
        scale = torch.rand(len(source), generator=generator) + 0.5
        source.mul_(scale if source.dim() == 1 else scale[:, None])
        if f"{group.source}.bias" in state:
            state[f"{group.source}.bias"].mul_(scale)
        spread = scale.view(-1, decoder.spec.attention.head_dim) if group.repeat > 1 else scale
        columns = spread.repeat_interleave(group.repeat, dim=0).flatten()
        for target in group.targets:
            before_target = state[f"{target}.weight"].clone()
            state[f"{target}.weight"].div_(columns)
            assert not torch.equal(before_target, state[f"{target}.weight"])
    after = decoder(tokens)
    assert float((after - before).abs().max()) <= 1e-4 * float(before.abs().max())


@pytest.mark.parametrize("ranks", [2, 4])
@torch.inference_mode()
def test_shard_axes_hold(decoder: Decoder, ranks: int) -> None:
    """Split along its axis over ranks, a linear's parts join (axis 0) or add up (axis 1) to the whole."""
    generator = torch.Generator().manual_seed(0)
    seen = {0: 0, 1: 0}
    state = dict(decoder.named_parameters())
    matrices = [module for module in names.matrices(decoder.spec) if module not in ("embed_in", "embed_out")]
    assert {names.shard_axis(f"{module}.weight") for module in ("embed_in", "embed_out")} == {None}
    for module in matrices:
        weight, bias = state[f"{module}.weight"], state.get(f"{module}.bias")
        x = torch.randn(3, weight.shape[1], generator=generator)
        whole = torch.nn.functional.linear(x, weight, bias)
        axis = names.shard_axis(f"{module}.weight")
        assert axis is not None
        parts = weight.chunk(ranks, dim=axis)
        assert len(parts) == ranks
        if axis == 0:
            biases = bias.chunk(ranks) if bias is not None else [None] * ranks
            assert bias is None or names.shard_axis(f"{module}.bias") == 0
            joined = torch.cat(
                [torch.nn.functional.linear(x, *part) for part in zip(parts, biases, strict=True)], dim=1
            )
        else:
            inputs = x.chunk(ranks, dim=1)
            joined = sum(part_x @ part.T for part_x, part in zip(inputs, parts, strict=True))  # type: ignore[assignment]
            if bias is not None:
                assert names.shard_axis(f"{module}.bias") is None
                joined = joined + bias
        torch.testing.assert_close(joined, whole, rtol=1e-5, atol=1e-5)
        seen[axis] += 1
    mlps = [name for name, module in decoder.named_modules() if isinstance(module, Mlp)]
    assert seen == {0: len(matrices) - seen[1], 1: decoder.spec.num_layers + len(mlps)}


def test_norms_are_whole(decoder: Decoder) -> None:
    kinds = ("norm.weight", "norm.bias", "positions.weight")
    norms = [name for name, shape in names.tensors(decoder.spec).items() if name.endswith(kinds)]
    assert len(norms) >= 2 * decoder.spec.num_layers + 1
    assert {names.shard_axis(name) for name in norms} == {None}
