"""Strangers at real servers: without the token, with a wrong certificate, with another client's session."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from specsplit.client.handshake import connected_pair
from specsplit.client.writer import TextWriter
from specsplit.errors import WorkerError
from specsplit.launch.endpoint import Endpoint
from specsplit.launch.start import attach_worker
from specsplit.rpc.codec import CHANNEL_OPTIONS
from specsplit.rpc.connection import connect
from specsplit.rpc.credentials import Access
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import OrchestratorConfig
from specsplit.settings.worker import TargetWorkerConfig

from grpc_fixtures import PROMPTS, Reference, Worker, serving, verify_request

TOKEN, OTHER = "0123456789abcdef", "fedcba9876543210"
PROMPT = PROMPTS[0]
SERVICES = {
    "draft": ("DraftService", ("GenerateDrafts", "StreamDrafts", "EndSession", "Describe")),
    "target": ("TargetService", ("VerifyDrafts", "StreamVerify", "EndSession", "Describe")),
}
COMMON = (
    "grpc.health.v1.Health/Check",
    "grpc.health.v1.Health/Watch",
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "specsplit.v1.TargetService/NoSuchMethod",
)


@pytest.fixture(autouse=True)
def _no_token_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECSPLIT_TOKEN", raising=False)


@pytest.fixture(scope="module")
def folder(tiny_model_folder: Callable[..., Path]) -> Path:
    return tiny_model_folder("llama")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PEM files of a worker, a client, their authority and another one, and a file with two tokens."""
    root = tmp_path_factory.mktemp("pem")
    authority, another = trustme.CA(), trustme.CA()
    named = {
        "ca": authority.cert_pem,
        "another_ca": another.cert_pem,
    }
    for name, certificate in {
        "worker": authority.issue_cert("127.0.0.1", "gpu-1"),
        "client": authority.issue_cert("client"),
        "stranger": another.issue_cert("client"),
        "elsewhere": authority.issue_cert("gpu-1"),
    }.items():
        named[name] = certificate.cert_chain_pems[0]
        named[f"{name}_key"] = certificate.private_key_pem
    paths = {}
    for name, blob in named.items():
        paths[name] = root / f"{name}.pem"
        blob.write_to_path(str(paths[name]))
    paths["tokens"] = root / "tokens"
    paths["tokens"].write_text(f"{TOKEN}\n{OTHER}\n")
    paths["tokens"].chmod(0o600)
    return paths


@pytest.fixture(scope="module")
def guarded(folder: Path, files: dict[str, Path]) -> Iterator[dict[str, Worker]]:
    """A draft and a target worker that want a token."""
    known: dict[str, Any] = {"token_file": files["tokens"], "access": Access(token=TOKEN)}
    with serving("draft", folder, **known) as draft, serving("target", folder, **known) as target:
        yield {"draft": draft, "target": target}


def every_method(role: str) -> list[str]:
    service, methods = SERVICES[role]
    return [*(f"specsplit.v1.{service}/{method}" for method in methods), *COMMON]


@pytest.mark.parametrize("token", [None, "wrong-wrong-wrong", TOKEN[:-1]])
@pytest.mark.parametrize("role", ["draft", "target"])
def test_without_the_token_every_call_is_refused_before_any_work(
    guarded: dict[str, Worker], role: str, token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = guarded[role]
    passes, sessions = worker.passes, len(worker.servicer.sessions)
    for name in ("Describe", "EndSession"):
        monkeypatch.setattr(type(worker.servicer), name, lambda *_: pytest.fail("it worked"))
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(worker.address) as channel:
        for method in every_method(role):
            for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
                sent: Any = iter([b"\xff"]) if kind.startswith("stream") else b"\xff"  # nobody reads it
                call = getattr(channel, kind)(f"/{method}")
                with pytest.raises(grpc.RpcError) as caught:
                    list(call(sent, metadata=metadata, timeout=20))
                found = caught.value.code(), caught.value.details()
                assert found == (grpc.StatusCode.UNAUTHENTICATED, "this worker wants a token that it knows"), method
        # A stream in which nothing is ever sent is refused as well.
        silent = channel.stream_stream(f"/{every_method(role)[1]}")(_nothing(), metadata=metadata, timeout=20)
        with pytest.raises(grpc.RpcError) as caught:
            next(silent)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert (worker.passes, len(worker.servicer.sessions)) == (passes, sessions)


def _nothing() -> Iterator[bytes]:
    import time

    time.sleep(0.5)
    yield from ()


def test_with_the_token_texts_are_written_in_every_way(guarded: dict[str, Worker], folder: Path, files: dict) -> None:
    draft, target = guarded["draft"], guarded["target"]
    config = OrchestratorConfig.load(
        {
            "draft_address": draft.address,
            "target_address": target.address,
            "token_file": files["tokens"],
            "gamma": 3,
            "max_output_tokens": 12,
            "ignore_eos": True,
        }
    )
    expected = Reference(folder).text(PROMPT, 12)
    sha256 = target.servicer.identity["tokenizer_sha256"]
    with connected_pair(config, sha256) as workers:
        assert list(workers) == ["draft", "target"]
    with TextWriter(draft.address, target.address, access=Access.of(config)) as writer:
        assert writer.write(PROMPT, config).output_tokens == expected
    with TextWriter(draft.address, target.address) as writer, pytest.raises(WorkerError, match="UNAUTHENTICATED"):
        writer.write(PROMPT, config)
    with pytest.raises(WorkerError, match=r"asks for a token and no token was sent: set --token-file, workers\.token"):
        connect("draft", draft.address)
    with pytest.raises(WorkerError, match="asks for a token and the token that was sent is none of its own"):
        connect("draft", draft.address, access=Access(token="x" * 20))
    status = health_pb2_grpc.HealthStub(grpc.insecure_channel(target.address)).Check(
        health_pb2.HealthCheckRequest(), metadata=[("authorization", f"Bearer {TOKEN}")]
    )
    assert status.status == health_pb2.HealthCheckResponse.SERVING


def test_a_session_is_of_the_token_that_opened_it(guarded: dict[str, Worker]) -> None:
    """To another client's token it is an unknown one: it can neither go on with it, nor end it, nor learn of it."""
    target = guarded["target"]
    other = connect("target", target.address, access=Access(token=OTHER))
    mine, theirs = target.stub, other.stub
    mine.VerifyDrafts(verify_request(PROMPT, session="shared"), timeout=20)
    on = verify_request([9], session="shared", round=2, held=PROMPT)
    with pytest.raises(grpc.RpcError) as caught:
        theirs.VerifyDrafts(on, timeout=20)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "does not know the session" in caught.value.details()
    assert not theirs.EndSession(pb.EndSessionRequest(session_id="shared")).existed
    with pytest.raises(grpc.RpcError):
        list(theirs.StreamVerify(iter([pb.StreamVerifyRequest(verify=on)]), timeout=20))
    # A session of theirs with that name is another one, and ends without it.
    theirs.VerifyDrafts(verify_request([40, 41], session="shared"), timeout=20)
    assert theirs.EndSession(pb.EndSessionRequest(session_id="shared")).existed
    assert mine.VerifyDrafts(on, timeout=20).round == 2
    assert mine.EndSession(pb.EndSessionRequest(session_id="shared")).existed
    other.close()


# ---- certificates


@pytest.fixture(scope="module")
def encrypted(folder: Path, files: dict[str, Path]) -> Iterator[Worker]:
    known = {"tls_cert": files["worker"], "tls_key": files["worker_key"]}
    with serving("target", folder, access=Access(files["ca"].read_bytes()), **known) as worker:
        yield worker


@pytest.fixture(scope="module")
def mutual(folder: Path, files: dict[str, Path]) -> Iterator[Worker]:
    known = {"tls_cert": files["worker"], "tls_key": files["worker_key"], "tls_ca": files["ca"]}
    with serving("target", folder, access=shown(files, "client"), **known) as worker:
        yield worker


def shown(files: dict[str, Path], who: str) -> Access:
    return Access(files["ca"].read_bytes(), files[who].read_bytes(), files[f"{who}_key"].read_bytes())


def test_tls_encrypts_and_the_certificate_is_checked(encrypted: Worker, files: dict[str, Path], folder: Path) -> None:
    assert encrypted.address.startswith("grpcs://")
    assert encrypted.stub.VerifyDrafts(verify_request(PROMPT, session="tls"), timeout=20).next_token < 128
    passes = encrypted.passes
    plain = encrypted.address.removeprefix("grpcs://")
    with pytest.raises(WorkerError, match=r"no target worker answers.*it may want TLS, grpcs://127\.0\.0\.1"):
        connect("target", plain, timeout_s=0.5)
    with pytest.raises(WorkerError, match=r"no TLS with the target worker.*CERTIFICATE_VERIFY_FAILED"):
        connect("target", encrypted.address, access=Access(files["another_ca"].read_bytes()))
    with pytest.raises(WorkerError, match=r"no TLS with the target worker.*CERTIFICATE_VERIFY_FAILED"):
        connect("target", encrypted.address)  # the system's authorities do not know it either
    config = OrchestratorConfig.load({"gamma": 0, "max_output_tokens": 8, "ignore_eos": True})
    assert encrypted.passes == passes
    with TextWriter(None, encrypted.address, access=encrypted.access) as writer:
        assert writer.write(PROMPT, config).output_tokens == Reference(folder).text(PROMPT, 8)


def test_a_worker_without_tls_is_told_from_one_with(guarded: dict[str, Worker], files: dict[str, Path]) -> None:
    with pytest.raises(WorkerError, match="no TLS with the draft worker"):
        connect("draft", f"grpcs://{guarded['draft'].address}", access=Access(files["ca"].read_bytes()))


def test_the_name_in_a_certificate_must_be_that_of_the_address(folder: Path, files: dict[str, Path]) -> None:
    ours = Access(files["ca"].read_bytes(), name="gpu-1")
    with serving("target", folder, access=ours, tls_cert=files["elsewhere"], tls_key=files["elsewhere_key"]) as worker:
        assert worker.stub.Describe(pb.DescribeRequest(), timeout=20).role == "target"  # a tunnel to gpu-1
        with pytest.raises(WorkerError, match="no TLS with the target worker"):
            connect("target", worker.address, access=replace(ours, name=None))


def test_mutual_tls_lets_in_who_has_a_certificate_of_the_authority(mutual: Worker, files: dict[str, Path]) -> None:
    assert mutual.stub.VerifyDrafts(verify_request(PROMPT, session="mutual"), timeout=20).next_token < 128
    passes = mutual.passes
    for access in (Access(files["ca"].read_bytes()), shown(files, "stranger")):
        with pytest.raises(WorkerError, match="it may want a certificate of ours, --tls-cert and --tls-key"):
            connect("target", mutual.address, access=access, timeout_s=0.5)
        credentials = grpc.ssl_channel_credentials(access.authorities, access.key, access.certificate)
        with grpc.secure_channel(mutual.address.removeprefix("grpcs://"), credentials, CHANNEL_OPTIONS) as channel:
            for method in every_method("target"):
                with pytest.raises(grpc.RpcError) as caught:
                    channel.unary_unary(f"/{method}")(b"", timeout=20)
                assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert mutual.passes == passes


def test_attaching_to_a_worker_with_a_certificate(
    mutual: Worker, files: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "target.json"
    wanted = TargetWorkerConfig(model=folder, dtype="float32")
    with pytest.raises(WorkerError):
        attach_worker("target", mutual.address, wanted, endpoint_file=file, timeout_s=0.5)
    attach_worker("target", mutual.address, wanted, endpoint_file=file, access=mutual.access)
    endpoint = Endpoint.read(file)
    assert (endpoint.address, endpoint.host) == (mutual.address, "127.0.0.1")
    by_hand = tmp_path / "by-hand.json"
    by_hand.write_text(json.dumps({"address": mutual.address}))
    attach_worker("target", str(by_hand), wanted, endpoint_file=file, access=mutual.access)


def test_session_ids_are_not_guessable() -> None:
    from specsplit.client.session import HeldPrefix

    ids = {HeldPrefix().id for _ in range(1000)}
    assert len(ids) == 1000
    assert all(re.fullmatch("[0-9a-f]{32}", session_id) for session_id in ids)
