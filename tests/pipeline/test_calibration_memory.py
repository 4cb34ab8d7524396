"""What calibrating a 7B model costs in memory: two layers of one, embedding and head, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny

from llmc import checkpoint as checkpoints
from llmc import manifest as manifests
from llmc.checkpoint import Checkpoint
from llmc.names import parts, tensors
from llmc.spec import ModelSpec
from llmc.tensors import TensorInfo

MEASURE = """
import json, sys
from pathlib import Path

def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

from llmc.quant import awq, by_layer, calibrate, gptq, quantize
from llmc.quant.corpus import Calibration
from llmc.recipe import QuantRecipe
before = kilobytes("VmRSS")  # what is imported is not what calibrating costs
recipe = QuantRecipe.model_validate_json(sys.argv[3])
calibration = Calibration(tokens=1024)
figures = quantize.quantize(Path(sys.argv[1]), Path(sys.argv[2]), recipe, calibration=calibration)
print(json.dumps([(kilobytes("VmHWM") - before) * 1024, figures.seconds]))
"""

RECIPES = {
    "gptq": {"algorithm": "gptq", "weights": {"bits": 4, "group_size": 128}},
    "awq": {"algorithm": "awq", "weights": {"bits": 4, "group_size": 128}},
    "kv": {"algorithm": "none", "kv_cache": {}},
}


@pytest.fixture(scope="module")
def two_layers(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaMA 7B's shapes in float16, random, written one tensor at a time; the tokenizer is a tiny one."""
    like = Checkpoint(tiny_checkpoint("llama")).spec.model_dump()
    like.update(vocab_size=32000, hidden_size=4096, num_layers=2, max_positions=2048)
    like["attention"].update(num_heads=32, num_kv_heads=32, head_dim=128)
    like["mlp"].update(intermediate_size=11008)
    spec = ModelSpec.model_validate(like)
    infos = {name: TensorInfo(np.dtype(np.float16), shape) for name, shape in tensors(spec).items()}
    random = np.random.default_rng(0)

    def draw(name: str) -> np.ndarray:
        shape = infos[name].shape
        if len(shape) == 1:
            return np.ones(shape, np.float16)
        return (random.standard_normal(shape, np.float32) * shape[1] ** -0.5).astype(np.float16)

    folder = tmp_path_factory.mktemp("seven") / "checkpoint"
    with manifests.creating(folder) as unfinished:
        hashes = checkpoints.write(unfinished, spec, infos, draw)
        tiny.save_tokenizer(unfinished)
        manifests.seal(unfinished, manifests.Manifest(kind="checkpoint", tools={}), hashes)
    return folder


def bound(spec: ModelSpec) -> int:
    """Embedding, three layers in float32, and 1,024 tokens' states and what is within a layer for 512 of them."""
    sizes = {
        part: sum(4 * int(np.prod(tensors(spec)[name])) for name in inside) for part, inside in parts(spec).items()
    }
    activations = 4 * (1024 * spec.hidden_size + 512 * (8 * spec.hidden_size + 4 * spec.mlp.intermediate_size))
    return sizes["front"] + 3 * sizes["layers.0"] + activations


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", RECIPES)
def test_memory_is_three_layers(name: str, two_layers: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(two_layers), str(tmp_path / "out"), json.dumps(RECIPES[name])]
    grown, seconds = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    limit = bound(Checkpoint(two_layers).spec)
    print(f"{name}: {grown / 1e9:.2f} GB of {limit / 1e9:.2f} GB in {seconds:.0f} s")
    assert grown < limit
