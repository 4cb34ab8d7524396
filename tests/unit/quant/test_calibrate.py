"""llmc.quant.calibrate: scales from what the cache would hold, against a plain reading of transformers' own cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from llmc.checkpoint import Checkpoint
from llmc.model import KVCache, load, through_int8
from llmc.quant.calibrate import kv_scales

CASES = ["llama", "llama-yarn-no-truncate", "qwen3", "qwen2.5-tied", "mistral-window", "gpt2", "bloom"]


def windows(count: int = 3, length: int = 40) -> list[np.ndarray]:
    return [np.array(tiny.tokens(length, seed)) for seed in range(count)]


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_scales_cover_the_cache_of_transformers(name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    model = tiny.TINY[name].build()
    scales = kv_scales(load(Checkpoint(tiny_checkpoint(name))), windows())
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
    decoder = load(Checkpoint(tiny_checkpoint(name)))
    width = decoder.spec.attention.head_dim
    window = windows(count=1, length=16)
    scale = torch.from_numpy(kv_scales(decoder, window)["layers.0.attn.k_scale"])
    cache = KVCache()
    decoder(torch.from_numpy(np.tile(window[0], 15))[None], cache=cache)
    keys, _ = cache.append(0, *(torch.empty(1, 2, 0, width),) * 2)
    assert keys.shape[2] == 240
    codes = keys / scale.view(2, 1, width)
    assert float(codes.abs().max()) <= 127.01
    plain = keys[:, :, :16].abs().amax(dim=(0, 2)).view(2, 1, width)  # what a maximum per channel would have taken
    assert float((keys.abs() / plain).max()) > 1.4


def test_channel_that_is_always_zero(tiny_checkpoint: Callable[[str], Path]) -> None:
    decoder = load(Checkpoint(tiny_checkpoint("llama")))
    decoder.layers[0].attn.v.weight[3] = 0
    scales = kv_scales(decoder, windows())
    assert scales["layers.0.attn.v_scale"][3] == 1
    assert all(np.isfinite(scale).all() and (scale > 0).all() for scale in scales.values())


def test_progress_counts_windows(tiny_checkpoint: Callable[[str], Path]) -> None:
    calls: list[tuple[int, int]] = []
    kv_scales(load(Checkpoint(tiny_checkpoint("llama"))), windows(), lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_int8_keeps_what_codes_can_say() -> None:
    scale = torch.tensor([0.5, 2.0])
    x = torch.tensor([[0.5, 2.0], [0.74, -3.1], [1000.0, -1000.0]]).view(1, 1, 3, 2)
    assert through_int8(x, scale).flatten().tolist() == [0.5, 2.0, 0.5, -4.0, 63.5, -256.0]
