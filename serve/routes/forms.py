"""The fields of a body that bind the output to a form: OpenAI's `response_format` and vLLM's `guided_...`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llmc.config import Strict
from llmc.serve.grammar import Constraint, choice

MAX_CHOICES = 1024


class SchemaFormat(Strict):
    """A JSON schema with a name.

    Attributes:
        strict: False passes over keywords of the schema that cannot be kept to; else they are refused.
    """

    name: str = ""
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    """What the answer is: any text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_with_its_type(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema comes with type: json_schema, and not without")
        return self


class Formed(Strict):
    """Mixed into a body.

    Attributes:
        guided_json: A JSON schema, as an object or as text.
        guided_grammar: In the form of Lark, or GBNF as llama.cpp has it.
    """

    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)] | None = None
    guided_grammar: str | None = None

    @property
    def constraints(self) -> list[Constraint]:
        """The forms that were asked for; more than one is a mistake."""
        found = []
        if self.response_format is not None and self.response_format.type != "text":
            found.append(_of_format(self.response_format))
        if self.guided_json is not None:
            text = self.guided_json if isinstance(self.guided_json, str) else json.dumps(self.guided_json)
            found.append(Constraint("json_schema", text, "guided_json"))
        if self.guided_regex is not None:
            found.append(Constraint("regex", self.guided_regex, "guided_regex"))
        if self.guided_choice is not None:
            found.append(Constraint("choice", choice(self.guided_choice), "guided_choice"))
        if self.guided_grammar is not None:
            found.append(Constraint("grammar", self.guided_grammar, "guided_grammar"))
        return found

    @model_validator(mode="after")
    def _one_form(self) -> Formed:
        if len(names := [each.param for each in self.constraints]) > 1:
            raise ValueError(f"the output can have one form, not several: {', '.join(names)}")
        return self


def _of_format(wanted: ResponseFormat) -> Constraint:
    if wanted.json_schema is None:
        return Constraint("json_schema", '{"type": "object"}', "response_format")
    text, lenient = json.dumps(wanted.json_schema.schema_), wanted.json_schema.strict is False
    return Constraint("json_schema", text, "response_format.json_schema.schema", lenient)
