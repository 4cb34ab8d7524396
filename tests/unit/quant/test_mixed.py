"""llmc.quant.mixed: bits go where they save most for a byte, and every byte is counted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from llmc import names
from llmc.checkpoint import Checkpoint
from llmc.errors import UserError
from llmc.evaluate.quality import sensitivity
from llmc.model import load
from llmc.quant.corpus import Calibration
from llmc.quant.mixed import Mix, bits_by_part, matrices_by_part, parameters
from llmc.quant.quantize import quantize
from llmc.recipe import ActivationFormat, QuantRecipe, WeightFormat
from llmc.runtime import Tokens

INT4 = WeightFormat(bits=4, group_size=32)
INT8 = WeightFormat(bits=8, group_size=32)
RTN = QuantRecipe(algorithm="rtn", weights=INT4)
KL = {"front": 0.1, "layers.0": 0.4, "layers.1": 0.2, "tail": 0.3}
FAMILIES = ["llama", "llama-tied", "qwen3", "gpt2", "mixtral"]


def size(checkpoint: Checkpoint, folder: Path, recipe: QuantRecipe) -> float:
    """Bits of the files' tensors for each of transformers' parameters."""
    quantize(checkpoint.folder, folder, recipe)
    return 8 * sum(info.nbytes for info in Checkpoint(folder).infos.values()) / count(checkpoint)


def count(checkpoint: Checkpoint) -> int:
    return sum(values.numel() for values in load(checkpoint).parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_have_all_matrices_and_parameters(name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(tiny_checkpoint(name))
    decoder = load(checkpoint)
    linears = {
        key
        for key, module in decoder.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding) and not key.endswith(("router", "positions"))
    }
    found = matrices_by_part(checkpoint.spec)
    assert {matrix for inside in found.values() for matrix in inside} == linears
    assert parameters(checkpoint.spec) == count(checkpoint)


@pytest.mark.parametrize("target", [5.5, 6.5, 8.0, 9.3, 20.0])
def test_a_target_is_met_and_used(target: float, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Never above it; and no single step more would have fitted."""
    checkpoint = Checkpoint(tiny_checkpoint("llama"))
    mix = Mix(checkpoint, RTN, KL)
    recipe = mix.fit(target)
    assert size(checkpoint, tmp_path / "q", recipe) <= target
    up = {None: None, 8: None, 4: 8}
    got = bits_by_part(checkpoint.spec, recipe)
    for part, widths in got.items():
        if (width := widths[0]) is not None:
            more = mix.recipe({**mix.levels, part: up[width]})
            assert 8 * plan_bytes(mix, checkpoint, more) / count(checkpoint) > target


def plan_bytes(mix: Mix, checkpoint: Checkpoint, recipe: QuantRecipe) -> int:
    return Mix(checkpoint, recipe, {}).bytes()


def test_it_is_nearly_the_best_choice(tiny_checkpoint: Callable[[str], Path]) -> None:
    """Against every choice there is, at many targets: greedy is behind the best by less than one step."""
    checkpoint = Checkpoint(tiny_checkpoint("llama"))
    remaining = {4: 1.0, 8: 1 / 289, None: 0.0}
    mix = Mix(checkpoint, RTN, KL)
    choices = []
    for levels in itertools.product((4, 8, None), repeat=len(KL)):
        chosen = {part: level for part, level in zip(KL, levels, strict=True) if level != 4}
        left = sum(KL[part] * remaining[level] for part, level in zip(KL, levels, strict=True))
        choices.append((8 * mix.bytes(chosen) / parameters(checkpoint.spec), left))
    seen = 0
    for target in (5.3, 6, 7, 8, 9, 10, 15):
        mix = Mix(checkpoint, RTN, KL)
        mix.fit(target)
        best = min(left for bits, left in choices if bits <= target)
        assert best - 1e-9 <= mix.expected < best + max(KL.values())
        seen += mix.expected == pytest.approx(best)
    assert seen >= 4


def test_kept_parts_are_as_they_were(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("llama"))
    mix = Mix(checkpoint, RTN, KL)
    recipe = mix.recipe({"layers.1": None, "tail": None, "front": 8})
    assert (recipe.keep, recipe.overrides) == (("layers.1.*", "head"), {"embed": INT8})
    quantize(checkpoint.folder, tmp_path / "q", recipe)
    found = load(Checkpoint(tmp_path / "q")).state_dict()
    exact = load(checkpoint).state_dict()
    same = {name for name in exact if torch.equal(exact[name], found[name])}
    assert {"head.weight", "layers.1.attn.q.weight", "layers.1.mlp.down.weight"} <= same
    assert not {"embed.weight", "layers.0.attn.q.weight"} & same


def test_what_the_user_chose_stays(tiny_checkpoint: Callable[[str], Path]) -> None:
    own = WeightFormat(bits=8, group_size=16)
    recipe = RTN.model_copy(update={"keep": ("embed",), "overrides": {"layers.0.attn.q": own}})
    found = Mix(Checkpoint(tiny_checkpoint("llama")), recipe, KL).recipe({"layers.0": 8})
    names = ("embed", "layers.0.attn.q", "layers.0.attn.k", "layers.1.attn.k")
    assert [found.format_of(name) for name in names] == [None, own, INT8, INT4]


def test_too_few_bits_are_refused(tiny_checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"4\.8 bits a parameter are not enough: .* the recipe has 5\.\d\d before"):
        Mix(Checkpoint(tiny_checkpoint("llama")), RTN, KL).fit(4.8)


def test_steps_are_those_that_save_most_for_a_byte(tiny_checkpoint: Callable[[str], Path]) -> None:
    """With KL alike, the small parts come first; 8 bits are left out where they are the recipe's own."""
    checkpoint = Checkpoint(tiny_checkpoint("llama"))
    spec = checkpoint.spec
    alike = Mix(checkpoint, RTN, dict.fromkeys(KL, 0.1))
    assert alike.reduce(0.9) is not None
    sizes = {
        part: sum(v.numel() for n, v in load(checkpoint).state_dict().items() if n.startswith(part)) for part in KL
    }
    del sizes["front"], sizes["tail"]
    sizes |= {"front": spec.vocab_size * spec.hidden_size, "tail": spec.vocab_size * spec.hidden_size}
    assert list(alike.levels.values()) == [8]
    assert sizes[next(iter(alike.levels))] == min(sizes.values())
    eight = Mix(checkpoint, RTN.model_copy(update={"weights": INT8}), KL)
    eight.reduce(0.9)
    assert set(eight.levels.values()) == {None}


def test_a_target_with_real_sensitivity(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The whole run: sensitivity as measured, bits within the target, less lost than by the same bytes elsewhere."""
    source = tiny_checkpoint("llama-bias")
    figures = quantize(source, tmp_path / "q", RTN, probe=sensitivity, target_bits=7.0)
    assert set(figures.sensitivity) == {"front", "layers.0", "layers.1", "tail"}
    assert all(kl > 0 for kl in figures.sensitivity.values())
    report = figures.report()
    assert 6 < report["bits_per_parameter"] <= 7
    assert report["bits_by_part"] == bits_by_part(Checkpoint(source).spec, figures.recipe)
    assert (tmp_path / "q" / "report.png").is_file()
    widths = [width for part in report["bits_by_part"].values() for width in part]
    assert {4, 8} <= set(widths)


ROWS, FP8 = WeightFormat(bits=8, group_size=0), WeightFormat(kind="fp8", bits=8, group_size=0)
ROUNDED = {
    "w8a8": QuantRecipe(algorithm="w8a8", weights=ROWS, outside=INT8, activations=ActivationFormat()),
    "smoothquant": QuantRecipe(
        algorithm="smoothquant",
        weights=ROWS,
        outside=INT8,
        activations=ActivationFormat(dynamic=False),
        options={"alpha": 0.5, "shift": True},
    ),
    "fp8": QuantRecipe(algorithm="fp8", weights=FP8, outside=INT8, activations=ActivationFormat(kind="fp8")),
    "4 bits": QuantRecipe(algorithm="rtn", weights=INT4, outside=INT8, activations=ActivationFormat()),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_activations(name: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """What costs most goes up to what the original has, and costs nothing then; embedding and head keep theirs."""
    source, recipe = Checkpoint(tiny_checkpoint("llama-bias")), ROUNDED[name]
    lowest = 8 * plan_bytes(Mix(source, recipe, KL), source, recipe) / parameters(source.spec)
    target = 0.5 * (32 + lowest)
    read: list[Tokens] = []

    def probe(original: Checkpoint, result: Checkpoint, windows: Sequence[Tokens]) -> dict[str, float]:
        read.extend(windows)
        return sensitivity(original, result, windows)

    calibration = None if recipe.algorithm != "smoothquant" else Calibration(tokens=1024)
    figures = quantize(source.folder, tmp_path / "q", recipe, calibration=calibration, probe=probe, target_bits=target)
    made = Checkpoint(tmp_path / "q")
    assert 0.5 * lowest + 0.5 * target < figures.bits <= target
    assert made.recipe is not None
    raised = {
        matrix for matrix in names.matrices(source.spec) if made.recipe.format_of(matrix) != recipe.format_of(matrix)
    }
    assert raised
    for matrix in names.matrices(source.spec):
        found = made.recipe.format_of(matrix)
        if matrix in raised and found is None:
            assert made[f"{matrix}.weight"].dtype == source[f"{matrix}.weight"].dtype
            assert made.recipe.inputs_of(matrix) is None
        elif not matrix.startswith("layers."):
            assert found == INT8
    assert sum(sensitivity(source, made, read).values()) < 0.8 * sum(figures.sensitivity.values())
