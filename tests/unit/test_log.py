"""The logger: to standard error, at the level asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("option", "variable", "shown"),
    [
        (None, None, "warned"),
        ("info", None, "informed warned"),
        (None, "error", ""),
        ("debug", "error", "informed warned"),
    ],
)
def test_levels(option: str | None, variable: str | None, shown: str) -> None:
    code = f"""
from llmc import log
log.configure({option!r})
log.logger.info("informed")
log.logger.warning("warned")
"""
    environment = {"LLMC_LOG": variable} if variable else {}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == ""
    assert " ".join(line.rpartition(": ")[2] for line in done.stderr.splitlines()) == shown
