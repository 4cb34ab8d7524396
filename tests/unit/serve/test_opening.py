"""API keys from the options of `llmc serve`."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmc.errors import UserError
from llmc.serve.opening import Settings, api_keys


def test_keys_come_from_the_option_and_the_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\n  one \n\ntwo\n", encoding="utf-8")
    assert api_keys(Settings()) == ()
    assert api_keys(Settings(api_key="zero")) == ("zero",)
    assert api_keys(Settings(api_key="zero", api_key_file=path)) == ("zero", "one", "two")


@pytest.mark.parametrize("content", [b"", b"# none\n", b"\xff"])
def test_a_file_without_keys_opens_no_server_to_all(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(UserError, match="key"):
        api_keys(Settings(api_key_file=path))
