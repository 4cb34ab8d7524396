"""What an engine and the reference decoder say of the same tokens, for tests that compare the two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tiny
import torch

from llmc import model
from llmc.checkpoint import Checkpoint
from llmc.runtime import Chunk
from llmc.serve.runners import open_runner

TOKENS = np.array(tiny.tokens(60))


def engine_logits(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """An engine's logits of TOKENS: of all at once, and in chunks; both [tokens, vocabulary]."""
    runner = open_runner(folder, threads=1, max_sequences=2)
    runner.claim(1, TOKENS)
    (whole,) = runner.step([Chunk(1, 0, TOKENS, len(TOKENS))])
    chunked = []
    for begin, end in ((0, 7), (7, 8), (8, 40), (40, 60)):
        (part,) = runner.step([Chunk(1, begin, TOKENS[begin:end], end - begin)])
        chunked.append(part.copy())
    runner.close()
    return whole, np.concatenate(chunked)


def reference_logits(folder: Path) -> np.ndarray:
    """A checkpoint's logits of TOKENS: [tokens, vocabulary]."""
    with torch.no_grad():
        return model.load(Checkpoint(folder))(torch.from_numpy(TOKENS)[None])[0].numpy()
