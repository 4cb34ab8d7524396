from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field, PositiveInt

from llmc import config
from llmc.config import Strict
from llmc.errors import ConfigError


class Inner(Strict):
    depth: PositiveInt = 1


class Outer(Strict):
    learning_rate: float
    inner: Inner | None = None
    names: tuple[str, ...] = ()
    kind: str = Field(alias="type", default="x")


def refused(values: object) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        config.parse(Outer, values, where="here.toml")  # type: ignore[arg-type]
    assert str(caught.value).startswith("here.toml: ")
    return caught.value


def test_an_unknown_field_is_named_with_the_one_that_was_meant() -> None:
    error = refused({"learning_rate": 0.1, "nmes": ()})
    assert "unknown field 'nmes' (did you mean 'names'?)" in str(error)
    assert error.param == "nmes"


def test_inside_a_section_the_section_s_fields_are_meant() -> None:
    error = refused({"learning_rate": 0.1, "inner": {"dept": 2}})
    assert "'inner.dept' (did you mean 'depth'?)" in str(error)
    assert error.param == "inner.dept"


def test_an_alias_is_meant_as_well() -> None:
    assert "did you mean 'type'" in str(refused({"learning_rate": 0.1, "typ": "y"}))


def test_a_field_that_is_like_none_gets_no_guess() -> None:
    message = str(refused({"learning_rate": 0.1, "zzzzzz": 1}))
    assert "unknown field 'zzzzzz'" in message
    assert "did you mean" not in message


def test_a_missing_field() -> None:
    error = refused({})
    assert "the field 'learning_rate' is required" in str(error)
    assert error.param == "learning_rate"


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"learning_rate": "0.1"}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"learning_rate": 0.1, "inner": {"depth": 0}}, "inner.depth"),
        ({"learning_rate": 0.1, "inner": {"depth": 1.0}}, "inner.depth"),
        ({"learning_rate": 0.1, "inner": {"depth": True}}, "inner.depth"),
        ({"learning_rate": 0.1, "names": "ab"}, "names"),
    ],
)
def test_values_are_never_coerced(values: dict[str, object], param: str) -> None:
    error = refused(values)
    assert error.param == param
    assert "met" in str(error)


def test_a_long_value_is_cut_short() -> None:
    message = str(refused({"learning_rate": "x" * 1000}))
    assert "..." in message
    assert len(message) < 200


def test_nothing_changes_afterwards() -> None:
    made = config.parse(Outer, {"learning_rate": 1}, where="here")
    with pytest.raises(ValueError, match="frozen"):
        made.learning_rate = 2.0


def test_json_and_toml_files_give_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"learning_rate": 0.5, "names": ["a"], "inner": {"depth": 2}}', encoding="utf-8")
    (tmp_path / "a.toml").write_text('learning_rate = 0.5\nnames = ["a"]\n[inner]\ndepth = 2\n', encoding="utf-8")
    expected = Outer(learning_rate=0.5, names=("a",), inner=Inner(depth=2))
    assert config.load(Outer, tmp_path / "a.json") == config.load(Outer, tmp_path / "a.toml") == expected


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.toml", "learning_rate = ", "not valid TOML"),
        ("a.json", "{", "not valid JSON"),
        ("a.yaml", "learning_rate: 1", r"a \.toml or a \.json file"),
        ("a.toml", "learning_rate = 2026-01-01", "learning_rate"),
        ("a.toml", "learning_rate = nan", "learning_rate"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=said) as caught:
        config.load(Outer, tmp_path / name)
    assert name in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        config.load(Outer, tmp_path / "nowhere.toml")
    (tmp_path / "latin.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"latin\.toml"):
        config.load(Outer, tmp_path / "latin.toml")
