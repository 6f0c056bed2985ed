"""Runs one worker: loads the model, serves gRPC with health and reflection, drains and stops."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from specsplit import tracing
from specsplit.engines.loading import check_model, load_model, target_tokenizer
from specsplit.engines.projection import Projection
from specsplit.errors import UserError
from specsplit.launch.endpoint import Endpoint, describe_identity
from specsplit.launch.environment import usable_cores
from specsplit.launch.heartbeat import start_heartbeat
from specsplit.launch.lease import Lease, lease_holder
from specsplit.models.sources import model_folder, resolve_model
from specsplit.models.tokenizer import pack_tokenizer
from specsplit.models.vocabulary import load_vocabulary
from specsplit.rpc.codec import CHANNEL_OPTIONS
from specsplit.rpc.credentials import ServerAccess, join_address
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.rpc.v1 import specsplit_pb2_grpc as pb_grpc
from specsplit.settings.worker import DraftWorkerConfig, TargetWorkerConfig, WorkerSettings
from specsplit.worker.batching import SharedModel
from specsplit.worker.calls import OpenCalls
from specsplit.worker.draft_service import DraftServicer
from specsplit.worker.interceptor import AuthInterceptor
from specsplit.worker.prometheus import Metrics
from specsplit.worker.servicer import WorkerServicer
from specsplit.worker.spans import WorkerSpans
from specsplit.worker.target_service import TargetServicer

log = logging.getLogger(__name__)
LEASE_POLL_S = 0.5
SPARE_CALLS = 16  # beyond those that wait, so that health, Describe and refusals are always answered
SWEEP_S = 1.0
SERVER_OPTIONS = [
    *CHANNEL_OPTIONS,
    ("grpc.so_reuseport", 0),  # otherwise two workers could listen on one port and share its calls
]


def load_servicer(config: WorkerSettings) -> WorkerServicer:
    """Load the model that the settings name and wrap it into its service.

    Raises UserError when the model is missing or cannot be loaded.
    """
    check_model(config)
    assert config.model is not None
    folder, manifest = resolve_model(config.model)
    threads = config.threads or usable_cores()
    model, identity = load_model(folder, manifest, config, threads)
    shared = SharedModel(model, threads, config.seed)
    if isinstance(config, DraftWorkerConfig):
        vocabulary = load_vocabulary(folder, target_tokenizer(config), model.vocab_size)
        drafts = DraftServicer(shared, config, identity, vocabulary)
        if drafts.head is not None:
            drafts.states["states_needed"].projection_sha256 = Projection(folder).projection_sha256
        return drafts
    head = config.hidden_states_draft if isinstance(config, TargetWorkerConfig) else None
    projection = None if head is None else Projection(model_folder(head))
    servicer = TargetServicer(shared, config, identity, projection)
    servicer.tokenizer_files = cache(partial(pack_tokenizer, folder))
    return servicer


class _Threads(ThreadPoolExecutor):
    """Threads that are started when they are needed. Where the system gives no more, calls wait for those that there
    are: an error here would end the thread in which gRPC takes calls, and nobody would be answered any more."""

    def _adjust_thread_count(self) -> None:
        with suppress(RuntimeError):
            super()._adjust_thread_count()


class WorkerServer:
    """A gRPC server: health and reflection from `start` on, the worker's service from `open` on.

    port: the one it listens on after `start`.
    """

    def __init__(self, config: WorkerSettings) -> None:
        self.config = config
        self.port = 0
        self.servicer: WorkerServicer | None = None
        role = "draft" if isinstance(config, DraftWorkerConfig) else "target"
        self.service = pb.DESCRIPTOR.services_by_name[f"{role.title()}Service"].full_name
        self._access = ServerAccess.load(config)
        self.metrics = Metrics() if config.metrics_port is not None else None
        self.spans = WorkerSpans.of(role)
        self._open_calls = OpenCalls(config.stream_limit, config.stream_idle_s)
        refused = self.metrics.refused if self.metrics else None
        self._auth = AuthInterceptor(self._access, self.service, self._open_calls, refused)
        self._stopped = threading.Event()
        threads = config.stream_limit + SPARE_CALLS
        self._server = grpc.server(
            _Threads(threads, "rpc"),  # they mostly wait for the model
            interceptors=[self._auth],
            options=list({**dict(SERVER_OPTIONS), "grpc.max_receive_message_length": config.message_bytes}.items()),
            maximum_concurrent_rpcs=threads,
        )
        self._late = _LateService()
        self._server.add_generic_rpc_handlers((self._late,))
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (self.service, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    def start(self) -> None:
        """Listen and report NOT_SERVING. Raises UserError when the address is in use or not local."""
        address = join_address(self.config.host, self.config.port)
        self._report(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            if self._access.credentials is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, self._access.credentials)
        except RuntimeError as error:
            raise UserError(
                f"cannot listen on {address}: it is in use or not an address of this machine. "
                f"Choose another --port (0 = any free one) or --host."
            ) from error
        self._server.start()
        threading.Thread(target=self._sweep, name="sweep", daemon=True).start()
        if self.metrics is not None:
            assert self.config.metrics_port is not None
            self.metrics.listen(self.config.metrics_host, self.config.metrics_port)

    def open(self, servicer: WorkerServicer) -> None:
        """Serve the loaded model and report SERVING."""
        # The interceptor has let the call through, so it has an owner.
        servicer.owner_of = lambda metadata: self._access.owner(metadata) or ""
        self.servicer = servicer
        if self.metrics is not None:
            self.metrics.watch(servicer.sessions, servicer.model, servicer.Describe(pb.DescribeRequest(), None))
            servicer.metrics = self.metrics
        servicer.spans = self.spans
        servicer.open_calls = self._open_calls
        if isinstance(servicer, DraftServicer):
            pb_grpc.add_DraftServiceServicer_to_server(servicer, self._late)
        else:
            pb_grpc.add_TargetServiceServicer_to_server(servicer, self._late)
        self._auth.loading = False
        self._report(health_pb2.HealthCheckResponse.SERVING)

    def stop(self) -> None:
        """Report NOT_SERVING, refuse new calls, let running ones finish within `drain_s` seconds, and stop."""
        self._health.enter_graceful_shutdown()
        self._stopped.set()
        self._server.stop(grace=self.config.drain_s).wait()
        if self.metrics is not None:
            self.metrics.close()
        if self.servicer is not None:
            self.servicer.model.close()

    def _sweep(self) -> None:
        while not self._stopped.wait(SWEEP_S):
            self._open_calls.sweep()

    def _report(self, status: int) -> None:
        for name in ("", self.service):
            self._health.set(name, status)


class _LateService(grpc.GenericRpcHandler):
    """Handlers that are added while the server already runs. The generated code takes it for a server."""

    def __init__(self) -> None:
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handlers.get(details.method)

    def add_registered_method_handlers(self, service: str, handlers: dict[str, grpc.RpcMethodHandler]) -> None:
        self._handlers.update({f"/{service}/{method}": handler for method, handler in handlers.items()})

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Ignored: the same handlers in another form."""


def _on_signals(handler: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def serve(
    config: WorkerSettings,
    *,
    endpoint_file: Path | None = None,
    users_file: Path | None = None,
    on_loaded: Callable[[], None] = lambda: None,
) -> None:
    """Run a worker until SIGTERM, SIGINT or the end of its lease. While it loads, a signal ends it at once.

    endpoint_file: written once the worker serves; deleting it stops the worker.
    users_file: lists the endpoint files of those who share it; the worker stops when none of them exists.
    on_loaded: called when the model is loaded; from then on this function watches the lease and drains when it ends.
    """
    stop = threading.Event()
    # A handler in Python would have to wait for the library that reads the weights.
    _on_signals(signal.SIG_DFL)
    lease = Lease(lease_holder(), endpoint_file, users_file)
    server = WorkerServer(config)
    server.start()  # before loading: health is answered meanwhile, and a port in use is reported at once
    servicer = load_servicer(config)
    _on_signals(lambda *_: stop.set())
    on_loaded()
    if lease.lost():
        server.stop()
        log.info("stopped while loading")
        return
    server.open(servicer)
    description = servicer.Describe(pb.DescribeRequest(), None)
    log.info("serving %s on %s", describe_identity(description), join_address(config.host, server.port))
    if endpoint_file is not None:
        tls = config.tls_cert is not None
        heartbeat = endpoint_file.with_name(f".{endpoint_file.name}.heartbeat")
        endpoint_file.parent.mkdir(parents=True, exist_ok=True)
        heartbeat.touch()
        start_heartbeat(heartbeat)
        ours = Endpoint.local(config.host, server.port, description, lease.holder, tls=tls, heartbeat=heartbeat)
        ours.write(endpoint_file)
        lease.written, lease.inode = True, endpoint_file.stat().st_ino
    while not stop.wait(LEASE_POLL_S):
        if reason := lease.lost():
            log.info("stopping: %s", reason)
            break
    server.stop()
    if endpoint_file is not None:
        Endpoint.remove(endpoint_file, pid=os.getpid())
        heartbeat.unlink(missing_ok=True)
    log.info("stopped")
    tracing.stop()  # sends the last spans
    # Python's own shutdown may take seconds: it waits for every thread, even for a pass of the model whose result is no
    # longer wanted, and unloads the libraries.
    os._exit(0)
