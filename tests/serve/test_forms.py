"""Output bound to a form: whatever is sampled has it, and a form from a stranger harms nobody."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake
import jsonschema
import numpy as np
import pytest
from flask.testing import FlaskClient
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from llmc.errors import OverloadedError, UserError
from llmc.serve import grammar as grammars
from llmc.serve.app import create_app
from llmc.serve.engine import Engine
from llmc.serve.grammar import Constraint, Grammars
from llmc.serve.request import Request, Sampling
from llmc.serve.service import Service
from llmc.tokenizer import Tokenizer

MakeEngine = Callable[..., Engine]
HELLO = [{"role": "user", "content": "hello"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The toy model, whose logits are random: what it says has a form only if it is made to."""
    tokenizer = fake.tokenizer(tmp_path_factory.mktemp("forms"))
    engine = Engine(fake.FakeRunner(max_sequences=8, max_length=600), tokenizer)
    engine.start()
    yield engine
    engine.close()


@pytest.fixture
def client(engine: Engine) -> FlaskClient:
    return create_app(Service(engine, "toy", 1)).test_client()


def generate(engine: Engine, constraint: Constraint, count: int = 500, **sampling: Any) -> tuple[str, str]:
    """The text, and why it ended."""
    grammar = engine.grammars.compile(constraint)
    request = Request((5, 6, 7), Sampling(**{"temperature": 1.0, **sampling}), count, grammar=grammar)
    events = list(engine.submit(request).events(60))
    return "".join(event.text for event in events), str(events[-1].finish_reason)


@st.composite
def schemas(draw: st.DrawFn, depth: int = 2) -> dict[str, Any]:
    """JSON schemas whose values are short."""
    leaves: list[dict[str, Any]] = [
        {"type": "string", "maxLength": 5},
        {"type": "integer", "minimum": -9, "maximum": 99},
        {"type": "boolean"},
        {"type": "null"},
        {"enum": ["x y", 5, None, {"a": [1]}]},
        {"const": 'caf\u00e9 \u4e2d "quoted"'},
        {"type": "string", "pattern": "^[a-f]{2,4}$"},
        {"type": "string", "format": "date"},
    ]
    kind = draw(st.sampled_from(["leaf", "object", "array", "any"] if depth else ["leaf"]))
    if kind == "leaf":
        return draw(st.sampled_from(leaves))
    inner = schemas(depth - 1)
    if kind == "array":
        return {"type": "array", "items": draw(inner), "minItems": draw(st.integers(0, 2)), "maxItems": 2}
    if kind == "any":
        return {"anyOf": draw(st.lists(inner, min_size=1, max_size=3))}
    names = draw(st.lists(st.text("ab\u00fc\u4e2d _", min_size=1, max_size=4), max_size=3, unique=True))
    properties = {name: draw(inner) for name in names}
    required = [name for name in names if draw(st.booleans())]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


ENDED = {"stop": 0, "length": 0}


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(schema=schemas(), seed=st.integers(0, 1000), temperature=st.sampled_from([0.0, 1.0, 2.0]))
def test_whatever_is_sampled_fits_the_schema(
    engine: Engine, schema: dict[str, Any], seed: int, temperature: float
) -> None:
    constraint = Constraint("json_schema", json.dumps(schema), "schema")
    text, reason = generate(engine, constraint, seed=seed, temperature=temperature, repetition_penalty=1.2)
    ENDED[reason] += 1
    assume(reason == "stop")
    jsonschema.validate(json.loads(text), schema)


def test_most_of_these_came_to_their_end() -> None:
    assert ENDED["stop"] > 10 * ENDED["length"]
    assert ENDED["stop"] >= 20


PATTERNS = [r"[0-9]{3}-[a-z]+x", r"(yes|no)( maybe){0,3}!", r"[\d_h-z]{2,6}\.(com|org)"]


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(pattern=st.sampled_from(PATTERNS), seed=st.integers(0, 99))
def test_a_regular_expression_is_matched_whole(engine: Engine, pattern: str, seed: int) -> None:
    text, reason = generate(engine, Constraint("regex", pattern, "regex"), seed=seed)
    assume(reason == "stop")
    assert re.fullmatch(pattern, text)


@pytest.mark.parametrize("form", ['start: "(" start ")" | "x"', 'root ::= "(" root ")" | "x"'])
def test_a_grammar_in_either_notation(engine: Engine, form: str) -> None:
    seen = {generate(engine, Constraint("grammar", form, "grammar"), seed=seed)[0] for seed in range(8)}
    assert all(re.fullmatch(r"(\(*)x(\)*)", text) and text.count("(") == text.count(")") for text in seen)
    assert len(seen) > 1


def test_one_of_several_texts(engine: Engine) -> None:
    texts = ["yes", "no", "\u00fcber", 'a "b"\n']
    constraint = Constraint("choice", grammars.choice(texts), "choice")
    seen = {generate(engine, constraint, seed=seed, temperature=2.0)[0] for seed in range(30)}
    assert seen <= set(texts)
    assert len(seen) > 1
    # A form ends where it ends, whatever else was asked.
    text, reason = generate(engine, constraint, min_tokens=50, ignore_eos=True, seed=1)
    assert (text in texts, reason) == (True, "stop")


def test_a_mask_leaves_the_likeliest_that_is_allowed(engine: Engine) -> None:
    """Greedy output under a grammar, token by token, against the plain definition."""
    constraint = Constraint("regex", "[a-h]{12}", "regex")
    text, _ = generate(engine, constraint, temperature=0)
    tokens, written = [5, 6, 7], ""
    while len(written) < 12:
        row = fake.row(tokens)
        fits = {}
        for token in range(3, fake.VOCAB):
            piece = engine.vocabulary.text(token)
            if len(written + piece) <= 12 and re.fullmatch("[a-h]+", piece):
                fits[token] = row[token]
        best = max(fits, key=lambda each: fits[each])
        tokens.append(best)
        written += engine.vocabulary.text(best)
    assert text == written


def test_neighbours_and_preemption_change_nothing(make_engine: MakeEngine) -> None:
    constraint = Constraint("regex", "[a-h ]{60}", "regex")
    alone = make_engine(fake.FakeRunner(max_sequences=8, max_length=100))
    crowded = make_engine(fake.FakeRunner(max_sequences=8, max_length=100, cache_tokens=150))
    texts = []
    for engine in (alone, crowded):
        form = engine.grammars.compile(constraint)
        handle = engine.submit(*(Request((5, 6, each), Sampling(seed=3), 80, n=2, grammar=form) for each in (7, 8, 9)))
        free = engine.submit(Request((9, 9), Sampling(temperature=0), 60))
        found = [""] * 6
        for event in handle.events(60):
            found[event.choice] += event.text
        assert len("".join(event.text for event in free.events(60))) > 20
        texts.append(found)
    assert texts[0] == texts[1]
    assert all(re.fullmatch("[a-h ]{60}", text) for text in texts[0])
    assert crowded.preemptions > 0


# Over HTTP


def test_chat_and_completions_and_responses_take_forms(client: FlaskClient) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    body = {"messages": HELLO, "seed": 1, "max_tokens": 200, "response_format": wanted}
    for _ in range(2):
        choice = client.post("/v1/chat/completions", json=body).get_json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), PERSON)
    body = {"prompt": "the", "seed": 2, "max_tokens": 200}
    for form in ({"guided_json": PERSON}, {"guided_json": json.dumps(PERSON)}, {"response_format": wanted}):
        choice = client.post("/v1/completions", json=body | form).get_json()["choices"][0]
        jsonschema.validate(json.loads(choice["text"]), PERSON)
    choice = client.post("/v1/completions", json=body | {"guided_choice": ["left", "right"]}).get_json()["choices"][0]
    assert choice["text"] in ("left", "right")
    choice = client.post("/v1/completions", json=body | {"guided_regex": "[ab]{4}"}).get_json()["choices"][0]
    assert re.fullmatch("[ab]{4}", choice["text"])
    form = {"format": {"type": "json_schema", "name": "person", "schema": PERSON}}
    found = client.post("/v1/responses", json={"input": "hi", "text": form, "max_output_tokens": 200}).get_json()
    assert found["status"] == "completed"
    jsonschema.validate(json.loads(found["output"][0]["content"][0]["text"]), PERSON)
    assert found["text"]["format"]["schema"] == PERSON
    any_object = {"messages": HELLO, "max_tokens": 550, "response_format": {"type": "json_object"}, "seed": 5}
    choice = client.post("/v1/chat/completions", json=any_object).get_json()["choices"][0]
    assert choice["message"]["content"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)


def test_what_a_schema_says_that_cannot_be_kept_is_named(client: FlaskClient) -> None:
    schema = {"type": "object", "if": {"required": ["a"]}, "then": {}}
    named: dict[str, Any] = {"name": "x", "schema": schema}
    body = {"messages": HELLO, "max_tokens": 9, "response_format": {"type": "json_schema", "json_schema": named}}
    error = client.post("/v1/chat/completions", json=body).get_json()["error"]
    assert error["param"] == "response_format.json_schema.schema"
    assert "if" in error["message"]
    named["strict"] = False
    assert client.post("/v1/chat/completions", json=body).status_code == 200


# Forms from strangers


def chain(length: int) -> dict[str, Any]:
    links = {f"{number}": {"$ref": f"#/$defs/{number + 1}"} for number in range(length)}
    return {"$ref": "#/$defs/0", "$defs": {**links, f"{length}": {"type": "integer"}}}


ENDLESS = {"$defs": {"n": {"anyOf": [{"$ref": "#/$defs/n"}]}}, "$ref": "#/$defs/n"}
MANY = {"type": "array", "minItems": 100_000_000, "items": {"type": "array", "minItems": 100_000_000}}
HOSTILE: list[Constraint] = [
    Constraint("json_schema", json.dumps(chain(1900)), "chain"),
    Constraint("json_schema", json.dumps(chain(20_000)), "long chain"),
    Constraint("json_schema", '{"items":' * 6000 + "{}" + "}" * 6000, "deep"),
    Constraint("json_schema", json.dumps({"enum": [f"value {number}" for number in range(4000)]}), "many"),
    Constraint("json_schema", '{"type": "string", "pattern": "^(a|b)*a(a|b){60}$"}', "states"),
    Constraint("json_schema", json.dumps(ENDLESS), "endless"),
    Constraint("json_schema", '{"maxLength": 100000000000, "type": "string"}', "length"),
    Constraint("json_schema", json.dumps(MANY), "items"),
    Constraint("regex", "(a+)+b", "backtracking"),
    Constraint("regex", "((a{1,100}){1,100}){1,100}", "counts"),
    Constraint("regex", "(a?){5000}a{5000}", "optional"),
    Constraint("regex", "(" * 5000 + "a" + ")" * 5000, "nested"),
    Constraint("regex", ".*a.{2000}", "window"),
    Constraint("grammar", "start: " + "(" * 5000 + '"a"' + ")" * 5000, "parentheses"),
    Constraint("grammar", "start: a0\n" + "\n".join(f"a{n}: a{n + 1} a{n + 1}" for n in range(2000)), "doubling"),
    Constraint("grammar", 'start: start start | "a" | ""', "ambiguous"),
    Constraint("grammar", "\x00", "nul"),
]


def follow(engine: Engine, constraint: Constraint) -> str | None:
    """Why it was refused, if it was."""
    try:
        form = engine.grammars.compile(constraint)
        list(engine.submit(Request((5,), Sampling(temperature=0), 8, grammar=form)).events(30))
    except UserError as error:
        return str(error)
    return None


def test_hostile_forms_are_refused_or_followed_in_time(engine: Engine) -> None:
    for constraint in HOSTILE:
        began = time.monotonic()
        refusal = follow(engine, constraint)
        assert refusal is None or len(refusal) < 500
        assert time.monotonic() - began < 12, constraint.param
    assert engine.health.ok
    assert len(HOSTILE) == 17


def test_compiling_has_a_time_limit_and_few_places(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "COMPILE_SECONDS", 0.2)
    subject = Grammars(tokenizer, fake.VOCAB)
    hold, compiled = threading.Event(), []
    compile_now = subject._compile

    def slow(constraint: Constraint) -> Any:
        if constraint.text.startswith("slow"):
            hold.wait(20)
        compiled.append(constraint.text)
        return compile_now(constraint)

    monkeypatch.setattr(subject, "_compile", slow)
    for number in range(grammars.MAX_COMPILING):
        with pytest.raises(UserError, match=r"within 0\.2 seconds"):
            subject.compile(Constraint("regex", f"slow{number}", "regex"))
    with pytest.raises(OverloadedError):
        subject.compile(Constraint("regex", "abc", "regex"))
    hold.set()
    while len(compiled) < grammars.MAX_COMPILING:
        time.sleep(0.01)
    monkeypatch.setattr(grammars, "COMPILE_SECONDS", 5)
    for _ in range(3):
        subject.compile(Constraint("regex", "abc", "regex"))
    assert compiled.count("abc") == 1
    subject.close()


def test_the_vocabulary_may_be_wider_than_the_tokenizer(tokenizer: Tokenizer) -> None:
    for width in (fake.VOCAB, 351):
        subject = Grammars(tokenizer, width)
        mask = subject.compile(Constraint("regex", "a+", "regex")).begin().allowed()
        assert mask.shape == (width,)
        assert {tokenizer.backend.id_to_token(int(each)) for each in np.flatnonzero(mask)} == {"a"}
        subject.close()


def test_a_model_without_an_end_of_text(tmp_path: Path) -> None:
    bare = dataclasses.replace(fake.tokenizer(tmp_path), eos_ids=frozenset())
    with pytest.raises(UserError, match="no token that ends"):
        Grammars(bare, fake.VOCAB).compile(Constraint("regex", "a", "regex"))


def test_a_mask_that_takes_long_is_waited_for(engine: Engine) -> None:
    """While another thread computes it, nothing else asks the library about this sequence."""
    matcher = engine.grammars.compile(Constraint("regex", "[a-z]{40}", "regex")).begin()
    inner = matcher._matcher
    inside = threading.Lock()

    class Alone:
        def __getattr__(self, name: str) -> Any:
            def call(*arguments: Any) -> Any:
                assert inside.acquire(blocking=False), f"{name} while something else is under way"
                try:
                    time.sleep(0.005)
                    return getattr(inner, name)(*arguments)
                finally:
                    inside.release()

            return call

    matcher.allowed()
    matcher._matcher = Alone()
    for _ in range(5):
        matcher.advance(int(np.flatnonzero(matcher.allowed())[0]))
        assert not matcher.finished
