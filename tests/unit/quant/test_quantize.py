"""llmc.quant.quantize: what a quantized checkpoint holds, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from llmc import manifest as manifests
from llmc import names
from llmc.checkpoint import Checkpoint
from llmc.errors import UserError
from llmc.model import load
from llmc.quant import algorithm, corpus, pack
from llmc.quant.corpus import Calibration
from llmc.quant.quantize import quantize
from llmc.recipe import ActivationFormat, KVCacheFormat, QuantRecipe, WeightFormat
from llmc.tokenizer import Tokenizer

INT4 = WeightFormat(bits=4, group_size=32)
RTN = QuantRecipe(algorithm="rtn", weights=INT4)
KV_ONLY = QuantRecipe(algorithm="none", kv_cache=KVCacheFormat())


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog and there the user. " * 40, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["llama", "llama-bias", "qwen2.5-tied", "qwen3"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_matrix_stands_for_its_rounded_self(
    name: str, symmetric: bool, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = Checkpoint(tiny_checkpoint(name))
    weight_format = WeightFormat(bits=4, group_size=32, symmetric=symmetric)
    figures = quantize(source.folder, tmp_path / "q", QuantRecipe(algorithm="rtn", weights=weight_format))
    found = Checkpoint(tmp_path / "q")
    manifests.verify(found.folder, found.manifest)
    decoder = load(found).state_dict()
    matrices = names.matrices(source.spec)
    assert list(figures.errors) == matrices
    for tensor in source:
        exact, met = source[tensor].astype(np.float32), decoder[tensor].numpy()
        if tensor.removesuffix(".weight") in matrices:
            assert f"{tensor.removesuffix('.weight')}.qweight" in found
            assert tensor not in found
            relative = np.linalg.norm(exact - met) / np.linalg.norm(exact)
            assert figures.errors[tensor.removesuffix(".weight")] == pytest.approx(relative, rel=1e-4)
            assert 0.01 < relative < 0.2
        else:
            np.testing.assert_array_equal(exact, met)


def test_tied_matrix_is_one_matrix(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    quantize(tiny_checkpoint("llama-tied"), tmp_path / "q", RTN)
    found = Checkpoint(tmp_path / "q")
    assert "embed.qweight" in found
    assert not [name for name in found if name.startswith("head")]
    assert load(found).head is None


def test_what_is_kept_is_kept(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = Checkpoint(tiny_checkpoint("llama"))
    recipe = RTN.model_copy(update={"keep": ("head", "layers.*.mlp.*")})
    figures = quantize(source.folder, tmp_path / "q", recipe)
    found = Checkpoint(tmp_path / "q")
    assert found.recipe == recipe
    assert figures.kept == [
        *(f"layers.{layer}.mlp.{name}" for layer in range(2) for name in ("gate", "up", "down")),
        "head",
    ]
    for name in figures.kept:
        np.testing.assert_array_equal(found[f"{name}.weight"], source[f"{name}.weight"])


def test_overrides_have_their_own_format(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    eight = WeightFormat(bits=8, group_size=16, symmetric=False)
    recipe = RTN.model_copy(update={"overrides": {"*.down": eight}})
    figures = quantize(tiny_checkpoint("llama"), tmp_path / "q", recipe)
    by_kind = {name: error < 0.02 for name, error in figures.errors.items()}
    assert by_kind == {name: name.endswith("down") for name in figures.errors}
    load(Checkpoint(tmp_path / "q"))


def test_figures_are_those_of_the_files(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    figures = quantize(tiny_checkpoint("llama"), tmp_path / "q", RTN)
    found = Checkpoint(tmp_path / "q")
    assert figures.bytes_after == sum(info.nbytes for info in found.infos.values())
    assert figures.bytes_after < 0.2 * figures.bytes_before
    assert figures.worst is not None
    assert figures.errors[figures.worst] == max(figures.errors.values())


def test_folder_is_complete_and_reproducible(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, text: Path
) -> None:
    source = tiny_checkpoint("llama")
    recipe = RTN.model_copy(update={"kv_cache": KVCacheFormat()})
    for name in ("one", "two"):
        quantize(source, tmp_path / name, recipe, calibration=Calibration(path=text, window=64, tokens=256))
    one, two = manifests.read(tmp_path / "one"), manifests.read(tmp_path / "two")
    assert one == two
    assert [parent.kind for parent in one.parents] == ["checkpoint", "text"]
    assert one.parents[0] == manifests.parent(source)
    carried = {name for name in manifests.read(source).files if name.startswith(("tokenizer", "source/", "chat_"))}
    assert carried
    assert carried < set(one.files)


def test_kv_cache_alone(tiny_checkpoint: Callable[[str], Path], tmp_path: Path, text: Path) -> None:
    source = Checkpoint(tiny_checkpoint("llama"))
    figures = quantize(source.folder, tmp_path / "q", KV_ONLY, calibration=Calibration(path=text))
    found = Checkpoint(tmp_path / "q")
    assert figures.errors == {}
    for name in source:
        np.testing.assert_array_equal(source[name], found[name])
    extra = [name for name in found if name not in source]
    assert extra == [f"layers.{layer}.attn.{kind}_scale" for layer in range(2) for kind in "kv"]
    tokens = torch.tensor([Tokenizer.load(source.folder).encode(text.read_text(encoding="utf-8"))[:60]])
    exact, met = load(source)(tokens), load(found)(tokens)
    assert 1e-4 < float((exact - met).abs().max()) < 0.05 * float(exact.abs().max())


ROWS = WeightFormat(bits=8, group_size=0)


@pytest.mark.parametrize(
    "recipe",
    [
        RTN,
        QuantRecipe(algorithm="awq", weights=INT4),
        QuantRecipe(
            algorithm="smoothquant", weights=ROWS, outside=INT4, activations=ActivationFormat(), options={"alpha": 0.8}
        ),
    ],
    ids=lambda recipe: recipe.algorithm,
)
def test_a_kv_cache_beside_weights_has_the_scales_of_the_values_that_come(
    recipe: QuantRecipe, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, text: Path
) -> None:
    """AWQ and SmoothQuant divide the rows of v: the original's scales would clip them, or waste codes."""
    source = tiny_checkpoint("llama")
    calibration = Calibration(path=text, window=64, tokens=256)
    quantize(source, tmp_path / "q", recipe.model_copy(update={"kv_cache": KVCacheFormat()}), calibration=calibration)
    found = Checkpoint(tmp_path / "q")
    decoder, reach = load(found), torch.zeros(found.spec.kv_size)

    def look(_: torch.nn.Module, __: object, values: torch.Tensor) -> None:
        torch.maximum(reach, values.abs().amax(dim=tuple(range(values.dim() - 1))), out=reach)

    decoder.get_submodule("layers.0.attn.v").register_forward_hook(look)
    for window in corpus.read(calibration, Tokenizer.load(source), 64).windows:
        decoder(torch.from_numpy(window)[None])
    np.testing.assert_allclose(reach / torch.from_numpy(found["layers.0.attn.v_scale"]), 127, rtol=1e-4)


def test_a_quantized_checkpoint_is_given_a_kv_cache(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, text: Path
) -> None:
    """The same, byte by byte, as both in one run."""
    source, calibration = tiny_checkpoint("llama"), Calibration(path=text, window=64, tokens=256)
    both = RTN.model_copy(update={"kv_cache": KVCacheFormat()})
    quantize(source, tmp_path / "both", both, calibration=calibration)
    quantize(source, tmp_path / "first", RTN)
    figures = quantize(tmp_path / "first", tmp_path / "then", KV_ONLY, calibration=calibration)
    once, then = Checkpoint(tmp_path / "both"), Checkpoint(tmp_path / "then")
    assert then.recipe == once.recipe == figures.recipe
    assert (tmp_path / "then" / "model.safetensors").read_bytes() == (
        tmp_path / "both" / "model.safetensors"
    ).read_bytes()
    assert then.manifest.parents[0] == manifests.parent(tmp_path / "first")
    assert figures.bytes_after - figures.bytes_before == 2 * 2 * 4 * once.spec.kv_size
    with pytest.raises(UserError, match="quantized already"):
        quantize(tmp_path / "then", tmp_path / "again", KV_ONLY)


def test_values_stay_in_the_source_type(
    tiny_source: Callable[[str], Path], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """bf16 weights are widened to be rounded, not stored wide."""
    from llmc.converters import hf

    hf.convert(tiny.save(tiny.TINY["llama"], tmp_path / "hf", dtype="bfloat16"), tmp_path / "bf16")
    quantize(tmp_path / "bf16", tmp_path / "q", RTN)
    found = Checkpoint(tmp_path / "q")
    assert {str(found.infos[name].dtype) for name in found if name.endswith("norm.weight")} == {"bfloat16"}
    assert load(found).norm.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": ("heads",)}, "no matrix fits 'heads' \\(did you mean 'head'\\?\\)"),
        ({"keep": ("layers.7.*",)}, "no matrix fits 'layers.7.\\*'.*There are embed, layers.\\*.attn.q"),
        ({"keep": ("*",)}, "nothing is left to quantize"),
        ({"algorithm": "best"}, "there is no algorithm 'best'; there are rtn, gptq, awq"),
        ({"algorithm": "none"}, "--algo none"),
        (
            {"algorithm": "gptq", "options": {"act_oder": True}},
            "options of gptq: unknown field 'act_oder'.*'act_order'",
        ),
        ({"algorithm": "gptq", "options": {"damping": 0.0}}, "options of gptq: 'damping'"),
        ({"algorithm": "awq", "options": {"steps": 0}}, "options of awq: 'steps'"),
        ({"options": {"act_order": True}}, "options of rtn: unknown field 'act_order'"),
    ],
    ids=lambda value: "",
)
def test_what_is_refused(
    changes: dict[str, Any], message: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        quantize(tiny_checkpoint("llama"), tmp_path / "q", RTN.model_copy(update=changes))
    assert list(tmp_path.iterdir()) == []


def test_head_of_a_tied_model_cannot_be_kept(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its embedding: keep 'embed'"):
        quantize(tiny_checkpoint("llama-tied"), tmp_path / "q", RTN.model_copy(update={"keep": ("head",)}))


def test_twice_is_refused(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    quantize(tiny_checkpoint("llama"), tmp_path / "q", RTN)
    with pytest.raises(UserError, match="quantized already \\(by rtn\\)"):
        quantize(tmp_path / "q", tmp_path / "qq", RTN)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\xfa", None], ids=["empty", "not UTF-8", "missing"])
def test_calibration_text_must_be_text(
    content: bytes | None, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"text\.txt"):
        quantize(tiny_checkpoint("llama"), tmp_path / "q", KV_ONLY, calibration=Calibration(path=path))
    assert not (tmp_path / "q").exists()


def test_one_matrix_in_memory(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor is read only when the one before it has been written."""
    events: list[str] = []
    read, pieces = Checkpoint.__getitem__, pack.Packed.pieces

    def reading(self: Checkpoint, name: str) -> Any:
        events.append(f"read {name}")
        return read(self, name)

    def writing(self: pack.Packed, module: str) -> Any:
        for name, values in pieces(self, module):
            yield name, values
            events.append(f"wrote {name}")

    monkeypatch.setattr(Checkpoint, "__getitem__", reading)
    monkeypatch.setattr(pack.Packed, "pieces", writing)
    quantize(tiny_checkpoint("llama"), tmp_path / "q", RTN)
    assert events[:4] == [
        "read embed.weight",
        "wrote embed.qweight",
        "wrote embed.scale",
        "read layers.0.attn_norm.weight",
    ]


def test_table_of_algorithms_is_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every algorithm can be had, and has the face that the driver knows."""
    monkeypatch.setattr(algorithm, "has_cuda", lambda: True)
    seen = 0
    for name in algorithm.ALGORITHMS:
        found = algorithm.algorithm(name)
        assert isinstance(found.CALIBRATES, bool)
        assert callable(found.prepare)
        found.Options()
        seen += 1
    assert seen == len(algorithm.ALGORITHMS) >= 3


def test_quantizing_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, llmc.quant.quantize, llmc.quant.rtn; print(json.dumps([m for m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "onnx"} & set(json.loads(done.stdout))
