"""`.pdparams`: where in Paddle's pickle of numpy arrays each array lies, so that it is read like any other tensor.

`paddle.save` (python/paddle/framework/io.py) pickles a dictionary: name -> array, or name -> (another name, array),
with tables of names beside. The unpickler here knows arrays, tuples and dictionaries, makes none of the arrays, and
steps over their bytes; whatever else a file asks for is refused by its name, and nothing of it is called.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar, cast

import ml_dtypes
import numpy as np

from llmc.errors import CheckpointError
from llmc.tensors import TensorInfo

# As numpy writes them into pickles; Paddle keeps bfloat16 in numpy's uint16.
_DTYPES = {
    "f4": np.dtype(np.float32),
    "f2": np.dtype(np.float16),
    "f8": np.dtype(np.float64),
    "u2": np.dtype(ml_dtypes.bfloat16),
    "i8": np.dtype(np.int64),
    "i4": np.dtype(np.int32),
    "i1": np.dtype(np.int8),
    "u1": np.dtype(np.uint8),
    "b1": np.dtype(np.bool_),
}


class _Bytes:
    """Bytes that were passed over."""

    def __init__(self, offset: int, count: int) -> None:
        self.offset, self.count = offset, count


class _DType:
    """Called as numpy.dtype is, by a pickle."""

    def __init__(self, code: str, *_: object) -> None:
        self.code, self.order = code, "<"

    def set_state(self, state: Any) -> None:
        self.order = state[1]


class _Array:
    """In place of an array; what it is, is told to `set_state`."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    data: _Bytes

    def __init__(self, *_: object) -> None: ...

    def set_state(self, state: Any) -> None:
        _version, shape, dtype, is_column_major, data = state
        if not isinstance(dtype, _DType) or not isinstance(data, _Bytes):
            raise pickle.UnpicklingError("an array without a type or data")
        if dtype.code not in _DTYPES or dtype.order not in "<|=":
            raise pickle.UnpicklingError(f"an array of {dtype.order}{dtype.code}")
        self.shape = tuple(int(size) for size in shape)
        if is_column_major and len(self.shape) > 1:
            raise pickle.UnpicklingError("an array that is stored column by column")
        self.dtype, self.data = _DTYPES[dtype.code], data


class _Marker:
    """numpy.ndarray, named in a pickle and never called."""


_KNOWN: dict[tuple[str, str], object] = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Marker,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("collections", "OrderedDict"): dict,
    ("builtins", "tuple"): tuple,
    ("__builtin__", "tuple"): tuple,
}

_Step = Callable[["_Unpickler"], None]


class _Unpickler(pickle._Unpickler):
    """Python's own, in Python: dictionaries, tuples, strings, numbers, and what `_KNOWN` lists."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: IO[bytes], size: int) -> None:
        super().__init__(file)
        self._file, self._size = file, size

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(f"the persistent object {pid!r}")

    def _skip(self, count: int) -> None:
        offset = self._file.tell()
        if offset + count > self._size:
            raise EOFError
        self._file.seek(count, 1)
        cast(Any, self).append(_Bytes(offset, count))

    def _frame(self) -> None:
        """Frames only say how much to read at once, and the file is read without them."""
        self._file.read(8)

    def _short_bytes(self) -> None:
        self._skip(self._file.read(1)[0])

    def _bytes(self) -> None:
        self._skip(struct.unpack("<I", self._file.read(4))[0])

    def _long_bytes(self) -> None:
        self._skip(struct.unpack("<Q", self._file.read(8))[0])

    def _build(self) -> None:
        stack = cast(Any, self).stack
        state = stack.pop()
        if not isinstance(stack[-1], _Array | _DType):
            raise pickle.UnpicklingError(f"a state for a {type(stack[-1]).__name__}")
        stack[-1].set_state(state)


_STEPS: dict[bytes, _Step] = {
    pickle.FRAME: _Unpickler._frame,
    pickle.SHORT_BINBYTES: _Unpickler._short_bytes,
    pickle.BINBYTES: _Unpickler._bytes,
    pickle.BINBYTES8: _Unpickler._long_bytes,
    pickle.BUILD: _Unpickler._build,
}
_Unpickler.dispatch.update({code[0]: step for code, step in _STEPS.items()})


def read_file(path: Path) -> dict[str, TensorInfo]:
    """All arrays of one file, by name.

    Raises:
        CheckpointError: The file is missing, damaged, or holds anything but arrays by name.
    """
    try:
        with path.open("rb") as file:
            state = _Unpickler(file, path.stat().st_size).load()
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was refused: it asks for {error}, and llmc takes nothing but arrays by name from a pickle. "
            "Save the model with safe_serialization in PaddleNLP"
        ) from None
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except Exception as error:  # A pickle is a program, and a damaged one may fail in any way.
        raise CheckpointError(f"{path} is damaged, or not a file of paddle.save: {error!r}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected arrays by name")
    return dict(_tensor(path, name, value) for name, value in state.items() if not isinstance(value, dict))


def _tensor(path: Path, name: object, value: object) -> tuple[str, TensorInfo]:
    array = value[-1] if isinstance(value, tuple) and value else value
    if not isinstance(name, str) or not isinstance(array, _Array) or not hasattr(array, "data"):
        raise CheckpointError(f"{path}: {name!r} is a {type(array).__name__.lstrip('_').lower()}, expected an array")
    info = TensorInfo(array.dtype, array.shape, path, array.data.offset)
    if info.nbytes != array.data.count:
        raise CheckpointError(f"{path}: '{name}' {list(info.shape)} has {array.data.count} bytes")
    return name, info
