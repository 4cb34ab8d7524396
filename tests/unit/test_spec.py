"""llmc.spec: what can be said of a model, and what cannot."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmc.config import parse
from llmc.errors import ConfigError
from llmc.spec import ModelSpec

VALUES: dict[str, Any] = {
    "family": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_layers": 4,
    "max_positions": 64,
    "norm": {"eps": 1e-5},
    "position": {"kind": "rope", "theta": 1e4, "scaling": {"kind": "linear", "factor": 2.0}},
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "window": 8, "full_layers": [0, 2]},
    "mlp": {"intermediate_size": 24},
}

MOE: dict[str, Any] = {"num_experts": 4, "top_k": 2, "intermediate_size": 8, "dense_layers": [1]}


def spec_of(**changes: Any) -> ModelSpec:
    return parse(ModelSpec, json.dumps(VALUES | changes), where="spec.json")


def test_json_comes_back() -> None:
    spec = spec_of()
    assert parse(ModelSpec, spec.model_dump_json(), where="again") == spec


def test_sizes() -> None:
    spec = spec_of()
    assert (spec.q_size, spec.kv_size) == (32, 16)


def test_window_of_a_layer() -> None:
    spec = spec_of()
    assert [spec.window(layer) for layer in range(spec.num_layers)] == [None, 8, None, 8]


def test_experts_of_a_layer() -> None:
    spec = spec_of(moe=MOE)
    assert [spec.experts(layer) for layer in range(spec.num_layers)] == [spec.moe, None, spec.moe, spec.moe]
    assert spec_of().experts(0) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layer": 3}, "unknown field 'num_layer' \\(did you mean 'num_layers'\\?\\)"),
        ({"hidden_size": "16"}, "'hidden_size'"),
        ({"vocab_size": 0}, "'vocab_size'"),
        ({"attention": VALUES["attention"] | {"num_kv_heads": 3}}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"attention": VALUES["attention"] | {"head_dim": 7}}, "head_dim 7 is odd"),
        ({"position": {"kind": "rope", "scaling": {"kind": "magic"}}}, "position.rope.scaling"),
        ({"position": {"kind": "rope", "scaling": {"kind": "linear", "factor": 0.5}}}, "factor"),
        ({"position": {"kind": "rope", "fraction": 0.4}}, "3 of 8 dimensions of a head cannot be turned in pairs"),
        ({"position": {"kind": "rope", "fraction": 1.5}}, "fraction"),
        (
            {"norm": {"eps": 1e-5, "kind": "layer", "plus_one": True}},
            "'plus_one' does not go with a norm of kind 'layer'",
        ),
        ({"position": {"kind": "sinusoidal"}}, "'position'.*sinusoidal"),
        ({"position": {"kind": "learned", "offset": -1}}, "offset"),
        ({"moe": MOE | {"top_k": 5}}, "top_k 5 is more than num_experts 4"),
        ({"moe": MOE, "mlp": {"intermediate_size": 24, "bias": True}}, "experts are gated and have no biases"),
        ({"norm": {"eps": 1e-5, "kind": "batch"}}, "norm.kind"),
        ({"mlp": {"intermediate_size": 24, "activation": "mish"}}, "mlp.activation"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:20],
)
def test_what_cannot_be_computed_cannot_be_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_of(**changes)
