"""Optional packages: `need("onnxruntime")` gives the module, or an error with the line that installs it.

The table below says which extra of setup.cfg brings which module; a test compares the two.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from llmc.errors import MissingDependencyError

EXTRA_OF_MODULE = {
    "accelerate": "train",
    "flask": "serve",
    "waitress": "serve",
    "gguf": "convert",
    "gunicorn": "serve",
    "llguidance": "serve",
    "matplotlib": "train",
    "modelopt": "quantize",
    "onnx_ir": "build",
    "onnxruntime": "serve",
    "prometheus_client": "serve",
    "tensorrt_llm": "tensorrt-llm",
    "torch": "train",
    "transformers": "train",
}


def need(module: str) -> ModuleType:
    """Import `module` (a dotted name).

    Raises:
        MissingDependencyError: It is not installed; the message has the pip line.
    """
    top = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != top:
            raise
        extra = EXTRA_OF_MODULE[top]
        raise MissingDependencyError(
            f"this needs the package that provides '{top}', which is not installed here: "
            f'pip install "llmc-toolkit[{extra}]"'
        ) from None


def installed(module: str) -> bool:
    """Whether `need(module)` would find the package; nothing is imported."""
    try:
        return importlib.util.find_spec(module.partition(".")[0]) is not None
    except ModuleNotFoundError:
        return False
