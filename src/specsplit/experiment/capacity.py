"""Many clients at once through the same two workers: every client writes text after text, as many at a time as clients.

A closed loop: a client sends its next request when the last one is done. The requests are the same at every number of
clients, no two clients write the same one, and each text is compared with the one that a single client wrote.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from specsplit.client.pipeline import event_loop, run_speculative_loop_async
from specsplit.client.result import SpeculativeResult
from specsplit.decoding.adaptive import GammaController
from specsplit.errors import WorkerError
from specsplit.experiment.columns import FAILED, OK, RequestRecord
from specsplit.experiment.records import Request, request_record, request_seed
from specsplit.experiment.rows import RowFile
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


CAPACITY_COLUMNS = tuple(f.name for f in fields(CapacityRecord))


@dataclass(frozen=True)
class Job:
    """A request, how often its prompt was taken so far, and its settings with the addresses of the workers."""

    request: Request
    repeat: int
    config: OrchestratorConfig


@dataclass(frozen=True)
class Done:
    """A text, which client wrote it, when it began, and why it is not finished."""

    job: Job
    client: int
    started_ms: float
    result: SpeculativeResult
    error: WorkerError | None = None


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
    """
    if list(clients[:1]) != [1]:
        raise ValueError("the first number of clients is 1, whose texts the others are compared with")
    with RowFile(output, CAPACITY_COLUMNS) as rows:
        for config in configs:
            jobs = list(_jobs(requests, config, count))
            single: dict[tuple[str, int], str] = {}
            for number in clients:
                short = config.model_copy(update={"max_output_tokens": min(WARM_UP_TOKENS, config.max_output_tokens)})
                run_clients(list(_jobs(requests, short, number * warmup)), number)
                done = run_clients(jobs, number)
                records = [_record(text, number) for text in sorted(done, key=lambda text: text.started_ms)]
                for record in records if number == 1 else ():
                    if record.status == OK:
                        single[record.request_id, record.repeat] = record.output_sha256
                level = [replace(record, matches_single=_matches(record, single)) for record in records]
                for record in level:
                    rows.write(asdict(record))
                on_level(level)


def _matches(record: CapacityRecord, single: dict[tuple[str, int], str]) -> bool | None:
    expected = single.get((record.request_id, record.repeat))
    return None if expected is None or record.status == FAILED else record.output_sha256 == expected


def _jobs(requests: Sequence[Request], config: OrchestratorConfig, count: int) -> Iterator[Job]:
    for number in range(count):
        request = requests[number % len(requests)]
        own = config.model_copy(update={"seed": request_seed(config.seed, request.id)})
        yield Job(request, 1 + number // len(requests), own)


def run_clients(jobs: Sequence[Job], clients: int) -> list[Done]:
    """All jobs by so many clients, each on channels of its own; in the order in which they ended.

    Raises WorkerError when a worker does not answer before a text has begun; a text that fails later is an entry.
    """
    try:
        return event_loop().run(_run_clients(jobs, clients))
    except ExceptionGroup as group:  # one of them says enough
        raise group.exceptions[0] from None


async def _run_clients(jobs: Sequence[Job], clients: int) -> list[Done]:
    waiting = deque(jobs)
    done: list[Done] = []
    began = time.perf_counter()

    async def client(number: int) -> None:
        # Of its own: clients on one machine would share a connection otherwise, as clients of one machine do not.
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        if not waiting:
            return
        config = waiting[0].config
        controller = None
        if config.gamma == "auto":
            controller = GammaController(config.mode, config.gamma_limit, fan_out=config.fan_out)
        access = Access.of(config)
        async with (
            access.aio_channel(config.draft_address, options) as draft,
            access.aio_channel(config.target_address, options) as target,
        ):
            stubs = access.stub("draft", draft), access.stub("target", target)
            while waiting:
                job = waiting.popleft()
                started_ms = (time.perf_counter() - began) * 1e3
                tokens = job.request.token_ids
                error = None
                try:
                    result = await run_speculative_loop_async(
                        *stubs, tokens, job.config, controller=controller, request_id=job.request.id
                    )
                except WorkerError as failure:
                    if failure.result is None:
                        raise
                    result, error = failure.result, failure
                done.append(Done(job, number, started_ms, result, error))

    async with asyncio.TaskGroup() as group:
        for number in range(clients):
            group.create_task(client(number))
    return done


def _record(text: Done, clients: int) -> CapacityRecord:
    record = request_record(text.job.request, text.result, text.job.config, text.job.repeat, text.error)
    queued = sum(r.draft_queue_ms + r.verify_queue_ms for r in text.result.rounds)
    return CapacityRecord(
        clients=clients, client=text.client, started_ms=text.started_ms, queue_ms=queued, **asdict(record)
    )
