"""Texts on which two tokenizers part if they are not the same one, and the comparison.

Every conversion of a tokenizer into another form ends here: a mistake in one shows in no tensor and no error, only in
a model that answers a little worse.
"""

# ruff: noqa: RUF001 - characters that are easily taken for others are what these texts are for

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence

from llmc.errors import UnsupportedModelError

DIFFICULT = (
    "Hello, world! It's 12:34, and WE'LL see; I'd say 3.14159 is fine...",
    "def f(x: int) -> int:\n    return x ** 2  # two  spaces\n\n\n\tprint(f(10), end='')\r\n",
    '{"a": [1, 22, 333, 4444], "b": null}\n<div class="x">&amp;</div>\\n',
    "我们在北京大学学习人工智能,今天天气很好。「引用」、《书名》!12345个汉字",
    "日本語のテキスト ひらがなとカタカナ 한국어 문장입니다 ภาษาไทย हिन्दी العربية עברית Ελληνικά русский язык",
    "😀👩‍👩‍👧🏳️‍🌈🇩🇪 👍🏽 ❤️ ☃",
    "Größe naïve café ÅÄÖ Œuvre e\u0301 n\u0303 ½ ² ㊿ ٣٤ ǅ ʰ ﬁ Ａ",
    "  two before, two after  ",
    " ",
    "    ",
    "\n",
    "\n\n\n \n\t\t\n",
    "a\u00a0b\u3000c\u2009d\u200be\ufeff",
    "\ufffd half a character \ufffd\ufffd, \x00 \x07 \x1b[0m \x7f \u0085",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𠜎𠜱 \U0010ffff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa \u2581 !!!!!!!!!!!!!!!!!!! --------------------",
    "<|im_start|>user\n<s>[INST] <<SYS>> </s> <unk> <0x0A> [gMASK]<sop> <tool_call>",
)

Encode = Callable[[str], Sequence[int]]
Alike = Callable[[list[int], list[int]], bool]


def difference(ours: Encode, theirs: Encode, more: Iterable[str] = (), *, alike: Alike = operator.eq) -> str | None:
    """The first text that becomes other ids, and these; None where all are the same.

    Args:
        more: Texts beside `DIFFICULT`, such as those with the tokenizer's own tokens.
        alike: Which ids are as good as which.
    """
    for text in (*DIFFICULT, *more):
        met, expected = list(ours(text)), list(theirs(text))
        if not alike(met, expected):
            return f"{text!r} becomes {_short(met)} in place of {_short(expected)}"
    return None


def check(ours: Encode, theirs: Encode, *, what: str, more: Iterable[str] = (), alike: Alike = operator.eq) -> None:
    """Refuse a conversion that is not exact.

    Args:
        what: Of which tokenizer, for the error.

    Raises:
        UnsupportedModelError: A text becomes other ids; names it.
    """
    if found := difference(ours, theirs, more, alike=alike):
        raise UnsupportedModelError(f"{what} cannot be converted exactly: {found}")


def _short(ids: Sequence[int]) -> str:
    return str(list(ids[:12])) + (" ..." if len(ids) > 12 else "")
