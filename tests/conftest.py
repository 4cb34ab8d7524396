"""Fixtures that more than one folder of tests uses: tiny models on disk, made once a session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from hypothesis import HealthCheck, settings

# Two cores are shared with everything else, and tiny models gain nothing from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The same examples every time, on machines of any speed; HYPOTHESIS_PROFILE=default looks for new ones.
settings.register_profile("llmc", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "llmc"))


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a tiny model -> its Hugging Face folder."""
    root = tmp_path_factory.mktemp("tiny-source")

    def source(name: str) -> Path:
        folder = root / name
        return folder if folder.exists() else tiny.save(tiny.TINY[name], folder)

    return source


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_source: Callable[[str], Path]
) -> Callable[[str], Path]:
    """Name of a tiny model -> its canonical checkpoint."""
    root = tmp_path_factory.mktemp("tiny-checkpoint")

    def checkpoint(name: str) -> Path:
        from llmc.converters import hf

        folder = root / name
        if not folder.exists():
            hf.convert(tiny_source(name), folder)
        return folder

    return checkpoint
