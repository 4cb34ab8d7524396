"""Request bodies: OpenAI's fields, vLLM's extensions, and what of OpenAI's API this server cannot do.

Sampling fields are those of llmc/serve/request.py, under the same names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from llmc.config import Strict
from llmc.serve.grammar import Grammar
from llmc.serve.request import MAX_CHOICES, MAX_TOP_LOGPROBS, Request, Sampling
from llmc.serve.routes.forms import Formed

MAX_PROMPTS = 1024
MAX_TOOLS = 128

# Change nothing in an answer: for accounting, caching and scheduling elsewhere.
IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    | {"prediction"}
)
# Would change the answer; each with the values that ask for nothing.
REFUSED_BY_CHAT: Mapping[str, Collection[Any]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
    "best_of": (1,),
    "echo": (False,),
    "suffix": (),
    "prompt": (),
    "chat_template": (),
    "continue_final_message": (False,),
}
REFUSED_BY_COMPLETIONS: Mapping[str, Collection[Any]] = {
    "suffix": ("",),
    "messages": (),
    "tools": ([],),
}

REFUSED_BY_RESPONSES: Mapping[str, Collection[Any]] = {
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "prompt": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "reasoning": ({},),
    "truncation": ("disabled",),
    "include": ([],),
    "max_tool_calls": (),
    "stream_options": ({}, {"include_obfuscation": False}),
}

Count = Annotated[int, Field(ge=0, le=2**31)]
Priority = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Salt = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(Strict):
    """What a stream brings beside text.

    Attributes:
        include_usage: A last chunk with the counts of tokens.
        include_obfuscation: OpenAI's padding against eavesdroppers; not done here.
    """

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Body(Sampling, Formed):
    """What both endpoints take beside the sampling fields."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    priority: Priority = 0
    cache_salt: Salt | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Body:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def sampling(self) -> Sampling:
        """The sampling fields alone."""
        return Sampling.model_construct(**{name: getattr(self, name) for name in Sampling.model_fields})


def list_of_prompts(value: Any) -> Any:
    """A string, tokens, or a list of these -> a list."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists")
    return [value] if isinstance(value[0], int) else value


class CompletionBody(Body):
    """POST /v1/completions. OpenAI's default of 16 tokens holds."""

    prompt: Annotated[
        list[str] | list[list[int]],
        BeforeValidator(list_of_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
        Field(max_length=MAX_PROMPTS),
    ]
    max_tokens: Count = 16
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _best_is_chosen_at_the_end(self) -> CompletionBody:
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of ({self.best_of}) must be at least n ({self.n})")
        if self.drawn > self.n and self.stream:
            raise ValueError("best_of is not for stream: true: which is best is known at the end")
        return self

    @property
    def drawn(self) -> int:
        """Choices that are generated for each prompt; the best `n` of them are answered."""
        return self.best_of or self.n

    def request(self, ids: list[int], grammar: Grammar | None = None) -> Request:
        """What the engine is asked for one of the prompts."""
        return Request(
            tuple(ids),
            self.sampling,
            self.max_tokens,
            self.drawn,
            0 if self.logprobs is None and self.drawn > self.n else self.logprobs,
            prompt_logprobs=self.echo and self.logprobs is not None,
            priority=self.priority,
            cache_salt=self.cache_salt or "",
            grammar=grammar,
        )


class Part(Strict):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn. What an answer of this API holds may be sent back as it is."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise ValueError("content is required")
        return self

    @property
    def text(self) -> str:
        """What it says."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)

    def plain(self) -> dict[str, Any]:
        """As templates expect it: no absent keys, `system` for its newer name, arguments of calls as objects."""
        values = self.model_dump(exclude_none=True)
        values["role"] = {"developer": "system"}.get(self.role, self.role)
        values["tool_calls"] = [_with_arguments(call) for call in self.tool_calls or ()]
        return values if values["tool_calls"] else {key: values[key] for key in values if key != "tool_calls"}


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    import pydantic_core

    function = call.get("function")
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            return {**call, "function": {**function, "arguments": pydantic_core.from_json(function["arguments"])}}
        except ValueError:
            return call
    return call


class Function(Strict):
    """What may be called.

    Attributes:
        parameters: A JSON schema of the arguments.
        strict: A forced call refuses a schema that cannot be kept to; else passes over what it cannot.
    """

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """One of the functions on offer."""

    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    """One of them, by its name."""

    name: str


class NamedTool(Strict):
    """The one that must be called."""

    type: Literal["function"]
    function: FunctionName


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = {}
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] = []
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The functions that may be called, as the template wants them."""
        if self.tool_choice == "none":
            return []
        return [{"type": "function", "function": each.function.model_dump(exclude_none=True)} for each in self.tools]

    @property
    def forced(self) -> list[dict[str, Any]]:
        """The functions one of which must be called."""
        functions: list[dict[str, Any]] = [each["function"] for each in self.offered]
        if isinstance(self.tool_choice, NamedTool):
            return [each for each in functions if each["name"] == self.tool_choice.function.name]
        return functions if self.tool_choice == "required" else []

    @model_validator(mode="after")
    def _forced_has_something_to_call(self) -> ChatBody:
        if self.tool_choice in ("none", "auto"):
            return self
        if not self.forced:
            raise ValueError("tool_choice asks for a function that 'tools' does not have")
        if self.constraints:
            raise ValueError(f"{self.constraints[0].param} and a tool_choice that forces a call exclude each other")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only for logprobs: true")
        if taken := {"messages", "tools", "documents", "add_generation_prompt", "tokenizer"} & {
            *self.chat_template_kwargs
        }:
            raise ValueError(f"chat_template_kwargs may not set {', '.join(sorted(taken))}")
        return self

    def request(self, ids: list[int], grammar: Grammar | None = None) -> Request:
        """What the engine is asked."""
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        # What marks a call is a special token of some models.
        sampling = self.sampling.model_copy(update={"skip_special_tokens": False}) if self.offered else self.sampling
        return Request(
            tuple(ids),
            sampling,
            most,
            self.n,
            (self.top_logprobs or 0) if self.logprobs else None,
            priority=self.priority,
            cache_salt=self.cache_salt or "",
            grammar=grammar,
        )
