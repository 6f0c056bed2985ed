"""Who may reach a worker, and how a client shows that it may: TLS, mutual TLS, bearer tokens.

An address is `host:port` without TLS and `grpcs://host:port` with it. Tokens come from a file or from SPECSPLIT_TOKEN
and go nowhere else: they are in no message, log or record.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import ssl
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import grpc

from specsplit.errors import UserError
from specsplit.io import check_openable
from specsplit.rpc.codec import CHANNEL_OPTIONS
from specsplit.rpc.v1 import specsplit_pb2_grpc as pb_grpc
from specsplit.settings.access import AccessSettings
from specsplit.settings.run import OrchestratorConfig
from specsplit.settings.worker import WorkerSettings

log = logging.getLogger(__name__)
TLS_SCHEME = "grpcs://"
TOKEN_VARIABLE = "SPECSPLIT_TOKEN"
SHORTEST_TOKEN = 16
MAKE_TOKEN = "python -c 'import secrets; print(secrets.token_hex(32))'"
AUTHORIZATION = "authorization"
STUBS: dict[str, Callable[[Any], Any]] = {"draft": pb_grpc.DraftServiceStub, "target": pb_grpc.TargetServiceStub}


# ---- addresses


def split_address(address: str) -> tuple[bool, str, int]:
    """Whether TLS is spoken there, the host and the port. Raises UserError for what is no address."""
    tls = address.startswith(TLS_SCHEME)
    host, _, port = address.removeprefix(TLS_SCHEME).rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(
            f"{address!r} is not an address: write host:port, as in 127.0.0.1:50051, or {TLS_SCHEME}host:port for TLS"
        )
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise UserError(f"{address!r}: write an IPv6 address in brackets, as in {join_address(host, int(port))}")
    return tls, host, int(port)


def join_address(host: str, port: int) -> str:
    """host:port, an IPv6 address in brackets."""
    host = host.removeprefix("[").removesuffix("]")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach, or be, that host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name
        return False


# ---- a worker's side


@dataclass(frozen=True)
class ServerAccess:
    """Who may call a worker. credentials: None = without TLS. tokens: SHA-256 of each; none = no token is asked for."""

    credentials: grpc.ServerCredentials | None
    tokens: tuple[bytes, ...]

    @classmethod
    def load(cls, config: WorkerSettings) -> Self:
        """Read the files that the settings name. Raises UserError when one cannot be used, and unless `insecure` is set
        for an address that other machines reach without TLS, or without a token or a certificate of theirs."""
        credentials = None
        if config.tls_cert is not None:
            certificate, key = _key_pair(config)
            authorities = _authorities(config)
            # With authorities, clients must show a certificate of theirs: mutual TLS.
            credentials = grpc.ssl_server_credentials([(key, certificate)], authorities, authorities is not None)
        elif config.tls_key is not None or config.tls_ca is not None:
            raise UserError(f"{config.flag('tls_key')} and {config.flag('tls_ca')} go with {config.flag('tls_cert')}")
        tokens = tuple(hashlib.sha256(token.encode()).digest() for token in read_tokens(config))
        for what, mend, without in _open_doors(config, encrypted=credentials is not None, asks=bool(tokens)):
            if not config.insecure:
                raise UserError(f"{what}. {mend}, or say --insecure where the network is trusted (docs/security.md)")
            log.warning("INSECURE: %s", without)
        return cls(credentials, tokens)

    def owner(self, metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
        """Who a call is from: a name of one length for each token, "" when none is asked for, None for a stranger."""
        if not self.tokens:
            return ""
        given = next((value for key, value in metadata if key == AUTHORIZATION), "")
        if not isinstance(given, str) or not given.startswith("Bearer "):
            return None
        digest = hashlib.sha256(given.removeprefix("Bearer ").encode()).digest()
        # Each of them, in the same time whichever it is and however much of it is right.
        known = [token for token in self.tokens if hmac.compare_digest(token, digest)]
        return known[0].hex() if known else None


def _open_doors(config: WorkerSettings, *, encrypted: bool, asks: bool) -> Iterator[tuple[str, str, str]]:
    """What other machines could do that nobody may have meant: (what, how to mend it, what is said with `insecure`)."""
    if not is_loopback(config.host):
        reached = f"--host {config.host}: other machines could reach this worker"
        certificates = encrypted and config.tls_ca is not None
        if not encrypted:
            without = f"{config.host} is open to other machines without TLS{'' if asks else ' or a token'}"
            yield f"{reached}, and nothing is encrypted", "Give --tls-cert and --tls-key", without
        elif not asks and not certificates:
            without = f"{config.host} is open to everyone: no token and no certificate is asked for"
            yield f"{reached}, and it asks nobody who they are", "Give --token-file or --tls-ca", without
    if config.metrics_port is not None and not is_loopback(config.metrics_host):
        yield (
            f"--metrics-host {config.metrics_host}: other machines could read the metrics, which ask for no token",
            "Listen on a loopback address",
            f"the metrics on {config.metrics_host} are open to everyone",
        )


# ---- a client's side


@dataclass(frozen=True)
class Access:
    """How a client shows who it is. What is None is not shown; without `authorities` the system's are trusted.

    name: the one in the worker's certificate, where it is not that of the address. insecure: a token may go over a
    network without TLS.
    """

    authorities: bytes | None = None
    certificate: bytes | None = field(default=None, repr=False)
    key: bytes | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    name: str | None = None
    insecure: bool = False

    @classmethod
    def of(cls, config: OrchestratorConfig) -> Self:
        """Read the files that the settings name. Raises UserError when one cannot be used."""
        certificate = key = None
        if config.tls_cert is not None or config.tls_key is not None:
            certificate, key = _key_pair(config)
        tokens = read_tokens(config)
        return cls(
            _authorities(config), certificate, key, tokens[0] if tokens else None, config.tls_name, config.insecure
        )

    def channel(self, address: str, options: Sequence[tuple[str, Any]] = CHANNEL_OPTIONS) -> grpc.Channel:
        """A channel to host:port, or with TLS to grpcs://host:port."""
        return self._open(grpc.insecure_channel, grpc.secure_channel, address, options)

    def aio_channel(self, address: str, options: Sequence[tuple[str, Any]] = CHANNEL_OPTIONS) -> grpc.aio.Channel:
        """As `channel`, for asyncio."""
        return self._open(grpc.aio.insecure_channel, grpc.aio.secure_channel, address, options)

    def stub(self, role: str, channel: Any) -> Any:
        """The stub of a worker of that role; each of its calls carries the token.

        Bound to the calls, for an interceptor would cost something for every message of a stream.
        """
        stub = STUBS[role](channel)
        if self.token is not None:
            metadata = ((AUTHORIZATION, f"Bearer {self.token}"),)
            for method, call in list(vars(stub).items()):
                setattr(stub, method, partial(call, metadata=metadata))
        return stub

    def _open(self, plain: Any, secure: Any, address: str, options: Sequence[tuple[str, Any]]) -> Any:
        tls, host, port = split_address(address)
        target = f"{host}:{port}"
        if tls:
            if self.name is not None:
                options = [*options, ("grpc.ssl_target_name_override", self.name)]
            return secure(
                target, grpc.ssl_channel_credentials(self.authorities, self.key, self.certificate), options=options
            )
        if self.token is not None and not self.insecure and not is_loopback(host):
            raise UserError(
                f"the token would go to {address} in the clear: write {TLS_SCHEME}{address} (the worker needs "
                "--tls-cert), or say --insecure where the network is trusted"
            )
        return plain(target, options=options)


# ---- files


def read_tokens(config: AccessSettings) -> list[str]:
    """The tokens of `token_file`, one a line, or that of SPECSPLIT_TOKEN; none when neither is there."""
    if config.token_file is None:
        tokens, where = [os.environ.get(TOKEN_VARIABLE, "").strip()], TOKEN_VARIABLE
        if not tokens[0]:
            return []
    else:
        where = f"{config.flag('token_file')} {config.token_file}"
        text = _read(config, "token_file").decode("utf-8", errors="replace")
        tokens = [line.strip() for line in text.splitlines() if line.strip()]
        if stat.S_IMODE(config.token_file.stat().st_mode) & 0o077:
            log.warning("%s can be read by others than its owner: chmod 600 %s", where, config.token_file)
        if not tokens:
            raise UserError(f"{where}: holds no token; make one with: {MAKE_TOKEN} > {config.token_file}")
    for number, token in enumerate(tokens, start=1):
        if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
            raise UserError(
                f"{where}: token {number} is not {SHORTEST_TOKEN} or more letters, digits and signs without a space; "
                f"make one with: {MAKE_TOKEN}"
            )
    return tokens


def _key_pair(config: AccessSettings) -> tuple[bytes, bytes]:
    """Certificate and key, PEM, checked to belong together."""
    if config.tls_cert is None or config.tls_key is None:
        raise UserError(f"{config.flag('tls_cert')} and {config.flag('tls_key')} go together")
    certificate, key = _read(config, "tls_cert"), _read(config, "tls_key")
    check_key_pair(config.tls_cert, config.tls_key)
    return certificate, key


def check_key_pair(certificate: Path, key: Path) -> None:
    """Raises UserError unless the files are a certificate and its key, PEM, that belong together."""
    try:
        # Without the password an encrypted key would ask for on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: b"")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{certificate} and {key} are not a certificate and its unencrypted key, both PEM: {error}"
        ) from None


def _authorities(config: AccessSettings) -> bytes | None:
    if config.tls_ca is None:
        return None
    pem = _read(config, "tls_ca")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii", errors="replace"))
    except (ssl.SSLError, ValueError) as error:
        raise UserError(f"{config.flag('tls_ca')} {config.tls_ca}: not a certificate in PEM: {error}") from None
    return pem


def _read(config: AccessSettings, setting: str) -> bytes:
    path: Path = getattr(config, setting)
    named = " / ".join([config.flag(setting), *config.variables(setting)])
    try:
        if path.exists():
            check_openable(path)
        return path.read_bytes()
    except UserError as error:
        raise UserError(f"{named}: {error}") from None
    except OSError as error:
        raise UserError(f"{named}: {path}: {error.strerror or error}") from None
