"""Figures of a worker for Prometheus, on a port of their own; off unless `metrics_port` is set."""

from __future__ import annotations

import logging
from typing import Any

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server

from specsplit.errors import UserError
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.worker.batching import SharedModel
from specsplit.worker.sessions import SessionStore

log = logging.getLogger(__name__)
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Metrics:
    """Counts rounds, drafted and accepted tokens, waiting and refusals, and shows sessions, caches and the queue.

    The acceptance rate over a time is that of the counters: rate(accepted) / rate(drafted).
    """

    def __init__(self) -> None:
        # Of its own, so that workers in one process do not share their numbers.
        self.registry = CollectorRegistry()
        self._server: Any = None
        known: dict[str, Any] = {"namespace": "specsplit", "registry": self.registry}
        self._rounds = Counter("rounds", "Rounds answered; a round sent again is not counted again", **known)
        self._drafted = Counter(
            "drafted_tokens",
            "Longest path of each tree: tokens that could be accepted; of a draft worker, all",
            **known,
        )
        self._accepted = Counter("accepted_tokens", "Drafted tokens that the target confirmed", **known)
        self._refused = Counter("refused", "Calls that ended with another status than OK", ["status"], **known)
        self._queue = Histogram("queue_seconds", "Waiting for the model, by round", buckets=SECONDS, **known)
        self._compute = Histogram("compute_seconds", "Work of a round without that", buckets=SECONDS, **known)
        self._ahead = Counter(
            "ahead_compute_seconds", "Work of drafting ahead, of use or not; not in compute_seconds", **known
        )
        self._lookups = Counter(
            "suffix_drafts",
            "Drafts of a model of source suffix, by where their first token came from: session, global (earlier "
            "texts), model, none; those made ahead are not counted",
            ["source"],
            **known,
        )
        self._sessions = Gauge("sessions", "Sessions held", **known)
        self._cache = Gauge("cache_bytes", "Memory reserved for the caches of sessions", **known)
        self._waiting = Gauge("waiting_passes", "Passes that wait for the model now", **known)
        self._about = Info("worker", "What the worker serves", **known)

    def listen(self, host: str, port: int) -> None:
        """Serve them at http://host:port/metrics. Raises UserError when the address cannot be had."""
        try:
            self._server, _ = start_http_server(port, host, registry=self.registry)
        except OSError as error:
            raise UserError(f"--metrics-port {port} on {host}: {error.strerror or error}; choose another one") from None
        log.info("metrics at http://%s:%d/metrics", host, self.port)

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def watch(self, sessions: SessionStore, model: SharedModel, description: pb.DescribeReply) -> None:
        """Show what a worker holds, asked anew at every scrape."""
        self._sessions.set_function(lambda: len(sessions))
        self._cache.set_function(lambda: sessions.cache_bytes)
        self._waiting.set_function(lambda: model.waiting)
        names = ("role", "model", "version", "dtype", "device")
        self._about.info({name: str(getattr(description, name)) for name in names})

    def round(self, queue_ms: float, compute_ms: float, drafted: int, accepted: int) -> None:
        self._rounds.inc()
        self._drafted.inc(drafted)
        self._accepted.inc(accepted)
        self._queue.observe(queue_ms / 1e3)
        self._compute.observe(compute_ms / 1e3)

    def ahead(self, compute_ms: float) -> None:
        self._ahead.inc(compute_ms / 1e3)

    def looked_up(self, source: str) -> None:
        self._lookups.labels(source).inc()

    def refused(self, status: grpc.StatusCode) -> None:
        self._refused.labels(status.name).inc()
