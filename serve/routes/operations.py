"""GET /health, /ready and /metrics: for whoever keeps the server running.

/health is 503 when a restart would help; /ready when no new requests should come here, be it only because the server
is shutting down. The metrics bear vLLM's names and meanings, with a prefix of one's choice in front: with vLLM's own,
dashboards and routers made for it read them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from flask import Flask, Response, jsonify
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from llmc.serve.service import DRAIN_RETRY_SECONDS, Service
from llmc.serve.stats import Histogram

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


def register(app: Flask, service: Service) -> None:
    """Add the routes."""
    registry = CollectorRegistry()
    registry.register(_Metrics(service))
    ProcessCollector(registry=registry)

    @app.get("/health")
    def health() -> Response:
        found = service.engine.health
        response = jsonify({"status": "ok" if found.ok else "unhealthy", "reason": found.reason or None})
        response.status_code = 200 if found.ok else 503
        return response

    @app.get("/ready")
    def ready() -> Response:
        found = service.engine.health
        reason = found.reason or ("the server is shutting down" if found.draining else None)
        response = jsonify({"status": "not ready" if reason else "ready", "reason": reason})
        if reason:
            response.status_code = 503
            response.headers["Retry-After"] = str(DRAIN_RETRY_SECONDS)
        return response

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)


class _Metrics(Collector):
    """Reads the engine's numbers when asked for them."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> list[Family]:
        """See prometheus_client: nothing is collected on registration."""
        return []

    def collect(self) -> Iterator[Family]:
        """See prometheus_client."""
        engine, stats = self._service.engine, self._service.engine.stats
        yield self._gauge("num_requests_running", "Sequences in the running batch.", engine.num_running)
        yield from self._adapters()
        yield self._gauge("num_requests_waiting", "Sequences in the queue.", engine.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Part of the KV cache in use, 0 to 1.", engine.cache_usage)
        yield self._gauge("kv_cache_max_bytes", "Memory of the KV cache at most.", engine.limits.cache_bytes)
        yield self._gauge("healthy", "1 unless a restart would help.", float(engine.health.ok))
        yield self._counter("num_preemptions", "Sequences that gave up their place.", engine.preemptions)
        yield self._counter("prompt_tokens", "Tokens of prompts.", stats.prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", stats.generation_tokens)
        yield self._counter("prefix_cache_queries", "Tokens looked for in the cache.", stats.prefix_queries)
        yield self._counter("prefix_cache_hits", "Tokens found in the cache.", stats.prefix_hits)
        yield self._counter("engine_steps", "Calls of the runner.", stats.steps)
        yield self._counter("engine_failed_steps", "Calls of the runner that failed.", stats.failed_steps)
        yield self._counter("spec_decode_num_drafts", "Steps of sequences with drafts.", stats.drafts)
        yield self._counter("spec_decode_num_draft_tokens", "Tokens drafted.", stats.draft_tokens)
        yield self._counter("spec_decode_num_accepted_tokens", "Of these, accepted.", stats.accepted_tokens)
        places = "spec_decode_num_accepted_tokens_per_pos"
        yield self._labelled(places, "The same by place in the draft.", ["position"], stats.accepted_at)
        yield self._labelled("request_success", "Sequences by how they ended.", ["finished_reason"], stats.finished)
        yield self._labelled("admission_rejections", "Requests not taken in, by why.", ["reason"], stats.refused)
        yield self._labelled("http_responses", "Answers.", ["route", "status"], self._service.answers)
        seconds = {
            "time_to_first_token_seconds": ("From arrival to the first token.", stats.first_token_time),
            "inter_token_latency_seconds": ("From token to token.", stats.inter_token_time),
            "e2e_request_latency_seconds": ("From arrival to the end.", stats.request_time),
            "request_queue_time_seconds": ("From arrival to the first step.", stats.queue_time),
            "engine_step_seconds": ("One call of the runner.", stats.step_time),
            "engine_overhead_seconds": ("The engine's own work around a step.", stats.overhead_time),
            "request_prompt_tokens": ("Tokens of a prompt.", stats.prompt_length),
            "request_generation_tokens": ("Tokens generated for a sequence.", stats.generation_length),
        }
        for name, (text, histogram) in seconds.items():
            yield self._histogram(name, text, histogram)

    def _adapters(self) -> Iterator[Family]:
        """Which low-rank adapters have work, as vLLM tells routers: in labels, the value being the time."""
        if not self._service.adapters:
            return
        running, waiting = self._service.engine.adapters
        labels = {
            "max_lora": str(len(self._service.adapters)),
            "running_lora_adapters": ",".join(sorted(running)),
            "waiting_lora_adapters": ",".join(sorted(waiting)),
        }
        family = GaugeMetricFamily(self._name("lora_requests_info"), "Adapters with requests.", labels=list(labels))
        family.add_metric(list(labels.values()), time.time())
        yield family

    def _name(self, name: str) -> str:
        return f"{self._service.metrics_prefix}:{name}"

    def _gauge(self, name: str, text: str, value: float) -> Family:
        family = GaugeMetricFamily(self._name(name), text, labels=["model_name"])
        family.add_metric([self._service.model], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Family:
        family = CounterMetricFamily(self._name(name), text, labels=["model_name"])
        family.add_metric([self._service.model], value)
        return family

    def _labelled(self, name: str, text: str, labels: list[str], counts: object) -> Family:
        family = CounterMetricFamily(self._name(name), text, labels=["model_name", *labels])
        for key, value in list(dict(counts).items()):  # type: ignore[call-overload]
            values = [str(part) for part in (key if isinstance(key, tuple) else (key,))]
            family.add_metric([self._service.model, *values], value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Family:
        family = HistogramMetricFamily(self._name(name), text, labels=["model_name"])
        buckets, reached = [], 0
        for bound, count in zip([*map(str, histogram.bounds), "+Inf"], histogram.counts, strict=True):
            reached += count
            buckets.append((bound, float(reached)))
        family.add_metric([self._service.model], buckets, histogram.total)
        return family
