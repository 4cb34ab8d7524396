from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc import json_file, names
from llmc.converters import families, hf
from llmc.converters.families.llama import RULES
from llmc.converters.gguf_names import LAYOUTS, UNPERMUTE
from llmc.converters.gguf_names import rules as gguf_rules
from llmc.converters.rules import Op, Rule, Tensors, bind, from_canonical, source_names, to_canonical
from llmc.errors import CheckpointError
from llmc.spec import Attention, Mlp, ModelSpec, Norm, Rope
from llmc.tensors import TensorInfo


def spec_of(
    *, heads: int = 2, shared: int = 1, head_dim: int = 4, layers: int = 2, bias: bool = False, tied: bool = False
) -> ModelSpec:
    return ModelSpec(
        family="llama",
        vocab_size=10,
        hidden_size=8,
        num_layers=layers,
        max_positions=16,
        norm=Norm(eps=1e-6),
        position=Rope(),
        attention=Attention(
            num_heads=heads * shared, num_kv_heads=heads, head_dim=head_dim, qkv_bias=bias, o_bias=bias
        ),
        mlp=Mlp(intermediate_size=6, bias=bias),
        tied=tied,
    )


specs = st.builds(
    spec_of,
    heads=st.integers(1, 3),
    shared=st.integers(1, 3),
    head_dim=st.sampled_from([2, 4, 6]),
    layers=st.integers(1, 12),
    bias=st.booleans(),
    tied=st.booleans(),
)


def random_canonical(spec: ModelSpec, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in names.tensors(spec).items()}


def as_tensors(values: dict[str, np.ndarray]) -> Tensors:
    return Tensors({name: TensorInfo(v.dtype, v.shape) for name, v in values.items()}, values.__getitem__)


TABLES = {"hugging face": RULES, **{f"gguf {name}": gguf_rules(name) for name in LAYOUTS}}


@pytest.mark.parametrize("table", TABLES)
@given(spec=specs, seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_there_and_back_is_the_same_to_the_bit(table: str, spec: ModelSpec, seed: int) -> None:
    ours = random_canonical(spec, seed)
    theirs = from_canonical(TABLES[table], spec, as_tensors(ours))
    stored = {name: theirs.load(name) for name in theirs.infos}
    assert {name: value.shape for name, value in stored.items()} == {n: i.shape for n, i in theirs.infos.items()}
    assert sum(value.size for value in stored.values()) == sum(value.size for value in ours.values())
    back = to_canonical(TABLES[table], spec, as_tensors(stored), where="here")
    assert list(back.infos) == list(ours)
    for name, value in ours.items():
        assert np.array_equal(back.load(name), value), name


@pytest.mark.parametrize("name", tiny.TINY)
def test_names_are_those_that_transformers_saves(name: str, tiny_source: Callable[[str], Path]) -> None:
    config = json_file.read(tiny_source(name) / "config.json")
    family, spec = families.read_spec(config, name)
    saved = hf._read_weights(tiny_source(name))[0]
    assert {item.theirs for item in bind(family.rules, spec)} == set(saved)


def test_a_fused_tensor_is_cut_and_joined() -> None:
    """The room that Baichuan's W_pack, Bloom and ChatGLM will need: one tensor of theirs, three of ours."""

    def split(source: np.ndarray, shapes: object, spec: ModelSpec) -> list[np.ndarray]:
        return [source[: spec.q_size], source[spec.q_size : -spec.kv_size], source[-spec.kv_size :]]

    fused = Op(split, lambda parts, _: np.concatenate(parts), lambda s: (sum(n[0] for n in s), *s[0][1:]))
    qkv = tuple(f"layers.{{layer}}.attn.{part}.weight" for part in "qkv")
    rules = [rule for rule in RULES if rule.ours not in qkv] + [Rule(qkv, "h.{layer}.w_pack", fused)]
    spec = spec_of(shared=2)
    ours = random_canonical(spec, 0)
    theirs = from_canonical(rules, spec, as_tensors(ours))
    assert theirs.infos["h.1.w_pack"].shape == (spec.q_size + 2 * spec.kv_size, 8)
    back = to_canonical(rules, spec, Tensors(theirs.infos, theirs.load), where="here")
    for name, value in ours.items():
        assert np.array_equal(back.load(name), value), name
    assert source_names(rules, spec)["layers.0.attn.k.weight"] == "h.0.w_pack"


def test_unpermute_is_llama_cpp_s_permutation_undone() -> None:
    """The two halves of a head, interleaved: a head of 4 rows is stored as rows 0, 2, 1, 3."""
    spec = spec_of(heads=1, head_dim=6)
    stored = np.arange(6)[:, None] * np.ones((1, 2))
    assert UNPERMUTE.split(stored, [(6, 2)], spec)[0][:, 0].tolist() == [0, 2, 4, 1, 3, 5]
    bias = np.arange(12)
    assert UNPERMUTE.split(bias, [(12,)], spec)[0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def changed(change: Callable[[dict[str, np.ndarray]], object], *, tied: bool = False) -> str:
    spec = spec_of(tied=tied)
    theirs = from_canonical(RULES, spec, as_tensors(random_canonical(spec, 0)))
    stored = {name: theirs.load(name) for name in theirs.infos}
    change(stored)
    with pytest.raises(CheckpointError) as caught:
        to_canonical(RULES, spec, as_tensors(stored), dropped=("*.inv_freq",), where="here")
    return str(caught.value)


def test_missing_unknown_and_misshapen_are_named_as_the_source_names_them() -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    assert name in changed(lambda stored: stored.pop(name))
    assert "missing" in changed(lambda stored: stored.pop(name))
    assert "'model.extra'" in changed(lambda stored: stored.update({"model.extra": np.zeros(3)}))
    message = changed(lambda stored: stored.update({name: np.zeros((3, 2))}))
    assert name in message
    assert "[3, 2]" in message
    assert "[6, 8]" in message


def test_dropped_tensors_are_passed_over() -> None:
    spec = spec_of()
    stored = random_canonical(spec, 0)
    theirs = from_canonical(RULES, spec, as_tensors(stored))
    values = {name: theirs.load(name) for name in theirs.infos} | {"model.layers.0.rotary.inv_freq": np.zeros(2)}
    found = to_canonical(RULES, spec, as_tensors(values), dropped=("*.inv_freq",), where="here")
    assert list(found.infos) == list(names.tensors(spec))


def test_rules_that_leave_out_or_repeat_a_tensor_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"no rule for the tensor 'norm\.weight'"):
        bind([rule for rule in RULES if rule.ours != "norm.weight"], spec_of())
    with pytest.raises(CheckpointError, match=r"'norm\.weight' twice"):
        bind([*RULES, Rule("norm.weight", "again")], spec_of())


def test_progress_counts_every_tensor() -> None:
    seen: list[tuple[str, int, int]] = []
    source = as_tensors(random_canonical(spec_of(), 0))
    load = source.watched("convert", lambda *step: seen.append(step))
    for name in source.infos:
        load(name)
    count = len(source.infos)
    assert seen == [("convert", index + 1, count) for index in range(count)]
