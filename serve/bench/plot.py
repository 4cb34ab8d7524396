"""Pictures of measurements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmc.need import need

Row = dict[str, Any]


def offline(rows: Sequence[Row], path: Path) -> None:
    """Tokens a second of decoding over the batch size, and of prefill as a line across, as a PNG."""
    figure, (axes,) = _figure(1)
    decode = [row for row in rows if row["what"] == "decode"]
    axes.plot([row["batch"] for row in decode], [row["tokens_per_second"] for row in decode], "o-", label="decode")
    for row in rows:
        if row["what"] == "prefill":
            axes.axhline(row["tokens_per_second"], linestyle="--", color="gray", label="prefill")
    axes.set_xlabel("sequences at a time")
    axes.set_ylabel("tokens/s")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=110)


def online(rows: Sequence[Row], path: Path) -> None:
    """Throughput and both latencies over the load, as a PNG."""
    figure, (throughput, first, between) = _figure(3)
    load = [row["concurrency"] or row["rate"] for row in rows]
    throughput.plot(load, [row["output_tokens_per_second"] for row in rows], "o-")
    throughput.set_ylabel("output tokens/s")
    for axes, key, label in (
        (first, "time_to_first_token", "time to first token (ms)"),
        (between, "inter_token_latency", "time between tokens (ms)"),
    ):
        for each in ("p50", "p95"):
            axes.plot(load, [row[key].get(each, 0.0) for row in rows], "o-", label=each)
        axes.set_ylabel(label)
        axes.legend()
    for axes in (throughput, first, between):
        axes.set_xlabel("clients" if rows[0]["concurrency"] else "requests/s")
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=110)


def _figure(count: int) -> tuple[Any, list[Any]]:
    figure = need("matplotlib.figure").Figure(figsize=(1 + 4.5 * count, 4), layout="constrained")
    return figure, [figure.add_subplot(1, count, place + 1) for place in range(count)]
