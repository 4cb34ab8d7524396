"""llmc.quant.corpus: rows of every training format become what transformers' own template makes of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from transformers import AutoTokenizer

from llmc.errors import UserError
from llmc.quant.corpus import FORMATS, Calibration, read
from llmc.quant.quantize import quantize
from llmc.recipe import KVCacheFormat, QuantRecipe
from llmc.tokenizer import Tokenizer

TALK = [
    {"role": "user", "content": "the quick fox?"},
    {"role": "assistant", "content": "over the dog"},
    {"role": "user", "content": "and the user?"},
    {"role": "assistant", "content": "jumps"},
]
# A row of each format, and the conversation that it holds.
ROWS: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "messages": ({"messages": TALK}, TALK),
    "one turn": ({"src": "the quick fox?", "tgt": "over the dog"}, TALK[:2]),
    "turns": ({"src": ["the quick fox?", "and the user?"], "tgt": ["over the dog", "jumps"]}, TALK),
    "a preference of turns": (
        {
            "src": ["the quick fox?", "and the user?"],
            "tgt": ["over the dog"],
            "response": ["never", "jumps"],
            "sort": [0, 1],
        },
        TALK,
    ),
    "question and answer": ({"prompt": "the quick fox?", "response": "over the dog"}, TALK[:2]),
    "a preference": ({"prompt": "the quick fox?", "chosen": "over the dog", "rejected": "no"}, TALK[:2]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(found)
    return found


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_format_is_looked_at() -> None:
    met = {name for row, _ in ROWS.values() for name, (keys, _) in FORMATS.items() if keys <= row.keys()}
    assert met == set(FORMATS)


@pytest.mark.parametrize("name", ROWS)
def test_rows_go_through_the_model_s_template(name: str, folder: Path, tmp_path: Path) -> None:
    row, talk = ROWS[name]
    path = lines(tmp_path / "rows.jsonl", row)
    found = read(Calibration(path=path), Tokenizer.load(folder), 256)
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(talk, return_dict=False)
    assert [window.tolist() for window in found.windows] == [expected]
    assert "1 row of " in found.source
    assert found.source.endswith("through the model's chat template)")


def test_without_a_template_turns_stand_one_after_another(folder: Path, tmp_path: Path) -> None:
    (bare := tmp_path / "bare").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_bytes((folder / name).read_bytes())
    tokenizer = Tokenizer.load(bare)
    found = read(Calibration(path=lines(tmp_path / "a.json", ROWS["turns"][0])), tokenizer, 256)
    text = "the quick fox?\nover the dog\nand the user?\njumps"
    assert [window.tolist() for window in found.windows] == [tokenizer.encode(text)]
    assert found.source.endswith("turns one after another)")


def test_long_rows_are_cut_and_short_ones_begin_anew(folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    path = lines(tmp_path / "rows.jsonl", {"text": "the fox " * 60}, {"text": "the dog"})
    found = read(Calibration(path=path, window=32), tokenizer, 256).windows
    long, short = tokenizer.encode("the fox " * 60), tokenizer.encode("the dog")
    assert np.concatenate(found).tolist() == long + short
    assert {len(window) for window in found[:-2]} == {32}
    assert found[-1].tolist() == short


def test_files_take_turns_until_there_is_enough(folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    (prose := tmp_path / "prose.txt").write_text("the user was in it " * 100, encoding="utf-8")
    rows = lines(tmp_path / "rows.jsonl", *[ROWS["turns"][0]] * 50)
    found = read(Calibration(path=(prose, rows), window=64, tokens=300), tokenizer, 256)
    assert sum(map(len, found.windows)) == 300
    assert found.windows[0].tolist() == tokenizer.encode(prose.read_text(encoding="utf-8"))[:64]
    assert found.windows[1].tolist() == found.windows[3].tolist() != found.windows[0].tolist()
    assert found.source.startswith(f"{prose}; {rows} (")


def test_the_window_is_the_model_s_at_most(folder: Path, tmp_path: Path) -> None:
    (prose := tmp_path / "prose.txt").write_text("the user was in it " * 100, encoding="utf-8")
    found = read(Calibration(path=prose), Tokenizer.load(folder), 40)
    assert max(map(len, found.windows)) == 40


def test_default_is_sample_text(folder: Path) -> None:
    found = read(Calibration(tokens=100), Tokenizer.load(folder), 64)
    assert sum(map(len, found.windows)) == 100
    assert "pydoc topics" in found.source
    assert [parent.name for parent in Calibration().parents()] == ["sample text"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "a"}', r'rows.jsonl:2 has no training format .*messages, .*src/tgt.*: {"question": "a"}'),
        ('{"src": ["a", "b"], "tgt": ["c"]}', "rows.jsonl:2 has no training format"),
        ('{"prompt": 3, "response": "b"}', "rows.jsonl:2 has no training format"),
        ('{"messages": []}', "rows.jsonl:2 has no training format"),
        ("[1, 2]", r"rows.jsonl:2: expected an object, met \[1, 2\]"),
        ('{"text"', "rows.jsonl:2: not a JSON object on a line of its own"),
    ],
)
def test_a_row_that_is_none_is_named(content: str, message: str, folder: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", {"text": "the fox"})
    path.write_text(path.read_text(encoding="utf-8") + content + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read(Calibration(path=path), Tokenizer.load(folder), 64)


@pytest.mark.parametrize("name", ["none.jsonl", "none.txt", "empty.jsonl", "empty.txt"])
def test_a_file_without_rows_is_named(name: str, folder: Path, tmp_path: Path) -> None:
    if name.startswith("empty"):
        (tmp_path / name).write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match=name):
        read(Calibration(path=tmp_path / name), Tokenizer.load(folder), 64)


def test_report_and_manifest_say_it(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    rows = lines(tmp_path / "rows.jsonl", *[ROWS["messages"][0]] * 3)
    (prose := tmp_path / "prose.txt").write_text("the user was in it " * 10, encoding="utf-8")
    recipe = QuantRecipe(algorithm="none", kv_cache=KVCacheFormat())
    found = quantize(
        tiny_checkpoint("llama"), tmp_path / "q", recipe, calibration=Calibration(path=(rows, prose), tokens=2000)
    )
    through = "3 rows of messages, through the model's chat template"
    assert found.report()["calibrated_on"] == f"{rows} ({through}); {prose}"
    manifest = json.loads((tmp_path / "q" / "manifest.json").read_text(encoding="utf-8"))
    texts = {parent["name"]: parent["sha256"] for parent in manifest["parents"] if parent["kind"] == "text"}
    assert texts == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (rows, prose)}
