"""The time of a bare gRPC message and its answer: the limit that a round is measured against.

Run as a program, this module is the other end: a stream that answers each message after a pause.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import grpc

from specsplit.client.event_loop import event_loop
from specsplit.rpc.codec import CHANNEL_OPTIONS

METHOD = "/specsplit.Transport/Answer"
MESSAGE = bytes(300)  # about as long as a draft
WARM_UP = 5


def bare_round_trip_ms(pause_ms: float, repeats: int = 60) -> float:
    """Median ms of a message and its answer over an open gRPC stream to another process on this machine.

    pause_ms: both sides sleep so long between messages, as while a model runs, since a sleeping process answers later.
    The other side's sleep, as measured there, is not counted.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "specsplit.experiment.transport", str(pause_ms)],
        stdin=subprocess.PIPE,  # its end ends the process
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        try:
            port = int(other.stdout.readline())
            return median(event_loop().run(_trips(port, pause_ms, repeats))[WARM_UP:])
        finally:
            other.stdin.close()


async def _trips(port: int, pause_ms: float, repeats: int) -> list[float]:
    times = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
        call: Any = channel.stream_stream(METHOD)()
        for _ in range(WARM_UP + repeats):
            await asyncio.sleep(pause_ms / 1e3)
            sent = time.perf_counter()
            await call.write(MESSAGE)
            rested_ns = int.from_bytes(await call.read(), "big")
            times.append((time.perf_counter() - sent) * 1e3 - rested_ns / 1e6)
        call.cancel()
    return times


def _serve(pause_ms: float) -> None:
    def answer(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for _ in messages:
            began = time.perf_counter_ns()
            time.sleep(pause_ms / 1e3)
            yield (time.perf_counter_ns() - began).to_bytes(8, "big")

    service, method = METHOD[1:].split("/")
    handler = grpc.stream_stream_rpc_method_handler(answer)
    server = grpc.server(ThreadPoolExecutor(1), options=CHANNEL_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    print(port, flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
