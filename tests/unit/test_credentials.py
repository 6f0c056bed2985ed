"""Addresses, certificates and tokens: what is taken, what is refused, and that a token is shown nowhere."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import trustme

from specsplit.errors import UserError
from specsplit.rpc.credentials import Access, ServerAccess, is_loopback, read_tokens, split_address
from specsplit.settings.run import OrchestratorConfig
from specsplit.settings.worker import DraftWorkerConfig, TargetWorkerConfig, WorkerSettings

TOKEN, OTHER = "0123456789abcdef", "fedcba9876543210"


@pytest.fixture(autouse=True)
def _no_token_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECSPLIT_TOKEN", raising=False)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"{TOKEN}\n\n  {OTHER} \n")
    path.chmod(0o600)
    return path


@pytest.fixture
def pem(tmp_path: Path) -> dict[str, Path]:
    """Files: ca, cert, key, and those of another authority."""
    files = {}
    for name in ("", "other_"):
        authority = trustme.CA()
        certificate = authority.issue_cert("localhost")
        blobs = {
            "ca": authority.cert_pem,
            "cert": certificate.cert_chain_pems[0],
            "key": certificate.private_key_pem,
        }
        for what, blob in blobs.items():
            files[name + what] = tmp_path / f"{name}{what}.pem"
            blob.write_to_path(str(files[name + what]))
    return files


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("127.0.0.1:1", (False, "127.0.0.1", 1)),
        ("gpu-1.local:50051", (False, "gpu-1.local", 50051)),
        ("grpcs://gpu-1:65535", (True, "gpu-1", 65535)),
        ("[::1]:80", (False, "[::1]", 80)),
        ("grpcs://[::1]:80", (True, "[::1]", 80)),
    ],
)
def test_addresses(address: str, parts: tuple[bool, str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize("address", ["", "grpcs://", "grpcs://host", "https://host:1", "host:0", "unix:/x:1"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UserError, match="is not an address"):
        split_address(address)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("localhost", True), ("::1", True), ("[::1]", True)]
    + [(host, False) for host in ("0.0.0.0", "[::]", "::", "192.168.0.1", "gpu-1", "localhost.example.org", "")],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


# ---- who may bind where


@pytest.mark.parametrize("settings", [DraftWorkerConfig, TargetWorkerConfig])
def test_another_address_needs_tls_or_a_word(
    settings: type[WorkerSettings], pem: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    assert settings.load().host == "127.0.0.1"
    ServerAccess.load(settings.load())
    for host in ("0.0.0.0", "[::]", "gpu-1"):
        with pytest.raises(UserError, match=r"nothing is encrypted.*--tls-cert.*--insecure"):
            ServerAccess.load(settings.load({"host": host}))
    tls = {"host": "0.0.0.0", "tls_cert": pem["cert"], "tls_key": pem["key"]}
    ServerAccess.load(settings.load({**tls, "tls_ca": pem["ca"]}))
    assert not caplog.records
    ServerAccess.load(settings.load({"host": "0.0.0.0", "insecure": True}))
    assert "INSECURE: 0.0.0.0 is open to other machines without TLS or a token" in caplog.text


# What is open to everyone, whatever it is, needs a word. The next door is one line.
@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({"host": "0.0.0.0"}, "nothing is encrypted. Give --tls-cert and --tls-key,"),
        ({"host": "0.0.0.0", "token": "x"}, "nothing is encrypted. Give --tls-cert and --tls-key,"),
        ({"host": "0.0.0.0", "tls": "x"}, "asks nobody who they are. Give --token-file or --tls-ca,"),
        ({"host": "[::]", "tls": "x"}, "asks nobody who they are"),
        ({"host": "gpu-1", "tls": "x"}, "asks nobody who they are"),
        ({"host": "0.0.0.0", "tls": "x", "token": "x"}, None),
        ({"host": "0.0.0.0", "tls": "x", "tls_ca": "x"}, None),
        ({"tls": "x"}, None),
        ({"metrics_port": 0, "metrics_host": "0.0.0.0"}, "--metrics-host 0.0.0.0: other machines could read"),
        ({"metrics_port": 0, "metrics_host": "0.0.0.0", "tls": "x", "token": "x"}, "--metrics-host 0.0.0.0"),
        ({"metrics_port": 0}, None),
        ({"metrics_host": "0.0.0.0"}, None),  # there are none
    ],
)
def test_nothing_is_open_to_everyone_without_a_word(
    given: dict[str, Any], refused: str | None, pem: dict[str, Path], tokens: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files: dict[str, Any] = {}
    if given.pop("tls", None):
        files |= {"tls_cert": pem["cert"], "tls_key": pem["key"]}
    if given.pop("tls_ca", None):
        files["tls_ca"] = pem["ca"]
    if given.pop("token", None):
        files["token_file"] = tokens
    settings = {**given, **files}
    if refused is None:
        ServerAccess.load(TargetWorkerConfig.load(settings))
        assert not caplog.records
        return
    with pytest.raises(UserError, match=re.escape(refused)):
        ServerAccess.load(TargetWorkerConfig.load(settings))
    ServerAccess.load(TargetWorkerConfig.load({**settings, "insecure": True}))
    assert "INSECURE: " in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tls_cert": "cert"}, "--tls-cert and --tls-key go together"),
        ({"tls_key": "key"}, "--tls-key and --tls-ca go with --tls-cert"),
        ({"tls_ca": "ca"}, "--tls-key and --tls-ca go with --tls-cert"),
        ({"tls_cert": "cert", "tls_key": "other_key"}, "are not a certificate and its unencrypted key, both PEM"),
        ({"tls_cert": "key", "tls_key": "cert"}, "are not a certificate and its unencrypted key"),
        ({"tls_cert": "cert", "tls_key": "key", "tls_ca": "key"}, "--tls-ca .*: not a certificate in PEM"),
        ({"tls_cert": "cert", "tls_key": "none"}, "--tls-key / SPECSPLIT_TARGET_TLS_KEY: .*No such file"),
    ],
)
def test_files_that_cannot_be_used(pem: dict[str, Path], tmp_path: Path, given: dict[str, str], message: str) -> None:
    files = {key: pem.get(name, tmp_path / name) for key, name in given.items()}
    with pytest.raises(UserError, match=message):
        ServerAccess.load(TargetWorkerConfig.load(files))


def test_an_encrypted_key_asks_nobody_for_its_password(pem: dict[str, Path]) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(pem["key"].read_bytes(), None)
    pem["key"].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(UserError, match="unencrypted key"):
        ServerAccess.load(TargetWorkerConfig.load({"tls_cert": pem["cert"], "tls_key": pem["key"]}))


# ---- tokens


def test_tokens_come_from_a_file_or_the_environment(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_tokens(TargetWorkerConfig.load()) == []
    monkeypatch.setenv("SPECSPLIT_TOKEN", "of the environment".replace(" ", "-"))
    assert read_tokens(TargetWorkerConfig.load()) == ["of-the-environment"]
    config = OrchestratorConfig.load({"token_file": tokens})
    assert read_tokens(config) == [TOKEN, OTHER]
    assert Access.of(config).token == TOKEN  # a client shows the first one


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no token; make one with: python -c"),
        ("\n \n", "holds no token"),
        ("short", "token 1 is not 16 or more"),
        (f"{TOKEN}\nwith a space in it", "token 2 is not 16"),
        ("\u00e4" * 20, "token 1 is not 16"),
    ],
)
def test_a_token_that_is_none(tokens: Path, text: str, message: str) -> None:
    tokens.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_tokens(TargetWorkerConfig.load({"token_file": tokens}))
    assert not text.strip() or text.strip() not in str(caught.value)


def test_a_token_file_that_others_can_read_is_told(tokens: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_tokens(TargetWorkerConfig.load({"token_file": tokens}))
    assert not caplog.records
    tokens.chmod(0o644)
    read_tokens(TargetWorkerConfig.load({"token_file": tokens}))
    assert f"can be read by others than its owner: chmod 600 {tokens}" in caplog.text
    assert TOKEN not in caplog.text


@pytest.mark.parametrize(
    ("metadata", "known"),
    [
        ([("authorization", f"Bearer {TOKEN}")], True),
        ([("other", "x"), ("authorization", f"Bearer {OTHER}")], True),
        ([], False),
        ([("authorization", TOKEN)], False),
        ([("authorization", f"bearer {TOKEN}")], False),
        ([("authorization", f"Bearer {TOKEN} ")], False),
        ([("authorization", f"Bearer {TOKEN[:-1]}")], False),
        ([("authorization", "Bearer ")], False),
        ([("authorization", "Bearer \u00e4\udcff".encode("utf-8", "surrogateescape"))], False),
        ([("authorization", b"Bearer " + TOKEN.encode())], False),
        ([("authorization", "Bearer wrong"), ("authorization", f"Bearer {TOKEN}")], False),  # the first one counts
    ],
)
def test_who_a_call_is_from(tokens: Path, metadata: list[tuple[str, Any]], known: bool) -> None:
    owner = ServerAccess.load(TargetWorkerConfig.load({"token_file": tokens})).owner(metadata)
    assert (owner is not None) is known
    assert owner is None or len(owner) == 64
    assert ServerAccess.load(TargetWorkerConfig.load()).owner(metadata) == ""


def test_every_token_is_another_owner_and_all_are_compared(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from specsplit.rpc import credentials

    server = ServerAccess.load(TargetWorkerConfig.load({"token_file": tokens}))
    compared = []

    def counted(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return a == b

    monkeypatch.setattr(credentials.hmac, "compare_digest", counted)
    owners = {server.owner([("authorization", f"Bearer {token}")]) for token in (TOKEN, OTHER)}
    assert len(owners) == 2
    assert server.owner([("authorization", "Bearer x")]) is None
    assert compared == [(32, 32)] * 6  # digests of one length, both of them whichever is right


def test_a_token_does_not_leave_in_the_clear(tokens: Path) -> None:
    access = Access.of(OrchestratorConfig.load({"token_file": tokens}))
    with pytest.raises(UserError, match=r"the token would go to gpu-1:1 in the clear: write grpcs://gpu-1:1"):
        access.channel("gpu-1:1")
    Access.of(OrchestratorConfig.load({"token_file": tokens, "insecure": True})).channel("gpu-1:1").close()
    access.channel("127.0.0.1:1").close()
    access.channel("grpcs://gpu-1:1").close()
    Access().channel("gpu-1:1").close()  # there is nothing to lose


def test_a_token_is_shown_nowhere(tokens: Path, pem: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    config = OrchestratorConfig.load({"token_file": tokens, "tls_cert": pem["cert"], "tls_key": pem["key"]})
    access = Access.of(config)
    shown = f"{access!r} {access} {config!r} {config.model_dump_json()} {caplog.text}"
    shown += repr(ServerAccess.load(TargetWorkerConfig.load({"token_file": tokens})))
    assert TOKEN not in shown
    assert "PRIVATE KEY" not in shown
