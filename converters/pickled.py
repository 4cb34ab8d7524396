"""`pytorch_model.bin`: where in the file each tensor lies, so that it is read like any other.

torch's restricted unpickler (`weights_only=True`) reads the structure alone, onto the "meta" device: no code of the
file runs and no data is touched, and every storage remembers its offset in the zip archive, where it lies
uncompressed.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmc.converters.cast import FLOATS
from llmc.errors import CheckpointError
from llmc.need import need
from llmc.tensors import TensorInfo

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


def read_folder(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of `pytorch_model.bin`, or of the shards that its index names.

    Raises:
        CheckpointError: A file is missing, damaged, of the format before PyTorch 1.6, or holds anything but tensors.
        MissingDependencyError: torch is not installed.
    """
    if not (folder / INDEX).is_file():
        return read_file(folder / SINGLE)
    try:
        weight_map: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX} is not an index of shards: {error!r}") from None
    found: dict[str, TensorInfo] = {}
    for name in shards:
        if Path(name).name != name:
            raise CheckpointError(f"{folder / INDEX} names the shard '{name}', which is not a plain file name")
        found |= read_file(folder / name)
    for tensor, name in weight_map.items():
        if tensor not in found:
            raise CheckpointError(f"{folder / INDEX} says that '{tensor}' is in {name}, which does not hold it")
    return found


def read_file(path: Path) -> dict[str, TensorInfo]:
    """All tensors of one file; see `read_folder`."""
    state = read_structure(path)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected tensors by name")
    return {name: locate(path, name, value) for name, value in state.items()}


def read_structure(path: Path, allowed: Mapping[str, Callable[..., Any]] | None = None) -> Any:
    """What a file of torch.save holds, its tensors on the "meta" device, for `locate`.

    Args:
        allowed: Names of classes outside torch that the file may mention -> what is called in their place.

    Raises:
        CheckpointError: The file is missing, damaged, of the format before PyTorch 1.6, or mentions anything else.
        MissingDependencyError: torch is not installed.
    """
    torch = need("torch")
    _check_archive(path)
    try:
        with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in (allowed or {}).items()]):
            return torch.load(path, weights_only=True, map_location="meta")
    except pickle.UnpicklingError as error:
        met = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise CheckpointError(
            f"{path} was refused: it holds more than tensors{f' ({met[1]})' if met else ''}, and unpickling that would "
            "run code of whoever made it. Ask for the model as safetensors"
        ) from None
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {(str(error) or repr(error)).splitlines()[0]}") from None


def _check_archive(path: Path) -> None:
    """Refuse what cannot be read in place: no zip archive, compressed entries, big-endian numbers."""
    try:
        with zipfile.ZipFile(path) as archive:
            order = [archive.read(name) for name in archive.namelist() if name.endswith("/byteorder")]
            is_packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} is cut short, or in the format before PyTorch 1.6 ({error}): "
            "load and save it once with torch, or take the model as safetensors"
        ) from None
    if is_packed or order not in ([], [b"little"]):
        raise CheckpointError(f"{path} is compressed or big-endian: load and save it once with torch")


def locate(path: Path, name: object, value: Any) -> TensorInfo:
    """Where in `path` the data of a tensor of its `read_structure` lies.

    Raises:
        CheckpointError: It is not a tensor of floating-point numbers that lies there row by row.
    """
    torch = need("torch")
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise CheckpointError(f"{path}: {name!r} is a {type(value).__name__}, expected a tensor")
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in FLOATS:
        raise CheckpointError(f"{path}: '{name}' is {dtype}, and llmc converts {', '.join(FLOATS)}")
    if not value.is_contiguous():
        raise CheckpointError(f"{path}: '{name}' is not stored row by row: load and save it once as safetensors")
    # The attribute is torch's own way of telling (torch/serialization.py, persistent_load), under the pinned version.
    offset = value.untyped_storage()._checkpoint_offset + value.storage_offset() * value.element_size()
    return TensorInfo(FLOATS[dtype], tuple(value.shape), path, offset)
