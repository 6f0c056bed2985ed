"""A TCP relay that misbehaves on demand: what stands between an orchestrator and a worker when a network is bad."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

CHUNK = 16 * 1024
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close at once, the peer gets a reset


class Connection:
    """Both ends of a relayed connection. silent: what comes is taken and goes nowhere, as if the other side were gone
    without a word."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.near, self.far = near, far
        self.silent = False

    def reset(self) -> None:
        for end in (self.near, self.far):
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class FaultyNetwork:
    """Relays connections to 127.0.0.1:`port`.

    delay_s: how late every chunk is, each way. bytes_per_s: how fast it is sent on, 0 = as fast as it comes.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.delay_s = 0.0
        self.bytes_per_s = 0
        self.connections: list[Connection] = []
        self._flows = threading.Event()
        self._flows.set()
        self._repeat = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Reset every connection; new ones are relayed."""
        connections, self.connections = self.connections, []
        for connection in connections:
            connection.reset()

    def go_silent(self) -> None:
        """Leave every connection half-open: it stands, and nothing comes through any more. New ones are relayed."""
        for connection in self.connections:
            connection.silent = True

    def stall(self) -> None:
        """Hold back everything, on new connections too, until `resume`."""
        self._flows.clear()

    def resume(self) -> None:
        self._flows.set()

    def repeat_next(self) -> None:
        """Send the next chunk twice, which no correct network does."""
        self._repeat = True

    def close(self) -> None:
        self._listener.close()
        self.cut()
        self.resume()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.port))
                except OSError:
                    near.close()
                    continue
                connection = Connection(near, far)
                self.connections.append(connection)
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._relay, args=(connection, source, sink), daemon=True).start()

    def _relay(self, connection: Connection, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(CHUNK):
                time.sleep(self.delay_s + (len(data) / self.bytes_per_s if self.bytes_per_s else 0.0))
                self._flows.wait()
                if connection.silent:
                    continue
                if self._repeat:
                    self._repeat = False
                    sink.sendall(data)
                sink.sendall(data)
        if not connection.silent:
            for end in (source, sink):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


@contextmanager
def faulty_network(address: Callable[[], str] | str) -> Iterator[FaultyNetwork]:
    """A relay to host:port for the time of a test."""
    text = address if isinstance(address, str) else address()
    network = FaultyNetwork(int(text.rpartition(":")[2]))
    try:
        yield network
    finally:
        network.close()
