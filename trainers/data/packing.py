"""Documents packed into rows of one length, exactly: no document sees another.

All documents lie in one stream of tokens, each ending with the end-of-text token, and row i is simply the i-th piece
of that stream; only the last row is padded. Nothing is lost and nothing is repeated.

Where a new document begins in a row its positions start again at 0. transformers reads such positions as separate
sequences and lets none attend to another, but only without an attention mask and with `use_cache=False`: with either
of the two, documents leak into each other in silence. A document that is cut by the end of a row goes on in the next
one from position 0. Measured on a CPU, this costs no more than letting the documents run together.

The first token of a document is not a target: the text before it does not say what it will be.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from llmc.trainers.data.indexed import Tokens

IGNORE = -100  # the label that torch's cross entropy leaves out


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Rows of a token stream.

    Each is {"input_ids", "labels", "position_ids"}, int64 [length]. Labels are not shifted: the model does that.
    """

    def __init__(self, tokens: Tokens, length: int, *, padding: int) -> None:
        """Lay rows over `tokens`.

        Args:
            length: Tokens of a row.
            padding: The token that fills up the last row; never a target.
        """
        self.tokens, self.length, self.padding = tokens, length, padding

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.length)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        begin = index * self.length
        values = self.tokens.values[begin : begin + self.length].astype(np.int64)
        count = len(values)
        starts = self.tokens.starts
        first, last = np.searchsorted(starts, [begin + 1, begin + count])
        inner = starts[first:last] - begin  # documents that begin inside the row, after its first token
        origins = np.zeros(self.length, np.int64)
        origins[inner] = inner
        labels = values.copy()
        labels[inner] = IGNORE
        padded = self.length - count
        if padded:
            origins[count] = count
            values = np.pad(values, (0, padded), constant_values=self.padding)
            labels = np.pad(labels, (0, padded), constant_values=IGNORE)
        positions = np.arange(self.length) - np.maximum.accumulate(origins)
        return {
            "input_ids": torch.from_numpy(values),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
        }
