"""What an engine folder says of itself: the seam between the builders, that write it, and the server, that opens it.

    manifest.json     kind "engine"
    engine.json       Engine, below
    ...               the backend's own files
    tokenizer.json  tokenizer_config.json  chat_template.jinja ...      so that the folder is all a server needs

Does not know: what any backend's files hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import PositiveInt

from llmc import manifest as manifests
from llmc.config import Strict, parse
from llmc.errors import ConfigError, ManifestError
from llmc.spec import ModelSpec

NAME = "engine.json"

DeviceName = Literal["cpu", "cuda"]
CacheType = Literal["float32", "float16", "int8"]

_BYTES = {"float32": 4, "float16": 2, "int8": 1}


class Engine(Strict):
    """The contents of `engine.json`.

    Attributes:
        backend: Which runner opens it (llmc/serve/runners).
        max_length: Tokens of the longest sequence, prompt and output together.
        device: What it was built for.
        compute: The type of what goes from layer to layer.
        kv_cache: How keys and values are kept.
        lora: Low-rank adapters can be served beside the model.
        weights: How matrices are stored, and how many in each way: for people.
        kernels: What computes those of each way, for people.
    """

    backend: Literal["ort"]
    spec: ModelSpec
    max_length: PositiveInt
    device: DeviceName = "cpu"
    compute: Literal["float32", "float16"] = "float32"
    kv_cache: CacheType
    weights: dict[str, int]
    kernels: dict[str, str] = {}
    lora: bool = False

    @property
    def cache_token_bytes(self) -> int:
        """Bytes of the keys and values of one token, in all layers."""
        return 2 * self.spec.num_layers * self.spec.kv_size * _BYTES[self.kv_cache]

    def save(self, folder: Path) -> None:
        (folder / NAME).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def open_engine(folder: Path) -> Engine:
    """Read an engine's description, after every byte of the folder was found to be what its builder wrote.

    Raises:
        ManifestError: It is not an engine, is of another schema, or a file was changed.
    """
    manifests.verify(folder, manifests.read(folder, "engine"))
    return describe(folder)


def describe(folder: Path) -> Engine:
    """Read an engine's description alone.

    Raises:
        ManifestError: It cannot be understood.
    """
    try:
        return parse(Engine, (folder / NAME).read_bytes(), where=str(folder / NAME))
    except (OSError, ConfigError) as error:
        raise ManifestError(f"{folder}: {error}") from None
