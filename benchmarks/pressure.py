"""Throughput with more clients than sessions: does the worker stay as busy, and does every client get on?

    python benchmarks/pressure.py --sessions 4 --seconds 15

starts a draft and a target worker with so many sessions, simulated so that a pass takes `--step-ms`, and lets 1, 2, 3
and 4 times as many clients write text after text. Prints a row each: tokens a second of all clients, the share of that
with as many clients as sessions, sessions that changed hands in finished texts, wrong texts, and the tokens of the
clients with fewest and with most. Long texts (`--tokens`) make sessions change hands before a text is done.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import time
from functools import partial
from pathlib import Path

import grpc

from specsplit.client.event_loop import event_loop
from specsplit.client.pipeline import run_speculative_loop_async
from specsplit.client.writer import TextWriter
from specsplit.launch.endpoint import Endpoint
from specsplit.launch.start import own_workers, start_worker
from specsplit.models.sources import prepare_model
from specsplit.rpc.v1 import specsplit_pb2_grpc as pb_grpc
from specsplit.settings.run import OrchestratorConfig

PROMPT = [65, 66, 67]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--slice-s", type=float, default=10.0)
    parser.add_argument("--mode", default="sync")
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    print("clients  tokens/s  share  hand-overs  wrong  least..most tokens")
    with own_workers({role: partial(start, role, args) for role in ("draft", "target")}) as workers:
        addresses = [worker.address for worker in workers.values()]
        config = OrchestratorConfig(mode=args.mode, gamma=3, max_output_tokens=args.tokens)
        with TextWriter(*addresses) as writer:
            expected = writer.write(PROMPT, config).output_tokens
        at_limit = 0.0
        for times in (1, 2, 3, 4):
            clients = times * args.sessions
            written, failures, wrong = event_loop().run(run(addresses, config, clients, args.seconds, expected))
            rate = sum(written) / args.seconds
            at_limit = at_limit or rate
            print(
                f"{clients:7}  {rate:8.1f}  {rate / at_limit:5.2f}  {failures:10}  {wrong:5}  "
                f"{min(written)}..{max(written)}",
                flush=True,
            )


def start(role: str, args: argparse.Namespace, endpoint_file: Path) -> Endpoint:
    """A worker whose passes take their time, those over a prompt too; the draft's a twentieth of the target's."""
    step_ms = args.step_ms / 20 if role == "draft" else args.step_ms
    source = {"source": "synthetic", "step_ms": step_ms, "token_ms": step_ms / 40}
    source["acceptance"] = 0.8 if role == "draft" else 1.0
    model = endpoint_file.with_name(f"model-{role}")
    prepare_model(source, role, model)
    flags = f"--model {model} --port 0 --threads 1 --max-sessions {args.sessions} --session-slice-s {args.slice_s}"
    return start_worker(role, flags.split(), endpoint_file=endpoint_file, timeout_s=120)


async def run(
    addresses: list[str], config: OrchestratorConfig, clients: int, seconds: float, expected: list[int]
) -> tuple[list[int], int, int]:
    """Tokens of each client within so many seconds, sessions that changed hands, and wrong texts."""
    written, counts = [0] * clients, {"hand-overs": 0, "wrong": 0}
    over = time.monotonic() + seconds

    async def client(number: int) -> None:
        def count(tokens: list[int]) -> None:
            if time.monotonic() < over:
                written[number] += len(tokens)

        options = [("grpc.use_local_subchannel_pool", 1)]
        async with (
            grpc.aio.insecure_channel(addresses[0], options=options) as draft,
            grpc.aio.insecure_channel(addresses[1], options=options) as target,
        ):
            stubs = pb_grpc.DraftServiceStub(draft), pb_grpc.TargetServiceStub(target)
            while time.monotonic() < over:
                result = await run_speculative_loop_async(*stubs, PROMPT, config, on_tokens=count)
                counts["hand-overs"] += len(result.failures)
                counts["wrong"] += result.output_tokens != expected

    tasks = [asyncio.create_task(client(number)) for number in range(clients)]
    _, unfinished = await asyncio.wait(tasks, timeout=seconds + 1)
    for task in unfinished:  # in the middle of a text
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            raise result
    return written, counts["hand-overs"], counts["wrong"]


if __name__ == "__main__":
    main()
