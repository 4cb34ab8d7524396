"""llmc.sample_text: both halves are there, alike in kind and without a line of code in common."""

from __future__ import annotations

from llmc import sample_text


def test_halves_are_large_mixed_and_different() -> None:
    texts = {which: sample_text.read(which) for which in sample_text.MODULES}
    assert set(texts) == {"calibration", "held-out"}
    for which, text in texts.items():
        assert len(text) > 200_000
        assert "def " in text[:20_000]
        assert "statement" in text[:20_000]
        assert sample_text.read(which) == text
        assert which in sample_text.describe(which)
    long_lines = [{line.strip() for line in text.splitlines() if len(line.strip()) > 60} for text in texts.values()]
    assert len(long_lines[0] & long_lines[1]) < 0.02 * len(long_lines[1])
    assert not set(sample_text.MODULES["calibration"]) & set(sample_text.MODULES["held-out"])
