"""What is asked of the engine: a prompt's tokens, how to choose the next ones, and when to stop.

Knows names and ranges of the settings. Does not know tokenizers, models or HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llmc.config import Strict

if TYPE_CHECKING:
    from llmc.serve.grammar import Grammar

# "abort" is vLLM's word for a request that its client gave up; OpenAI's API has none.
FinishReason = Literal["stop", "length", "abort", "error"]

# What is wanted of a prompt in place of a continuation: of the states that the head would read the mean or the last, or
# what a scoring head says of the last token.
Pooling = Literal["mean", "last", "score"]

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1000
MAX_TOP_LOGPROBS = 20
MAX_BIASED_TOKENS = 1024
MAX_CHOICES = 128


def _ids_from_json(value: Any) -> Any:
    """JSON's keys are strings: {"50256": -100} means token 50256."""
    if not isinstance(value, dict):
        return value
    return {
        int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 10 else key: value[key] for key in value
    }


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


TokenId = Annotated[int, Field(ge=0)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class Sampling(Strict):
    """How the next token is chosen and what ends a text. Names, ranges and meanings are OpenAI's, then vLLM's.

    Attributes:
        temperature: Logits are divided by it; 0 takes the likeliest token.
        top_k: Only the k likeliest; 0 or -1 takes all.
        top_p: Only the likeliest whose probabilities sum up to p; 0 takes the likeliest alone.
        min_p: Only those at least p times as likely as the likeliest.
        repetition_penalty: Logits of tokens in prompt or output are divided by it (multiplied when negative).
        presence_penalty: Taken from the logits of tokens in the output.
        frequency_penalty: The same, once for each time they occur in it.
        logit_bias: Added to the logits of tokens.
        allowed_token_ids: If given, no other token is chosen.
        seed: The same seed gives the same choices, whatever else the engine runs.
        min_tokens: No end of text and no stop token before so many tokens.
        ignore_eos: Go on after the model's own end of text.
        stop: Strings that end the text; they are not part of it unless `include_stop_str_in_output`.
        stop_token_ids: Tokens that end the text, as the model's own end of text does.
        skip_special_tokens: Leave special tokens out of the text.
    """

    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[
        dict[TokenId, Annotated[float, Field(ge=-100, le=100)]],
        BeforeValidator(_ids_from_json, json_schema_input_type=dict[str, float]),
        Field(max_length=MAX_BIASED_TOKENS),
    ] = {}
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_BIASED_TOKENS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    ignore_eos: bool = False
    stop: Annotated[
        list[StopString],
        BeforeValidator(_one_or_many, json_schema_input_type=str | list[str]),
        Field(max_length=MAX_STOP_STRINGS),
    ] = []
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_BIASED_TOKENS)] = []
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True


GREEDY = Sampling(temperature=0)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, to be continued `n` times.

    Attributes:
        prompt: Its tokens; at least one.
        max_tokens: Tokens to generate at most; None for as many as there is room for.
        logprobs: How many alternatives to report beside each token's own log-probability; None reports nothing.
        prompt_logprobs: Report the same of the prompt's tokens.
        priority: Lower is served earlier; those of one priority in the order they came.
        cache_salt: What is in the cache is shared among requests of the same salt alone, so that nobody learns from
            the time to the first token what others have asked.
        grammar: The form that the output is bound to.
        adapter: Name of the low-rank adapter that it is computed with; nothing in the cache is shared with others.
        pooling: Nothing is generated, and this is wanted of the prompt; `max_tokens` is 0 then.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = GREEDY
    max_tokens: int | None = None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: bool = False
    priority: int = 0
    cache_salt: str = ""
    grammar: Grammar | None = None
    pooling: Pooling | None = None
    adapter: str = ""

    @property
    def cache_scope(self) -> str:
        """What is in the cache is of use to requests of the same."""
        return f"{self.adapter}\0{self.cache_salt}"

    @property
    def every_row(self) -> bool:
        """Something is wanted of each of the prompt's tokens, so that none may be reused."""
        return self.prompt_logprobs or self.pooling == "mean"
