"""`llmc verify`: source, checkpoint, engine and server of tiny models, and what was done to them."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc import checkpoint as checkpoints
from llmc import cli, manifest, verified
from llmc.builders import ort
from llmc.checkpoint import Checkpoint
from llmc.converters.export import export
from llmc.quant.quantize import quantize
from llmc.recipe import QuantRecipe, WeightFormat

Folder = Callable[[str], Path]
FAMILIES = ["qwen2", "opt-350m", "bloom", "glm4", "mixtral", "qwen2-moe-window", "llama-longrope"]
WORKS = ["embeddings", "layer 0", "layer 1"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(each) for each in arguments])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """`llmc verify` of things that can be compared: its status and its figures."""

    def call(*arguments: object) -> tuple[int, dict[str, Any]]:
        path = tmp_path / "figures.json"
        status, out, err = run(capsys, "verify", *arguments, "--json", path)
        figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        assert (status == 0) == figures["within"], err
        assert ("BEYOND" in out) == (status == 3) == ("differs from" in err)
        return status, figures

    return call


@pytest.fixture(scope="module")
def engine_of(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]
) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("verify-engine")

    def engine(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            ort.build(tiny_checkpoint(name), folder, max_length=96)
        return folder

    return engine


@pytest.mark.parametrize("name", FAMILIES)
def test_source_checkpoint_and_engine_agree(
    name: str,
    verify: Any,
    tiny_source: Callable[[str], Path],
    tiny_checkpoint: Callable[[str], Path],
    engine_of: Callable[[str], Path],
) -> None:
    for a, b in ((tiny_source(name), engine_of(name)), (engine_of(name), tiny_checkpoint(name))):
        status, figures = verify(a, b)
        assert status == 0
        assert figures["tokens"] > 800
        assert figures["relative_difference"] < 1e-5
        assert 0 <= figures["kl"] < 1e-9
        assert figures["top1"] > 0.999
        assert figures["first_layer"] is None
        assert set(WORKS) <= set(figures["layers"])
        assert max(figures["layers"].values()) < 3e-5


@pytest.fixture(scope="module")
def forms(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_source: Callable[[str], Path],
    tiny_checkpoint: Callable[[str], Path],
    engine_of: Callable[[str], Path],
) -> dict[str, Path]:
    """One model in every form."""
    root, name = tmp_path_factory.mktemp("verify-forms"), "qwen1"
    for form in ("hf", "paddle", "gguf"):
        export(form, tiny_checkpoint(name), root / form)
    source, checkpoint, engine = tiny_source(name), tiny_checkpoint(name), engine_of(name)
    named = {"original": source, "checkpoint": checkpoint, "engine": engine, "hf": root / "hf"}
    return named | {"paddle": root / "paddle", "gguf": root / "gguf/model.gguf", "gguf-folder": root / "gguf"}


FORMS = ("original", "hf", "paddle", "gguf", "gguf-folder", "checkpoint", "engine")


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(FORMS, 2)))
def test_every_form_agrees_with_every_other(one: str, other: str, verify: Any, forms: dict[str, Path]) -> None:
    assert set(forms) == set(FORMS)
    status, figures = verify(forms[one], forms[other], "--max-tokens", 200)
    assert status == 0
    assert figures["relative_difference"] < 1e-5
    assert set(WORKS) <= set(figures["layers"])
    kinds = {"checkpoint": "checkpoint", "engine": "engine", "hf": "hf"}
    assert [figures[at]["kind"] for at in "ab"] == [kinds.get(form, "source") for form in (one, other)]


def test_llmc_s_own_class_in_transformers_agrees_as_well(
    verify: Any, tiny_source: Folder, tiny_checkpoint: Folder, engine_of: Folder, tmp_path: Path
) -> None:
    name = "baichuan2-13b"
    export("hf", tiny_checkpoint(name), tmp_path / "hf")
    for other in (tiny_source(name), tiny_checkpoint(name), engine_of(name)):
        status, figures = verify(tmp_path / "hf", other)
        assert status == 0
        assert (figures["a"]["kind"], figures["first_layer"]) == ("hf", None)
        assert set(WORKS) <= set(figures["layers"])


def test_what_a_result_says_of_a_source(verify: Any, forms: dict[str, Path], tmp_path: Path) -> None:
    engine = Path(shutil.copytree(forms["engine"], tmp_path / "engine"))
    for form in ("original", "gguf", "gguf-folder", "paddle"):
        assert verify(forms[form], engine, "--save", "--max-tokens", 100)[0] == 0
    against = [entry.against for entry in verified.read(engine)]
    assert {entry.kind for entry in against} == {"source", "export"}
    assert manifest.sha256_of(forms["original"] / "config.json") in {entry.sha256 for entry in against}
    assert manifest.sha256_of(forms["gguf"]) in {entry.sha256 for entry in against}


@pytest.fixture(scope="module")
def perturbed(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]) -> Path:
    """qwen2 with one weight of layer 1 changed."""
    source, folder = Checkpoint(tiny_checkpoint("qwen2")), tmp_path_factory.mktemp("verify") / "perturbed"

    def load(name: str) -> Any:
        values = source[name]
        if name == "layers.1.mlp.down.weight":
            values[3, 5] += np.float32(0.5)
        return values

    with manifest.creating(folder) as work:
        checkpoints.write(work, source.spec, source.infos, load)
        source.copy_companions(work)
        manifest.seal(work, manifest.Manifest(kind="checkpoint", tools=manifest.tools()))
    return folder


def test_one_changed_weight_is_found_in_its_layer(
    verify: Any,
    perturbed: Path,
    tmp_path: Path,
    tiny_source: Callable[[str], Path],
    tiny_checkpoint: Callable[[str], Path],
    engine_of: Callable[[str], Path],
) -> None:
    ort.build(perturbed, tmp_path / "engine", max_length=96)
    for a, b in (
        (tiny_checkpoint("qwen2"), perturbed),
        (tiny_source("qwen2"), tmp_path / "engine"),
        (engine_of("qwen2"), tmp_path / "engine"),
    ):
        status, figures = verify(a, b)
        assert status == 3
        assert figures["first_layer"] == "layer 1"
        assert figures["layers"]["layer 0"] < 1e-5
        assert figures["layers"]["layer 1"] > 1e-3
    assert verify(perturbed, tmp_path / "engine")[0] == 0


def test_a_quantized_engine_is_within_a_tolerance_that_is_wide_enough(
    verify: Any, tmp_path: Path, tiny_checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, packed, engine = tiny_checkpoint("qwen2"), tmp_path / "q", tmp_path / "engine"
    quantize(source, packed, QuantRecipe(algorithm="rtn", weights=WeightFormat(bits=8, group_size=32)))
    ort.build(packed, engine, arithmetic="float32")
    status, figures = verify(source, engine, "--save")
    assert status == 3
    assert figures["first_layer"] == "embeddings"
    assert verify(source, engine, "--tolerance", 0.2, "--save")[0] == 0
    assert verify(packed, engine, "--save")[0] == 0

    (wide, exact) = verified.read(engine)
    assert (wide.figures["tolerance"], wide.figures["within"]) == (0.2, True)
    assert wide.against == manifest.parent(source)
    assert exact.against == manifest.parent(packed)
    status, out, _ = run(capsys, "inspect", engine)
    assert status == 0
    assert out.count("verified") == 2
    assert "within 0.2 of checkpoint qwen2" in out


def test_a_saved_result_changes_no_identity_and_dies_with_its_artifact(
    verify: Any, tmp_path: Path, tiny_checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, engine = tmp_path / "checkpoint", tmp_path / "engine"
    shutil.copytree(tiny_checkpoint("qwen2"), source)
    ort.build(source, engine, max_length=96)
    before = manifest.parent(source)
    assert verify(engine, source, "--save")[0] == 0
    assert manifest.parent(source) == before == manifest.read(engine).parents[0]
    assert run(capsys, "inspect", source)[0] == run(capsys, "inspect", engine)[0] == 0
    ort.build(source, engine, max_length=80, overwrite=True)
    assert not (engine / verified.NAME).exists()
    changed = manifest.read(source).model_copy(update={"notes": {"another": "artifact"}})
    (source / manifest.NAME).write_text(changed.to_json(), encoding="utf-8")
    assert verified.read(source) == []


@pytest.fixture(scope="module")
def url(engine_of: Callable[[str], Path]) -> Iterator[str]:
    command = [sys.executable, "-m", "llmc.cli", "serve", str(engine_of("qwen2")), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield "http://" + server.stdout.readline().partition("http://")[2].split()[0]
        server.terminate()


def test_a_server_agrees_with_what_it_serves(
    verify: Any,
    url: str,
    perturbed: Path,
    tmp_path: Path,
    tiny_source: Callable[[str], Path],
    tiny_checkpoint: Callable[[str], Path],
    engine_of: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox; der schnelle Fuß 🙂 of the user. " * 9, encoding="utf-8")
    for a, b, *options in (
        (engine_of("qwen2"), url),
        (url, tiny_checkpoint("qwen2")),
        (tiny_source("qwen2"), f"{url}/v1/", "--text", text),
        (url, url),
    ):
        status, figures = verify(a, b, *options)
        assert status == 0
        assert figures["compared"] == "log-probabilities"
        assert figures["tokens"] > 200
        assert max(figures["relative_difference"], figures["top_max_difference"]) < 1e-4
        assert figures["top1"] > 0.999
        assert (figures["kl"], figures["layers"]) == (None, None)
    assert verify(perturbed, url)[0] == 3
    status, out, err = run(capsys, "verify", perturbed, url, "--save")
    assert (status, out) == (2, "")
    assert "has no manifest.json" in err


MISTAKES = [
    (["qwen2", "none"], 2, "none is none of these"),
    (["qwen2", "http://127.0.0.1:9"], 2, "does not answer"),
    (["qwen2", "wider"], 2, "chooses among 320 tokens, "),
    (["qwen2", "deeper"], 2, "2 layers of width 64, "),
    (["qwen2", "qwen2", "--text", "none"], 2, "cannot read the text"),
    (["qwen2", "qwen2", "--tolerance", "-1"], 2, "not in the range"),
]


@pytest.mark.parametrize(("arguments", "status", "words"), MISTAKES)
def test_a_mistake_is_said(
    arguments: list[str],
    status: int,
    words: str,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folders = {"qwen2": tiny_checkpoint("qwen2"), "deeper": tiny_checkpoint("qwen2-window")}
    if "wider" in arguments:
        folders["wider"] = wider(tiny_checkpoint("qwen2"), tmp_path / "wider")
    met, _, err = run(capsys, "verify", *(folders.get(each, each) for each in arguments))
    assert met == status
    assert words in err
    assert "Traceback" not in err


def wider(source: Path, folder: Path) -> Path:
    """A checkpoint with 8 more tokens."""
    found = Checkpoint(source)
    spec = found.spec.model_copy(update={"vocab_size": found.spec.vocab_size + 8})

    def load(name: str) -> Any:
        values = found[name]
        return np.pad(values, ((0, 8), (0, 0))) if name in ("embed.weight", "head.weight") else values

    infos = {name: checkpoints.TensorInfo(load(name).dtype, load(name).shape) for name in found}
    with manifest.creating(folder) as work:
        checkpoints.write(work, spec, infos, load)
        found.copy_companions(work)
        manifest.seal(work, manifest.Manifest(kind="checkpoint", tools=manifest.tools()))
    return folder
