"""The one logger of llmc. Libraries log; only commands print."""

from __future__ import annotations

import logging
import os
import sys

logger = logging.getLogger("llmc")


def configure(level: str | None = None) -> None:
    """Send llmc's log to standard error.

    Args:
        level: A name of the logging module ("info"); by default `LLMC_LOG`, else "warning".
    """
    name = (level or os.environ.get("LLMC_LOG") or "warning").upper()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.getLevelNamesMapping().get(name, logging.WARNING) if sys.version_info >= (3, 11) else name)
    logger.propagate = False
