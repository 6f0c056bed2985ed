"""The server process: address, keys and certificates, start and stop."""

from __future__ import annotations

import uvicorn
from h11 import LocalProtocolError
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from specsplit.errors import UserError
from specsplit.io import check_openable
from specsplit.rpc.credentials import check_key_pair, is_loopback, join_address
from specsplit.settings.serve import ServeSettings

INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
ASK_AGAIN_S = 0.2


class HalfOpenProtocol(H11Protocol):
    """HTTP/1.1 that answers a client which has closed its own side after its request, as `nc -N` does.

    Such a client looks like one that has gone, until something is written: what is closed on both sides breaks the
    connection then. So two interim replies are written, which HTTP/1.1 allows before any other; events of a stream
    have the same effect.
    """

    def eof_received(self) -> bool:  # type: ignore[override]
        cycle = self.cycle
        if cycle is None or cycle.more_body or cycle.response_complete:
            return False  # nothing is left to answer
        if self.scheme == "https" or cycle.scope["http_version"] != "1.1":
            return False
        cycle.keep_alive = False
        self._ask(2)
        return True

    def _ask(self, times: int) -> None:
        if times and not self.cycle.response_started and not self.transport.is_closing():
            self.transport.write(INTERIM)
            self.loop.call_later(ASK_AGAIN_S, self._ask, times - 1)


def read_keys(settings: ServeSettings, *, insecure: bool) -> list[str]:
    """The keys that clients may show.

    Raises UserError for a file without one, for what is no certificate and its key, and, unless `insecure` is set, for
    a server that other machines reach without a key, or with one that anybody on the way can read.
    """
    keys: list[str] = []
    if settings.api_key_file is not None:
        check_openable(settings.api_key_file)
        try:
            lines = settings.api_key_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api-key-file {settings.api_key_file}: cannot be read: {error}") from None
        keys = [line.strip() for line in lines if line.strip()]
        if not keys:
            raise UserError(f"--api-key-file {settings.api_key_file}: holds no key; write one a line")
        if not all(key.isascii() for key in keys):  # HTTP has no agreed way to send another
            raise UserError(f"--api-key-file {settings.api_key_file}: a key has characters beyond ASCII")
    if (settings.certificate is None) != (settings.certificate_key is None):
        raise UserError("--certificate and --certificate-key: give both, or none")
    for flag, path in (("--certificate", settings.certificate), ("--certificate-key", settings.certificate_key)):
        if path is not None and not path.is_file():
            raise UserError(f"{flag} {path}: no such file")
    if settings.certificate is not None and settings.certificate_key is not None:
        check_key_pair(settings.certificate, settings.certificate_key)
    if not is_loopback(settings.host) and not insecure:
        if not keys:
            raise UserError(
                f"--host {settings.host}: anybody who reaches it could use it; give --api-key-file, or say --insecure "
                "where the network is trusted"
            )
        if settings.certificate is None:
            raise UserError(
                f"--host {settings.host}: keys and texts would be sent in the clear; give --certificate and "
                "--certificate-key, or say --insecure where the network is trusted"
            )
    return keys


def without_broken_requests(app: ASGIApp) -> ASGIApp:
    """The application, whose replies to what turned out to be no HTTP are dropped: uvicorn has refused it already."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except LocalProtocolError:
            while (await receive())["type"] != "http.disconnect":
                pass

    return call


def listen(app: Starlette, settings: ServeSettings) -> None:
    """Serve until SIGTERM or Ctrl-C; texts that are being written get `stop_timeout_s` to end. Raises UserError when
    the address cannot be had."""
    server = uvicorn.Server(
        uvicorn.Config(
            without_broken_requests(app),
            http=HalfOpenProtocol,
            host=settings.host.strip("[]"),
            port=settings.port,
            ssl_certfile=settings.certificate,
            ssl_keyfile=settings.certificate_key,
            timeout_graceful_shutdown=int(settings.stop_timeout_s),
            log_level="warning",
            lifespan="off",
        )
    )
    try:
        socket = server.config.bind_socket()
    except SystemExit:
        raise UserError(f"--port {settings.port} on {settings.host} cannot be had; choose another one") from None
    socket.listen()  # so that who reads the line below can connect at once
    scheme = "http" if settings.certificate is None else "https"
    print(f"serving at {scheme}://{join_address(settings.host, socket.getsockname()[1])}/v1", flush=True)
    server.run(sockets=[socket])
