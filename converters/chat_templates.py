"""Chat templates for models that came without one, as data: their authors' code builds the prompt.

A row is used when a folder has no template of its own, and stored in the checkpoint, where it can be read and changed
(chat_template.jinja). `{user}` and `{assistant}` stand for the tokens that the generation config numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Template:
    """One row.

    Attributes:
        source: Whose code it follows, for people.
        model_type: Of the config.
        name: What the config's `_name_or_path` must hold, in small letters.
        sign: A key of the generation config that only chat models have; none when all are chat models.
        text: Jinja.
        ends: Tokens that end an answer, beside the end of text.
    """

    source: str
    model_type: str
    text: str
    name: str = ""
    sign: str = ""
    ends: tuple[str, ...] = ()


_SYSTEM = "You are a helpful assistant."
_CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n" + _SYSTEM + "<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_BAICHUAN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '{user}' }}{% elif message['role'] == 'assistant' %}{{ '{assistant}' }}"
    "{% endif %}{{ message['content'] }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '{assistant}' }}{% endif %}"
)
# A single question stands alone; the code counts rounds from 0, and its tokenizer puts the two tokens at the end.
_CHATGLM = (
    "{% set turn = namespace(number=0) %}"
    "{% for message in messages %}"
    "{% if messages | length == 1 %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}"
    "{{ '[Round ' ~ turn.number ~ ']\\n\u95ee\uff1a' + message['content'] + '\\n\u7b54\uff1a' }}"
    "{% set turn.number = turn.number + 1 %}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[gMASK]<sop>' }}{% endif %}"
)
_CHATGLM2 = (
    "{{ '[gMASK]sop' }}{% set turn = namespace(number=0) %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% set turn.number = turn.number + 1 %}"
    "{{ '[Round ' ~ turn.number ~ ']\\n\\n\u95ee\uff1a' + message['content'] + '\\n\\n\u7b54\uff1a' }}"
    "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
)
_CHATGLM3 = (
    "{{ '[gMASK]sop' }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n ' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

TEMPLATES = (
    Template("Qwen-7B-Chat, qwen_generation_utils.py", "qwen", _CHATML, sign="chat_format", ends=("<|im_end|>",)),
    Template("Baichuan2-7B-Chat, generation_utils.py", "baichuan", _BAICHUAN, sign="user_token_id"),
    Template("ChatGLM-6B, modeling_chatglm.py", "chatglm", _CHATGLM, name="chatglm-6b"),
    Template("ChatGLM2-6B, tokenization_chatglm.py", "chatglm", _CHATGLM2, name="chatglm2"),
    Template(
        "ChatGLM3-6B, tokenizer_config.json",
        "chatglm",
        _CHATGLM3,
        name="chatglm3",
        ends=("<|user|>", "<|observation|>"),
    ),
)


def find(config: Mapping[str, Any], generation: Mapping[str, Any]) -> Template | None:
    """The row for a model, None when there is none or it is not known to chat."""
    name = str(config.get("_name_or_path") or "").lower()
    for row in TEMPLATES:
        if row.model_type == config.get("model_type") and row.name in name and (not row.sign or row.sign in generation):
            return row
    return None
