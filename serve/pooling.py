"""Requests that want numbers for a prompt and no text: its embedding, or what a scoring head says of it.

Knows rows of floats. Does not know where they come from, nor what is done with the result.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llmc.errors import EngineError, UserError
from llmc.runtime import Limits, Logits
from llmc.serve.request import Pooling, Request


class Pooler:
    """The rows of one prompt, chunk by chunk, as one vector.

    Args:
        kind: "mean" is told all of the prompt's rows; the others need the last alone.
    """

    def __init__(self, kind: Pooling) -> None:
        self._is_mean = kind == "mean"
        self._sum: npt.NDArray[np.float64] | None = None
        self._count = 0

    def add(self, rows: Logits, start: int, *, last: bool) -> Logits | None:
        """Take the rows of a chunk, float32 [count, width].

        Args:
            start: The chunk's first position; 0 begins anew, as after a preemption.

        Returns:
            float32 [width] after the last chunk.

        Raises:
            EngineError: It is not finite, so that nothing can be done with it.
        """
        if self._sum is None or start == 0 or not self._is_mean:
            self._sum, self._count = np.zeros(rows.shape[1]), 0
        taken = rows if self._is_mean else rows[-1:]
        self._sum += taken.sum(axis=0, dtype=np.float64)
        self._count += len(taken)
        if not last:
            return None
        found = self._sum / self._count
        if not np.isfinite(found).all():
            raise EngineError("the model gives values for this input that are not finite")
        return found.astype(np.float32)


def check_kind(request: Request, limits: Limits) -> None:
    """Raise UserError unless the model has what is wanted."""
    if request.pooling is None and limits.num_scores:
        raise UserError("this model gives scores and writes no text: ask POST /v1/score or /v1/rerank, or llmc score")
    if request.pooling == "score" and not limits.num_scores:
        raise UserError("this model has no scoring head: serve one whose checkpoint has a 'score.weight'")
    if request.pooling in ("mean", "last") and not limits.state_size:
        raise UserError("this engine was built without embeddings: build it again with this version of llmc")
