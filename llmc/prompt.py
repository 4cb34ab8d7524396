"""The one prompt builder, that trainer, scorer and server share: from messages to text, and from text to tokens.

The text is that of the model's own chat template (llmc/template.py).

Knows: special tokens. Does not know: HTTP bodies, models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmc import template
from llmc.errors import UserError
from llmc.tokenizer import Tokenizer

Message = Mapping[str, Any]


def completion_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a plain text, with what the tokenizer puts in front (Llama's begin-of-text token)."""
    return tokenizer.encode(text, add_special_tokens=True)


def chat_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> list[int]:
    """Tokens of a conversation; see `chat_text`. The template writes the special tokens, so none are added."""
    text = chat_text(tokenizer, messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables)
    return tokenizer.encode(text, add_special_tokens=False)


def chat_text(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """Render a conversation with the model's own template.

    Args:
        messages: Each with "role" and "content"; a content of several text parts is joined.
        tools: Functions the model may call, as JSON schemas, for templates that know them.
        add_generation_prompt: End with what comes before an assistant's answer.
        variables: More names for the template ("enable_thinking").

    Raises:
        UserError: The model has no template, or its template refuses these messages.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "this model has no chat template, so it cannot be asked with messages: "
            "give the whole prompt as text instead (POST /v1/completions, or llmc generate --prompt)",
            param="messages",
        )
    special = {
        name: value
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        if (value := getattr(tokenizer, name)) is not None
    }
    given = {
        **special,
        **variables,
        "messages": [_plain(message) for message in messages],
        "tools": tools,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        return template.render(tokenizer.chat_template, given)
    except template.Refusal as error:
        raise UserError(f"the model's chat template refuses this conversation: {error}", param="messages") from None
    except Exception as error:
        # A template is a program of somebody else's: it can fail in any way that Python code can.
        raise UserError(
            f"the model's chat template cannot render this conversation: {type(error).__name__}: {error}",
            param="messages",
        ) from None


def score_ids(tokenizer: Tokenizer, given: str | Sequence[Message] | tuple[str, str], pad: int | None) -> list[int]:
    """Tokens of what a scoring head is asked about; the last of them is the one whose scores count.

    Args:
        given: A text; a conversation, the answer that is judged being its last turn; or two texts that belong together
            (question and answer, query and document), which are a conversation of two turns where the model has a
            chat template, and else one behind the other.
        pad: Tokens like this at the end do not count (transformers' modeling_layers.py,
            GenericForSequenceClassification). What is before them does not see them, so they are left out.
    """
    if isinstance(given, str):
        ids = completion_ids(tokenizer, given)
    elif not isinstance(given, tuple):
        ids = chat_ids(tokenizer, given, add_generation_prompt=False)
    elif tokenizer.chat_template is None:
        ids = completion_ids(tokenizer, given[0]) + tokenizer.encode(given[1], add_special_tokens=False)
    else:
        turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), given, strict=True)]
        ids = chat_ids(tokenizer, turns, add_generation_prompt=False)
    return without_padding(ids, pad)


def without_padding(ids: Sequence[int], pad: int | None) -> list[int]:
    """The tokens up to the last that is not `pad`; the first is kept whatever it is, as transformers does."""
    end = len(ids)
    while end > 1 and ids[end - 1] == pad:
        end -= 1
    return list(ids[:end])


def _plain(message: Message) -> dict[str, Any]:
    """The message with its content as one string."""
    content = message.get("content")
    if isinstance(content, str) or content is None:
        return dict(message)
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise UserError(f"a message's content may have parts of type 'text', not {kind!r}", param="messages")
        texts.append(part["text"])
    return {**message, "content": "".join(texts)}
