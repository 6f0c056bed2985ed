"""Many requests at once through the same two workers: a closed loop of clients, or requests that arrive at a rate.

In a closed loop a client sends its next request when the last one is done; no two clients write the same request at
once. In an open loop requests arrive when they are due, whether or not others are done. The requests are the same at
every load, and each text is compared with the one that a single client wrote.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from specsplit.client.event_loop import event_loop
from specsplit.client.pipeline import gamma_controller, run_speculative_loop_async
from specsplit.client.text import OnTokens
from specsplit.errors import WorkerError, counted
from specsplit.experiment.columns import FAILED, OK, RequestRecord, writing_rows
from specsplit.experiment.journal import journal_beside
from specsplit.experiment.records import Request, deciding, repeated, request_config, request_record
from specsplit.rpc.codec import CHANNEL_OPTIONS
from specsplit.rpc.credentials import Access
from specsplit.settings.measure import CLOSED, ArrivalPattern, CapacitySettings
from specsplit.settings.run import OrchestratorConfig

WARM_UP_TOKENS = 8
LIMIT_FACTOR = 2.0  # of the median ITL and TTFT of one client, when no limit is given
Stops = Callable[[], OnTokens | None]  # makes what ends one text at a stop string
GOOD_SHARE = 0.9  # of the requests have to keep the limits, or the workers are saturated


@dataclass(frozen=True)
class Load:
    """arrivals: closed, or the pattern of an open loop. clients: of a closed loop, 0 in an open one.
    rate: requests per second that arrive in an open loop."""

    arrivals: str
    clients: int
    rate: float | None

    def __str__(self) -> str:
        return counted(self.clients, "client") if self.rate is None else f"{self.rate:.3g} requests/s ({self.arrivals})"


@dataclass(frozen=True)
class _Place(Load):
    """client: which of them wrote it, from 0; in an open loop the place in the order of arrival. Milliseconds since
    the first request: started_ms, and due_ms, when it should have started (in a closed loop the same)."""

    client: int
    started_ms: float
    due_ms: float


@dataclass(frozen=True)
class CapacityRecord(RequestRecord, _Place):
    """One request at one load: one row of `capacity_requests.csv`.

    repeat counts how often the prompt was taken. matches_single: the text that one client alone got; None when one of
    the two failed. queue_ms: what its rounds waited in the workers for other requests, summed.
    """

    matches_single: bool | None = True
    queue_ms: float = 0.0


Level = list[CapacityRecord]
Write = Callable[..., Coroutine[Any, Any, CapacityRecord]]


def measure_capacity(
    requests: Sequence[Request],
    configs: Sequence[OrchestratorConfig],
    stops: Stops,
    settings: CapacitySettings,
    output: Path,
    *,
    decides: Mapping[str, Any] | None = None,
) -> Iterator[Level]:
    """The requests at each load for each configuration, and on towards saturation: the rows of one load after the
    other, which are written to `output` as well.

    configs: with the addresses of the workers; they may differ. stops: makes what ends one text at a stop string.
    settings: loads, requests at each, and limits; one client alone always comes first. decides: what else the rows
    depend on, as workers and code; what is in the journal of an earlier attempt with the same ones is not measured
    again. Raises WorkerError when a worker does not answer before a text has begun;
    a text that fails later is a row.
    """
    taken = repeated(requests, -(-settings.requests // len(requests)))[: settings.requests]
    first: Level = []  # one client alone at the first configuration
    own = {"settings": settings.model_dump(mode="json"), "configs": list(map(deciding, configs)), **(decides or {})}
    with journal_beside(output, requests, own) as journal:
        with writing_rows(output, CapacityRecord) as write:
            for number, config in enumerate(configs):
                levels: list[Level] = []
                clients = Clients(taken, config, stops, settings)
                for load in _loads(levels, first, settings):
                    measure = partial(clients.measure, load, (levels or [[]])[0])
                    level = [CapacityRecord(**row) for row in journal.measured([number, asdict(load)], measure)]
                    levels.append(level)
                    first.extend([] if first else level)
                    for record in level:
                        write(record)
                    yield level
        journal.remove()


def _loads(levels: list[Level], first: Level, settings: CapacitySettings) -> Iterator[Load]:
    """The loads to measure one after the other; `levels` has grown by the last one when it goes on.

    first: what the limits follow from.
    """
    for clients in sorted({1, *settings.clients}):
        yield Load(CLOSED, clients, None)
    for rate in sorted(settings.rates):
        yield Load(settings.arrivals, 0, rate)
    limits = latency_limits(first, settings.ttft_limit_ms, settings.tpot_limit_ms)
    # As many requests at once as ever, each in the time of a single client: no system serves more.
    most = max(settings.clients) * len(levels[0]) / (sum(r.total_latency_ms for r in levels[0]) / 1e3)
    low, high = 0.0, most
    for _ in range(settings.saturation_steps):
        rate = (low + high) / 2
        yield Load(settings.arrivals, 0, rate)
        low, high = (rate, high) if keeps_up(levels[-1], limits) else (low, rate)


def latency_limits(alone: Level, ttft_limit_ms: float | None, itl_limit_ms: float | None) -> tuple[float, float]:
    """Limits of TTFT and ITL in ms: as given, else LIMIT_FACTOR times the median of one client alone."""

    def limit(given: float | None, values: list[float]) -> float:
        return given or (LIMIT_FACTOR * median(values) if values else float("inf"))

    return (
        limit(ttft_limit_ms, [r.ttft_ms for r in alone if r.ttft_ms is not None]),
        limit(itl_limit_ms, [r.itl_ms for r in alone if r.itl_ms is not None]),
    )


def keeps_up(level: Level, limits: tuple[float, float]) -> bool:
    """Whether GOOD_SHARE of the requests kept the limits of TTFT and ITL; the time until a late start counts."""
    kept = [
        (r.ttft_ms or 0.0) + r.started_ms - r.due_ms <= limits[0] and (r.itl_ms or 0.0) <= limits[1]
        for r in level
        if r.status == OK
    ]
    return sum(kept) >= GOOD_SHARE * len(level)


def _compared(level: Level, alone: Level) -> Level:
    """The rows with matches_single; alone: those of one client, none when these are."""
    single = {(r.request_id, r.repeat): r.output_sha256 for r in alone or level if r.status == OK}

    def matches(record: CapacityRecord) -> bool | None:
        expected = single.get((record.request_id, record.repeat))
        return None if expected is None or record.status == FAILED else record.output_sha256 == expected

    return [replace(record, matches_single=matches(record)) for record in level]


@dataclass(frozen=True)
class Clients:
    """Who writes these requests with one configuration, at one load after the other."""

    requests: Sequence[Request]
    config: OrchestratorConfig
    stops: Stops
    settings: CapacitySettings

    def measure(self, load: Load, alone: Level) -> list[dict[str, Any]]:
        """The rows of a load, after a warm-up; alone: those of one client, none when these are."""
        self._warm_up(load)
        return [asdict(record) for record in _compared(self._run(load), alone)]

    def _warm_up(self, load: Load) -> None:
        """A few tokens of some requests by as many clients as there will be; for an open loop, as are measured."""
        short = self.config.model_copy(update={"max_output_tokens": min(WARM_UP_TOKENS, self.config.max_output_tokens)})
        clients = load.clients or max(self.settings.clients)
        some = list(islice(cycle(self.requests), clients * self.settings.warmup))
        replace(self, requests=some, config=short)._run(Load(CLOSED, clients, None))

    def _run(self, load: Load) -> Level:
        """The requests at one load, in the order of their starts."""
        try:
            records = event_loop().run(self._closed_loop(load) if load.rate is None else self._open_loop(load))
        except ExceptionGroup as group:  # one of them says enough
            raise group.exceptions[0] from None
        return sorted(records, key=lambda record: record.started_ms)

    async def _closed_loop(self, load: Load) -> Level:
        waiting = deque(self.requests)
        records: Level = []
        began = time.perf_counter()

        async def client(number: int) -> None:
            async with self._writing(load, began) as write:
                while waiting:
                    records.append(await write(waiting.popleft(), number))

        async with asyncio.TaskGroup() as group:
            for number in range(load.clients):
                group.create_task(client(number))
        return records

    async def _open_loop(self, load: Load) -> Level:
        assert load.rate is not None
        pattern = self.settings.arrivals, self.settings.burstiness
        due = arrival_times(len(self.requests), load.rate, *pattern, self.config.seed)
        began = time.perf_counter()
        async with self._writing(load, began) as write, asyncio.TaskGroup() as group:
            tasks = []
            for number, (request, at) in enumerate(zip(self.requests, due, strict=True)):
                await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
                tasks.append(group.create_task(write(request, number, at * 1e3)))
        return [task.result() for task in tasks]

    @asynccontextmanager
    async def _writing(self, load: Load, began: float) -> AsyncIterator[Write]:
        """What writes one text and makes its row, over channels and with a gamma controller of its own.

        It raises WorkerError for a text that failed before it had begun.
        """
        config = self.config
        access, controller = Access.of(config), gamma_controller(config)
        at_this_load = config.model_copy(update={"memory": f"{began:.3f}"})
        # Clients of one process would share a connection otherwise; clients on different machines do not.
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        async with (
            access.aio_channel(config.draft_address, options) as draft,
            access.aio_channel(config.target_address, options) as target,
        ):
            stubs = access.stub("draft", draft), access.stub("target", target)

            async def write(request: Request, client: int, due_ms: float | None = None) -> CapacityRecord:
                own = request_config(at_this_load, request)
                more: dict[str, Any] = {"on_tokens": self.stops(), "controller": controller, "request_id": request.id}
                started_ms = (time.perf_counter() - began) * 1e3
                error = None
                try:
                    result = await run_speculative_loop_async(*stubs, request.token_ids, own, **more)
                except WorkerError as failure:
                    if failure.result is None:
                        raise
                    result, error = failure.result, failure
                return CapacityRecord(
                    **vars(load),
                    client=client,
                    started_ms=started_ms,
                    due_ms=started_ms if due_ms is None else due_ms,
                    queue_ms=sum(r.draft_queue_ms + r.verify_queue_ms for r in result.rounds),
                    **vars(request_record(request, result, own, error)),
                )

            yield write


def arrival_times(count: int, rate: float, pattern: ArrivalPattern, burstiness: float, seed: int) -> list[float]:
    """Seconds from the first of `count` requests to each of them, ascending; the first is 0.

    rate: mean requests per second. pattern: gaps that are all alike (`constant`), exponential (`poisson`) or from a
    gamma distribution of shape `burstiness` (`gamma`: below 1 in bursts, 1 as poisson, above 1 more even), as in the
    load generators of vLLM and AIPerf. The same arguments give the same times.
    """
    draws = np.random.default_rng(seed)
    if pattern == "constant":
        gaps = np.ones(count - 1)
    elif pattern == "poisson":
        gaps = draws.exponential(size=count - 1)
    else:
        gaps = draws.gamma(burstiness, 1 / burstiness, size=count - 1)
    return [0.0, *(np.cumsum(gaps) / rate).tolist()]
