"""Many clients at once through the same two workers: every client writes text after text, as many at a time as clients.

A closed loop: a client sends its next request when the last one is done. The requests are the same at every number of
clients, no two clients write the same one, and each text is compared with the one that a single client wrote.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from specsplit.client.event_loop import event_loop
from specsplit.client.pipeline import run_speculative_loop_async
from specsplit.errors import WorkerError
from specsplit.experiment.columns import FAILED, OK, RequestRecord
from specsplit.experiment.records import Request, gamma_controller, request_config, request_record
from specsplit.experiment.rows import writing_rows
from specsplit.rpc.codec import CHANNEL_OPTIONS
from specsplit.rpc.credentials import Access
from specsplit.settings.run import OrchestratorConfig

WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class _Place:
    """clients: how many there were; client: which of them wrote it, from 0. started_ms: since the first request."""

    clients: int
    client: int
    started_ms: float


@dataclass(frozen=True)
class CapacityRecord(RequestRecord, _Place):
    """One request with so many clients: one row of `capacity_requests.csv`.

    repeat counts how often the prompt was taken. matches_single: the text that one client alone got; None when one of
    the two failed. queue_ms: what its rounds waited in the workers for other clients, summed.
    """

    matches_single: bool | None = True
    queue_ms: float = 0.0


def measure_capacity(
    requests: Sequence[Request],
    configs: Sequence[OrchestratorConfig],
    clients: Sequence[int],
    output: Path,
    *,
    count: int,
    warmup: int,
    on_level: Callable[[list[CapacityRecord]], None] = lambda rows: None,
) -> None:
    """`count` requests by each number of clients for each configuration; writes a row each to `output`.

    configs: with the addresses of the workers; they may differ. clients: ascending, the first one is 1.
    warmup: requests of each client before each level, of a few tokens, in no table. on_level: gets the rows of a level.
    Raises WorkerError when a worker does not answer before a text has begun; a text that fails later is a row.
    """
    if list(clients[:1]) != [1]:
        raise ValueError("the first number of clients is 1, whose texts the others are compared with")
    with writing_rows(output, CapacityRecord) as write:
        for config in configs:
            short = config.model_copy(update={"max_output_tokens": min(WARM_UP_TOKENS, config.max_output_tokens)})
            single: dict[tuple[str, int], str] = {}
            for number in clients:
                _run_clients(requests, short, number, number * warmup)
                records = _run_clients(requests, config, number, count)
                if number == 1:
                    single = {(r.request_id, r.repeat): r.output_sha256 for r in records if r.status == OK}
                level = [replace(record, matches_single=_matches(record, single)) for record in records]
                for record in level:
                    write(record)
                on_level(level)


def _matches(record: CapacityRecord, single: dict[tuple[str, int], str]) -> bool | None:
    expected = single.get((record.request_id, record.repeat))
    return None if expected is None or record.status == FAILED else record.output_sha256 == expected


def _run_clients(
    requests: Sequence[Request], config: OrchestratorConfig, clients: int, count: int
) -> list[CapacityRecord]:
    """`count` requests, taken in turn, by clients with channels of their own; in the order of their starts."""
    turns = [(requests[i % len(requests)], 1 + i // len(requests)) for i in range(count)]
    try:
        records = event_loop().run(_write_texts(turns, config, clients))
    except ExceptionGroup as group:  # one of them says enough
        raise group.exceptions[0] from None
    return sorted(records, key=lambda record: record.started_ms)


async def _write_texts(
    turns: Iterable[tuple[Request, int]], config: OrchestratorConfig, clients: int
) -> list[CapacityRecord]:
    waiting = deque(turns)
    records: list[CapacityRecord] = []
    began = time.perf_counter()
    access = Access.of(config)
    # Clients of one process would share a connection otherwise; clients on different machines do not.
    options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]

    async def client(number: int) -> None:
        controller = gamma_controller(config)
        async with (
            access.aio_channel(config.draft_address, options) as draft,
            access.aio_channel(config.target_address, options) as target,
        ):
            stubs = access.stub("draft", draft), access.stub("target", target)
            while waiting:
                request, repeat = waiting.popleft()
                own = request_config(config, request.id)
                started_ms = (time.perf_counter() - began) * 1e3
                error = None
                try:
                    result = await run_speculative_loop_async(
                        *stubs, request.token_ids, own, controller=controller, request_id=request.id
                    )
                except WorkerError as failure:
                    if failure.result is None:
                        raise
                    result, error = failure.result, failure
                queued = sum(r.draft_queue_ms + r.verify_queue_ms for r in result.rounds)
                row = asdict(request_record(request, result, own, repeat, error))
                records.append(CapacityRecord(clients, number, started_ms, queue_ms=queued, **row))

    async with asyncio.TaskGroup() as group:
        for number in range(clients):
            group.create_task(client(number))
    return records
