"""llmc.quant.calibrate: scales from what the cache would hold, against a plain reading of transformers' own cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from llmc.checkpoint import Checkpoint
from llmc.config import parse
from llmc.errors import ConfigError
from llmc.layerwise import Walker
from llmc.model import KVCache, load, through_cache
from llmc.quant.calibrate import kv_scales
from llmc.recipe import KVCacheFormat

CASES = ["llama", "llama-yarn-no-truncate", "qwen3", "qwen2.5-tied", "mistral-window", "gpt2", "bloom"]


def windows(count: int = 3, length: int = 40) -> list[np.ndarray]:
    return [np.array(tiny.tokens(length, seed)) for seed in range(count)]


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_scales_cover_the_cache_of_transformers(name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    model = tiny.TINY[name].build()
    scales = kv_scales(Checkpoint(tiny_checkpoint(name)), KVCacheFormat(), windows())
    caches = [model(torch.from_numpy(window)[None], use_cache=True).past_key_values for window in windows()]
    seen = 0
    for layer in range(model.config.num_hidden_layers):
        if hasattr(caches[0].layers[layer], "sliding_window"):
            continue  # transformers keeps only the window's keys
        keys = torch.cat([cache.layers[layer].keys for cache in caches], dim=2)[0]
        values = torch.cat([cache.layers[layer].values for cache in caches], dim=2)[0]
        absmax = values.abs().amax(dim=1).flatten() / 127
        np.testing.assert_allclose(scales[f"layers.{layer}.attn.v_scale"], absmax, rtol=1e-4)
        half = keys.shape[-1] // 2
        reach = torch.hypot(keys[..., :half], keys[..., half:]).repeat(1, 1, 2)
        if name in ("gpt2", "bloom"):  # nothing is turned
            reach = keys.abs()
        np.testing.assert_allclose(scales[f"layers.{layer}.attn.k_scale"], reach.amax(dim=1).flatten() / 127, rtol=1e-4)
        seen += 1
    assert seen == (0 if name == "mistral-window" else model.config.num_hidden_layers)
    assert len(scales) == 2 * model.config.num_hidden_layers


@pytest.mark.parametrize("name", ["llama", "glm"])
@torch.inference_mode()
def test_keys_at_later_positions_are_not_clipped(name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    """Scales from short windows hold for the same tokens at any position: the rotation changes no pair's length.

    The first layer's keys depend on token and position alone, so this is exact there.
    """
    checkpoint = Checkpoint(tiny_checkpoint(name))
    decoder = load(checkpoint)
    width = decoder.spec.attention.head_dim
    window = windows(count=1, length=16)
    scale = torch.from_numpy(kv_scales(checkpoint, KVCacheFormat(), window)["layers.0.attn.k_scale"])
    cache = KVCache()
    decoder(torch.from_numpy(np.tile(window[0], 15))[None], cache=cache)
    keys, _ = cache.append(0, *(torch.empty(1, 2, 0, width),) * 2)
    assert keys.shape[2] == 240
    codes = keys / scale.view(2, 1, width)
    assert float(codes.abs().max()) <= 127.01
    plain = keys[:, :, :16].abs().amax(dim=(0, 2)).view(2, 1, width)  # what a maximum per channel would have taken
    assert float((keys.abs() / plain).max()) > 1.4


def test_channel_that_is_always_zero(tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("llama"))
    read = Checkpoint.__getitem__

    def without_a_channel(self: Checkpoint, name: str) -> np.ndarray:
        values = read(self, name)
        if name == "layers.0.attn.v.weight":
            values[3] = 0
        return values

    monkeypatch.setattr(Checkpoint, "__getitem__", without_a_channel)
    scales = kv_scales(checkpoint, KVCacheFormat(), windows())
    assert scales["layers.0.attn.v_scale"][3] == 1
    assert all(np.isfinite(scale).all() and (scale > 0).all() for scale in scales.values())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.inference_mode()
def test_heads_and_averages(name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    """Of the first layer's values, which follow from plain products."""
    checkpoint = Checkpoint(tiny_checkpoint(name))
    decoder, heads = load(checkpoint), checkpoint.spec.attention.num_kv_heads
    layer = decoder.layers[0]
    largest = []
    for window in windows():
        x, _ = decoder.enter(torch.from_numpy(window)[None])
        largest.append(layer.attn.v(layer.attn_norm(x))[0].abs().amax(0))
    each = torch.stack(largest)  # [windows, kv_size]
    assert float(each.std(0).max()) > 0
    by_head = each.view(len(each), heads, -1).amax(-1, keepdim=True).expand(-1, -1, each.shape[1] // heads).flatten(1)
    expected = {
        ("channel", "max"): each.amax(0),
        ("channel", "average"): each.mean(0),
        ("head", "max"): by_head.amax(0),
        ("head", "average"): by_head.mean(0),
    }
    for (scale, observer), reach in expected.items():
        for kind, highest in (("int8", 127), ("fp8", 448)):
            form = KVCacheFormat.model_validate({"kind": kind, "scale": scale, "observer": observer})
            met = kv_scales(checkpoint, form, windows())
            np.testing.assert_allclose(met["layers.0.attn.v_scale"], reach / highest, rtol=1e-5)
            assert len(met) == 2 * checkpoint.spec.num_layers


def test_progress_counts_layers(tiny_checkpoint: Callable[[str], Path]) -> None:
    calls: list[tuple[int, int]] = []
    kv_scales(Checkpoint(tiny_checkpoint("llama")), KVCacheFormat(), windows(), lambda *call: calls.append(call))
    assert calls == [(1, 2), (2, 2)]


def test_a_layer_at_a_time(tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[set[str]] = []
    load_part = Walker.load

    def watched(self: Walker, part: str) -> torch.nn.Module:
        layer = load_part(self, part)
        present = (name for name, values in self.decoder.state_dict().items() if not values.is_meta)
        held.append({".".join(name.split(".")[:2]) for name in present})
        return layer

    monkeypatch.setattr(Walker, "load", watched)
    kv_scales(Checkpoint(tiny_checkpoint("llama")), KVCacheFormat(), windows())
    assert held == [{"embed.weight"}, {"layers.0"}, {"layers.1"}]


def test_int8_keeps_what_codes_can_say() -> None:
    scale = torch.tensor([0.5, 2.0])
    x = torch.tensor([[0.5, 2.0], [0.74, -3.1], [1000.0, -1000.0]]).view(1, 1, 3, 2)
    assert through_cache(x, scale, KVCacheFormat()).flatten().tolist() == [0.5, 2.0, 0.5, -4.0, 63.5, -256.0]


def test_fp8_keeps_three_bits_of_mantissa() -> None:
    """e4m3 (Micikevicius et al. 2022): steps of 1/8 of the power of two below, 448 at most, 2^-9 at least."""
    x = torch.tensor([[1.0, 2.0], [1.06, 2.2], [1.07, -1000.0], [0.0, 2.0 * 2**-9]]).view(1, 1, 4, 2)
    met = through_cache(x, torch.tensor([1.0, 2.0]), KVCacheFormat(kind="fp8"))
    assert met.flatten().tolist() == [1.0, 2.0, 1.0, 2.25, 1.125, -896.0, 0.0, 2.0 * 2**-9]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_dynamic_scales_are_each_token_s_own(kind: str) -> None:
    x = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 5)[:, None]
    x[0, 1, 2] = 0
    form = KVCacheFormat.model_validate({"kind": kind, "scale": "dynamic"})
    met = through_cache(x, None, form)
    largest = x.abs().amax(-1)
    torch.testing.assert_close(met.abs().amax(-1), largest)
    bound = largest[..., None] / 254 * 1.001 if kind == "int8" else x.abs() / 16 + largest[..., None] / 448 / 2**10
    assert bool(((met - x).abs() <= bound).all())


def test_dynamic_scales_observe_nothing() -> None:
    with pytest.raises(ConfigError, match="no text is observed"):
        parse(KVCacheFormat, {"scale": "dynamic", "observer": "average"}, where="kv")
