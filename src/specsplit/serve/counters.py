"""What /metrics shows: requests, tokens and acceptance, under the names of vLLM's server, which its tools read."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from specsplit.api.generated import GeneratedText
from specsplit.decoding.measures import per_token_ms, verifications
from specsplit.serve.replies import FINISH

T = TypeVar("T", Counter, Gauge, Histogram)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Counters:
    def __init__(self, model: str) -> None:
        self._registry = CollectorRegistry()
        self._model = model

        def made(kind: type[T], name: str, text: str, *labels: str, **more: Any) -> T:
            metric = kind(f"vllm:{name}", text, ["model_name", *labels], registry=self._registry, **more)
            return metric if labels else metric.labels(model)

        count, gauge, seconds = partial(made, Counter), partial(made, Gauge), partial(made, Histogram, buckets=SECONDS)
        self._drafts = count("spec_decode_num_drafts", "Verifications of a draft")
        self._drafted = count("spec_decode_num_draft_tokens", "Drafted tokens")
        self._accepted = count("spec_decode_num_accepted_tokens", "Drafted tokens that were accepted")
        by_position = "spec_decode_num_accepted_tokens_per_pos", "Accepted tokens by position in the draft"
        self._positions = count(*by_position, "position")
        self._prompt = count("prompt_tokens", "Tokens of prompts")
        self._written = count("generation_tokens", "Tokens written")
        self._done = count("request_success", "Texts that were finished", "finished_reason")
        self._failed = count("request_failure", "Requests that ended with an error, by HTTP status", "status")
        self._ttft = seconds("time_to_first_token_seconds", "Time to the first token")
        self._tpot = seconds("request_time_per_output_token_seconds", "Time per token after the first, by request")
        self._latency = seconds("e2e_request_latency_seconds", "Time of a whole text")
        self.running = gauge("num_requests_running", "Texts that are being written")
        self.waiting = gauge("num_requests_waiting", "Requests that wait for a place")

    def written(self, text: GeneratedText) -> None:
        """Count a finished text."""
        self._drafts.inc(verifications(text.rounds))
        self._drafted.inc(sum(r.drafted for r in text.rounds))
        self._accepted.inc(sum(r.accepted for r in text.rounds))
        for round_ in text.rounds:
            for position in range(round_.accepted):
                self._positions.labels(self._model, str(position)).inc()
        self._prompt.inc(len(text.prompt_token_ids))
        self._written.inc(len(text.token_ids))
        self._done.labels(self._model, FINISH[text.finish_reason]).inc()
        if text.ttft_ms is not None:
            self._ttft.observe(text.ttft_ms / 1e3)
        if (tpot_ms := per_token_ms(text.total_ms, text.ttft_ms, len(text.token_ids))) is not None:
            self._tpot.observe(tpot_ms / 1e3)
        self._latency.observe(text.total_ms / 1e3)

    def failed(self, status: int) -> None:
        self._failed.labels(self._model, str(status)).inc()

    def page(self) -> bytes:
        return generate_latest(self._registry)
