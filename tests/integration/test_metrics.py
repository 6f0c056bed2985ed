"""What a worker shows of itself: metrics, and health from the start on."""

from __future__ import annotations

import logging
import urllib.request
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from specsplit.client.writer import TextWriter
from specsplit.errors import UserError, WorkerError
from specsplit.rpc.connection import connect
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import OrchestratorConfig
from specsplit.settings.worker import TargetWorkerConfig
from specsplit.worker.server import WorkerServer, load_servicer

from grpc_fixtures import PROMPTS, Worker, serving, verify_request
from waiting import wait_until

Health = health_pb2.HealthCheckResponse


def scraped(worker: Worker) -> dict[str, float]:
    """Name and labels -> value."""
    url = f"http://127.0.0.1:{worker.server.metrics.port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as page:
        families = text_string_to_metric_families(page.read().decode())
        return {
            sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value
            for family in families
            for sample in family.samples
        }


def test_metrics_count_what_happened(tiny_model_folder: Callable[..., Path]) -> None:
    folder = tiny_model_folder("llama")
    with (
        serving("draft", folder, metrics_port=0) as draft,
        serving("target", folder, metrics_port=0) as target,
    ):
        config = OrchestratorConfig.load({"gamma": 3, "max_output_tokens": 12, "ignore_eos": True})
        with TextWriter(draft.address, target.address) as writer:
            result = writer.write(PROMPTS[0], config)
        target.stub.VerifyDrafts(verify_request([5], session="kept"), timeout=20)
        target.stub.VerifyDrafts(verify_request([5], session="kept"), timeout=20)  # the same reply again
        for tokens in ([], [999]):
            with pytest.raises(grpc.RpcError):
                target.stub.VerifyDrafts(verify_request(tokens), timeout=20)
        seen, drafts = scraped(target), scraped(draft)
    rounds = len(result.rounds)
    assert seen["specsplit_rounds_total"] == rounds + 1
    assert seen["specsplit_drafted_tokens_total"] == sum(r.drafted for r in result.rounds)
    assert seen["specsplit_accepted_tokens_total"] == sum(r.accepted for r in result.rounds)
    assert seen["specsplit_refused_total INVALID_ARGUMENT"] == 2
    assert seen["specsplit_queue_seconds_count"] == seen["specsplit_compute_seconds_count"] == rounds + 1
    assert seen["specsplit_compute_seconds_sum"] > 0
    assert seen["specsplit_sessions"] == 1
    assert seen["specsplit_cache_bytes"] == target.servicer.sessions.cache_bytes > 0
    assert seen["specsplit_waiting_passes"] == 0
    assert any(key.startswith("specsplit_worker_info") and "target" in key for key in seen)
    # And one with the prompt, which nobody reads.
    assert drafts["specsplit_drafted_tokens_total"] == sum(r.tree_nodes for r in result.rounds) + 1


def test_metrics_are_off_by_default_and_their_port_is_checked(tiny_model_folder: Callable[..., Path]) -> None:
    folder = tiny_model_folder("llama")
    with serving("target", folder) as worker:
        assert worker.server.metrics is worker.servicer.metrics is None
        server = WorkerServer(TargetWorkerConfig.load({"port": 0, "metrics_port": worker.server.port}))
        with pytest.raises(UserError, match=r"--metrics-port .* choose another one"):
            server.start()
        server.stop()


def test_health_says_not_serving_while_the_model_is_loaded(tiny_model_folder: Callable[..., Path]) -> None:
    config = TargetWorkerConfig.load(
        {"model": tiny_model_folder("llama"), "port": 0, "threads": 1, "max_context": 64, "dtype": "float32"}
    )
    server = WorkerServer(config)
    server.start()
    address = f"127.0.0.1:{server.port}"
    try:
        with grpc.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest(service=server.service))
            assert next(watch).status == Health.NOT_SERVING
            assert health.Check(health_pb2.HealthCheckRequest()).status == Health.NOT_SERVING
            with pytest.raises(WorkerError, match=r"no target worker answers.*\(the model is still being loaded\)"):
                connect("target", address, timeout_s=0.3)
            server.open(load_servicer(config))
            assert next(watch).status == Health.SERVING
            assert health.Check(health_pb2.HealthCheckRequest()).status == Health.SERVING
            with connect("target", address) as connection:
                assert connection.description.role == "target"
            watch.cancel()
    finally:
        server.stop()


def test_the_log_names_session_and_round_of_what_is_refused(
    tiny_model_folder: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with serving("target", tiny_model_folder("llama")) as worker:
        with pytest.raises(grpc.RpcError):
            worker.stub.VerifyDrafts(verify_request([999], session="0123456789abcdef", round=7), timeout=20)
        bad = pb.StreamVerifyRequest(verify=verify_request([999], session="fedcba9876543210", round=3))
        with pytest.raises(grpc.RpcError):
            list(worker.stub.StreamVerify(iter([bad]), timeout=20))
        assert wait_until(lambda: "session=fedcba98 round=3" in caplog.text)
    assert "refused INVALID_ARGUMENT: token id 999 is outside" in caplog.text
    assert "session=01234567 round=7" in caplog.text
    assert "0123456789abcdef" not in caplog.text  # enough to find it, not to use it
