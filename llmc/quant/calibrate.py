"""Scales of an 8-bit KV cache, from what the reference decoder puts into its cache while it reads a text.

    value = code * scale         scale = the largest magnitude / 127 for int8, / 448 for fp8

The scale of a value channel follows from its largest magnitude, and so does a key channel's, unless it is one of a
pair that the rotary embedding turns by an angle that grows with the position: over a long context each of the two
reaches the length of the pair, however short the calibration windows were. Both take their scale from that length;
a maximum per channel would clip keys at positions that were never calibrated. (Qwen2.5-Coder-0.5B, 1,020 tokens in
windows of 256, calibrated on 1,024: KL to fp32 0.0017 nats, with a maximum per channel 0.0039.)

The text walks through the model once, a layer in memory at a time (llmc/layerwise.py).

Knows: caches and maxima. Does not know: where scales are stored, or which kernel uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from llmc.checkpoint import Checkpoint
from llmc.layerwise import Walker
from llmc.model import KVCache, from_pairs, pairs
from llmc.names import FRONT, parts
from llmc.quant.pack import Floats
from llmc.recipe import KVCacheFormat
from llmc.runtime import Tokens
from llmc.spec import Position, Rope


class _Watcher(KVCache):
    """Keeps no keys and values of a layer, only what each channel reaches: k or v -> [kv_heads, head_dim]."""

    def __init__(self, position: Position, form: KVCacheFormat) -> None:
        super().__init__()
        self.position, self.form = position, form
        self.reach: dict[str, Tensor] = {}
        self._windows = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """One window; see KVCache."""
        reach = k.abs()
        if isinstance(self.position, Rope):
            interleaved, count = self.position.interleaved, self.position.size(k.shape[-1]) // 2
            first, second, rest = pairs(reach, count, interleaved=interleaved)
            length = torch.hypot(first, second)
            reach = from_pairs(length, length, rest, interleaved=interleaved)
        self._windows += 1
        for name, values in (("k", reach), ("v", v.abs())):
            largest = values.amax(dim=(0, 2))
            if self.form.scale == "head":
                largest = largest.amax(-1, keepdim=True).expand_as(largest)
            seen = self.reach.get(name, largest)
            # The mean of windows as they come: mean += (x - mean) / n.
            average = seen + (largest - seen) / self._windows
            self.reach[name] = average if self.form.observer == "average" else torch.maximum(seen, largest)
        return k, v


@torch.inference_mode()
def kv_scales(
    checkpoint: Checkpoint,
    form: KVCacheFormat,
    windows: Sequence[Tokens],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Floats]:
    """Calibrate.

    Args:
        windows: int64 [tokens] each.
        progress: Called after each layer with (layers done, layers).

    Returns:
        `layers.N.attn.k_scale` and `.v_scale`, float32 [kv_size].
    """
    walker, spec = Walker(checkpoint), checkpoint.spec
    walker.load(FRONT)
    states = walker.enter(windows)
    found: dict[str, Floats] = {}
    for done, part in enumerate(list(parts(spec))[1:-1]):
        walker.drop()
        layer, watcher = walker.load(part), _Watcher(spec.position, form)
        for index, state in enumerate(states):
            states[index] = walker.through(layer, state, index, watcher)
        for name, reach in watcher.reach.items():
            scale = (reach.flatten() / form.highest).numpy()
            # A channel that is always zero has any scale: one keeps divisions finite.
            found[f"{part}.attn.{name}_scale"] = np.where(scale > 0, scale, np.float32(1))
        if progress:
            progress(done + 1, spec.num_layers)
    return found
