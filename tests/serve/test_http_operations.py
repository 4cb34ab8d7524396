"""A server that is full, drains, fails or is watched: what its routes say then."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import fake
import pytest
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families
from web import CHAT, GENERATING, GOOD, GOOD_CHAT, GOOD_TEXT, PADDLE, TEXT, check_error, events

from llmc.serve.app import create_app
from llmc.serve.engine import Engine
from llmc.serve.service import Service
from llmc.serve.speculate import NGram, Speculation

MakeEngine = Callable[..., Engine]


def test_overload_and_drain(client: FlaskClient, service: Service, runner: fake.FakeRunner) -> None:
    runner.gate.clear()
    engine = service.engine
    from llmc.serve.request import Request

    handles = [engine.submit(Request((5, 6), max_tokens=2)) for _ in range(4 + 8)]
    response = client.post(TEXT, json=GOOD_TEXT)
    assert check_error(response, 429)["type"] == "rate_limit_error"
    assert int(response.headers["Retry-After"]) >= 1
    assert client.get("/ready").status_code == 200
    engine.begin_drain()
    for route in GENERATING:
        response = client.post(route, json=GOOD[route])
        assert check_error(response, 503)["code"] == "shutting_down"
        assert int(response.headers["Retry-After"]) >= 1
    assert client.get("/ready").status_code == 503
    assert client.get("/health").status_code == 200
    runner.gate.set()
    for handle in handles:
        assert [event.finish_reason for event in handle.events(10) if event.finish_reason] == ["length"]


def test_an_engine_that_fails(client: FlaskClient, runner: fake.FakeRunner) -> None:
    runner.fail_steps = {0, 3, 5}
    error = check_error(client.post(CHAT, json=GOOD_CHAT), 500)
    assert error["type"] == "server_error"
    streamed = client.post(CHAT, json=GOOD_CHAT | {"max_tokens": 9, "stream": True}).get_data(as_text=True)
    last = streamed.strip().split("\n\n")[-1]
    assert "told to fail" in json.loads(last.removeprefix("data: "))["error"]["message"]
    lines = client.post(PADDLE, json={"context": "a", "max_length": 9}).get_data(as_text=True).splitlines()
    assert json.loads(lines[-1])["error_code"] == 1
    assert client.post(CHAT, json=GOOD_CHAT).status_code == 200


def test_a_bug_is_no_page_of_html(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.serve.routes.chat.chat_ids", lambda *_, **__: 1 / 0)
    error = check_error(client.post(CHAT, json=GOOD_CHAT), 500)
    assert "division" not in error["message"]


def test_an_unhealthy_engine(client: FlaskClient, runner: fake.FakeRunner) -> None:
    runner.fail_steps = {0, 1, 2}
    assert client.get("/health").status_code == 200
    for _ in range(3):
        client.post(TEXT, json=GOOD_TEXT)
    assert client.get("/health").status_code == client.get("/ready").status_code == 503
    assert "steps failed" in client.get("/health").get_json()["reason"]


def test_silence_is_filled_with_comments(make_engine: MakeEngine) -> None:
    runner = fake.FakeRunner(delay=0.3)
    client = create_app(Service(make_engine(runner), "toy", 1, keep_alive=0.05)).test_client()
    response = client.post(TEXT, json=GOOD_TEXT | {"stream": True})
    text = response.get_data(as_text=True)
    assert text.count(": keep-alive\n\n") >= 2
    assert events(response)


def samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


def test_metrics_count_what_happened(client: FlaskClient) -> None:
    for _ in range(3):
        client.post(TEXT, json=GOOD_TEXT)
    client.post(TEXT, json={"prompt": "fox " * 300})
    client.post(TEXT, json={})
    text = client.get("/metrics").get_data(as_text=True)
    found = {(name, labels.get("le", labels.get("finished_reason"))): value for name, labels, value in samples(text)}
    assert found["llmc:generation_tokens_total", None] == 6
    assert found["llmc:prompt_tokens_total", None] == 3
    assert found["llmc:request_success_total", "length"] == 3
    assert found["llmc:time_to_first_token_seconds_count", None] == 3
    assert found["llmc:time_to_first_token_seconds_bucket", "+Inf"] == 3
    assert found["llmc:inter_token_latency_seconds_count", None] == 3
    assert found["llmc:num_requests_running", None] == found["llmc:num_requests_waiting", None] == 0
    assert found["llmc:kv_cache_usage_perc", None] == 0
    assert found["llmc:kv_cache_max_bytes", None] == 4 * 256 * fake.TOKEN_BYTES
    answers = [(labels, value) for name, labels, value in samples(text) if name == "llmc:http_responses_total"]
    assert ({"model_name": "toy", "route": TEXT, "status": "400"}, 2.0) in answers
    names = {name for name, _, _ in samples(text)}
    wanted = "prefix_cache_queries_total prefix_cache_hits_total num_preemptions_total e2e_request_latency_seconds_sum"
    wanted += " spec_decode_num_drafts_total spec_decode_num_draft_tokens_total spec_decode_num_accepted_tokens_total"
    assert {f"llmc:{name}" for name in wanted.split()} <= names
    assert all(labels.get("model_name") == "toy" for name, labels, _ in samples(text) if name.startswith("llmc:"))


# Of vLLM 0.33, as far as routers and dashboards ask for it; of a histogram also its sum and buckets.
GAUGES = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "lora_requests_info"}
COUNTERS = {
    "prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits", "num_preemptions",
    "request_success", "spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens",
    "spec_decode_num_accepted_tokens_per_pos",
}  # fmt: skip
HISTOGRAMS = {
    "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
    "request_queue_time_seconds", "request_prompt_tokens", "request_generation_tokens",
}  # fmt: skip
OURS = {"admission_rejections"}


@pytest.mark.parametrize("prefix", ["llmc", "vllm"])
def test_metrics_are_those_that_dashboards_ask_for(make_engine: MakeEngine, prefix: str) -> None:
    """With vLLM's prefix a dashboard made for it finds every one, of the right kind."""
    engine = make_engine(fake.FakeRunner(eos=None), speculation=Speculation(NGram(), 2), max_queue=1)
    client = create_app(Service(engine, "toy", 1, adapters=("a",), metrics_prefix=prefix)).test_client()
    repeated = {"prompt": "fox fox fox fox", "max_tokens": 9, "logit_bias": {"80": 100}}
    assert client.post(TEXT, json=repeated).status_code == 200
    assert client.post(TEXT, json={"prompt": "a", "max_tokens": 99_999}).status_code == 400
    text = client.get("/metrics").get_data(as_text=True)
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for kind, names in (("gauge", GAUGES), ("counter", COUNTERS | OURS), ("histogram", HISTOGRAMS)):
        for name in names:
            family = families[f"{prefix}:{name}"]
            assert family.type == kind
            assert family.samples, name
            if kind == "histogram":
                assert {sample.name.rpartition("_")[2] for sample in family.samples} == {"bucket", "count", "sum"}
    found = {sample.name: sample.value for family in families.values() for sample in family.samples}
    assert found[f"{prefix}:spec_decode_num_accepted_tokens_total"] > 0
    assert found[f"{prefix}:generation_tokens_total"] == 9
    assert found[f"{prefix}:admission_rejections_total"] == 1
    assert not [name for name in families if ":" in name and not name.startswith(prefix)]
