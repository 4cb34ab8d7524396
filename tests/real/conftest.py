"""The real model: Qwen2.5-Coder-0.5B-Instruct, converted once a session. `make test-real` says where its file is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command_line import llmc


@pytest.fixture(scope="session")
def source() -> Path:
    """The GGUF file."""
    if not os.environ.get("LLMC_REAL_MODEL"):
        pytest.fail("LLMC_REAL_MODEL is not set: it is the path of a Qwen2.5-Coder-0.5B-Instruct GGUF file")
    return Path(os.environ["LLMC_REAL_MODEL"])


@pytest.fixture(scope="session")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its canonical checkpoint."""
    folder = tmp_path_factory.mktemp("real-model") / "checkpoint"
    llmc("convert", source, folder)
    return folder
