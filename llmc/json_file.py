"""JSON objects in files of a stranger's making."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmc.errors import CheckpointError


def read(path: Path, *, required: bool = True) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        required: When False, a file that is not there is an empty object.

    Raises:
        CheckpointError: It is missing, or is not one.
    """
    if not required and not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, expected an object")
    return values
