"""The table of optional packages, against setup.cfg."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

from llmc import need
from llmc.errors import MissingDependencyError

ROOT = Path(__file__).resolve().parents[2]

# What a distribution is imported as, where that is not its name.
MODULE_OF = {
    "nvidia-modelopt": "modelopt",
    "onnx-ir": "onnx_ir",
    "onnxruntime-gpu": "onnxruntime",
    "prometheus-client": "prometheus_client",
    "tensorrt-llm": "tensorrt_llm",
}

# Installed for the sake of another package, never asked for by llmc: modelopt imports requests, onnx-ir's users onnx.
NOT_OURS = {"requests", "onnx"}


def extras() -> dict[str, set[str]]:
    """Extra -> modules that it brings."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    found = {}
    for extra, text in parser["options.extras_require"].items():
        names = [re.split(r"[<>=\[; ]", line, maxsplit=1)[0] for line in text.split("\n") if line.strip()]
        found[extra] = {MODULE_OF.get(name, name) for name in names}
    return found


def test_the_extra_named_for_a_module_brings_it() -> None:
    brings = extras()
    assert len(need.EXTRA_OF_MODULE) >= 10
    for module, extra in need.EXTRA_OF_MODULE.items():
        assert module in brings[extra], f"{extra} does not bring {module}"


def test_every_module_of_an_extra_for_users_is_in_the_table() -> None:
    looked = 0
    for extra, modules in extras().items():
        if extra not in ("dev", "oracles", "ray"):
            looked += 1
            assert modules - NOT_OURS <= need.EXTRA_OF_MODULE.keys(), extra
    assert looked >= 6


def test_dev_takes_every_extra_that_installs_everywhere() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    own = re.search(r"llmc-toolkit\[([^]]*)\]", parser["options.extras_require"]["dev"])
    assert own
    assert set(own[1].split(",")) == extras().keys() - {"dev", "oracles", "ray", "serve-cuda", "tensorrt-llm"}


def test_serve_cuda_is_serve_with_the_runtime_for_it_and_torch() -> None:
    assert extras()["serve-cuda"] - extras()["serve"] == {"torch"}
    assert extras()["serve"] < extras()["serve-cuda"]


def test_a_missing_module_is_an_error_with_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(need.EXTRA_OF_MODULE, "no_such_module", "serve")
    with pytest.raises(MissingDependencyError, match=r'pip install "llmc-toolkit\[serve\]"'):
        need.need("no_such_module.inner")


def test_an_import_that_fails_inside_a_module_is_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "half_broken.py").write_text("import no_such_thing_at_all\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(need.EXTRA_OF_MODULE, "half_broken", "serve")
    with pytest.raises(ModuleNotFoundError, match="no_such_thing_at_all"):
        need.need("half_broken")


def test_a_present_module_is_given() -> None:
    assert need.need("torch.nn").__name__ == "torch.nn"
