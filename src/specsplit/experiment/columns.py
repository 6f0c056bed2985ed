"""The columns of every table that a benchmark run writes, and how its rows are written.

The first ten columns of `requests.csv` are a contract: their names and order do not change.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from specsplit.client.result import LINK_BYTES, USAGE, Round
from specsplit.io import CSV_ROW_END, RowEnds, replacing

OK, FAILED = "ok", "failed"  # a request's status
# How a text was written: by the loop with its workers; by the target worker alone, which streams its tokens; by the
# same models in one process.
WORKERS, STREAMED, COLOCATED = "workers", "target_streamed", "colocated"

# Where the draft of a round came from, and the column that counts such rounds.
SOURCES = tuple((name, f"drafts_from_{name}") for name in ("session", "global", "lookup", "model", "none"))
DRAFTING = tuple(source for source, _ in SOURCES if source != "none")


@dataclass(frozen=True)
class RequestRecord:
    """One request: one row of `requests.csv`. Times are milliseconds; None is written as an empty cell."""

    request_id: str
    gamma: int | str  # auto: chosen in every round
    prompt_length: int
    generated_tokens: int
    ttft_ms: float | None
    tpot_ms: float | None
    average_acceptance_rate: float | None
    total_network_idle_ms: float
    total_latency_ms: float
    num_rounds: int
    # Ours, after the contract.
    category: str
    finish_reason: str
    drafted_tokens: int
    accepted_tokens: int
    mean_accepted_length: float | None
    network_idle_fraction: float
    draft_compute_ms: float
    target_compute_ms: float
    mode: str
    tree: str
    draft: str
    sampling: str
    temperature: float
    top_k: int
    top_p: float
    rtt_ms: float
    jitter_ms: float
    seed: int
    speculation_hits: int
    speculation_misses: int
    output_sha256: str
    itl_ms: float | None = None
    repeat: int = 1
    # Failures. status: ok | failed. A failed request has the counts and sums of the text so far, no TTFT, no times per
    # token and no rates. error_code: a gRPC status. *_failures: rounds in which that worker failed. recovery_ms: time
    # that workers took to return. events: what failed, when, and what was done, in words.
    status: str = OK
    error_code: str = ""
    error_message: str = ""
    draft_failures: int = 0
    target_failures: int = 0
    recovery_ms: float = 0.0
    events: str = ""
    # verifications: rounds in which the target verified a draft. acceptance_length: 1 + accepted_tokens /
    # verifications. draft_acceptance_rate: accepted_tokens / drafted_tokens.
    verifications: int | None = None
    acceptance_length: float | None = None
    draft_acceptance_rate: float | None = None
    # Compute time of the draft worker: that the text waited for, and that of drafts made meanwhile, used or not.
    draft_exposed_ms: float | None = None
    draft_hidden_ms: float | None = None
    # turn: place in a conversation, from 1.
    turn: int | None = 1
    bandwidth_mbit: float = 0.0
    # Serialized messages to and from each worker, the prompt included.
    draft_sent_bytes: int = 0
    draft_received_bytes: int = 0
    target_sent_bytes: int = 0
    target_received_bytes: int = 0
    # CPU time of the three processes while the text was written, and energy of the machines of the workers.
    client_cpu_ms: float | None = None
    draft_cpu_ms: float | None = None
    target_cpu_ms: float | None = None
    energy_j: float | None = None
    # Of a draft that learns (source suffix), with prompt lookup and with p_min: rounds whose draft began with what the
    # worker found in the text itself, or in earlier texts, with what lookup found, or with what the model said, and
    # rounds without a draft since nothing was found, or nothing probable enough.
    drafts_from_session: int | None = None
    drafts_from_global: int | None = None
    drafts_from_lookup: int | None = None
    drafts_from_model: int | None = None
    drafts_from_none: int | None = None


@dataclass(frozen=True)
class ReferenceRecord(RequestRecord):
    """A request that a run measured beside its own configuration, in turn with it: one row of `reference.csv`.

    setup: WORKERS (gamma 0 through the loop), STREAMED or COLOCATED. The other columns are those of the text itself, so
    gamma is 0 in the first two. The network of a colocated pair is said to be that of the run, though it uses none.
    """

    setup: str = WORKERS


@dataclass(frozen=True)
class _Text:
    """The text that a round is part of."""

    request_id: str
    gamma: int | str


@dataclass(frozen=True)
class RoundRecord(Round, _Text):
    """One round of a request: one row of `per_round.csv`."""

    repeat: int = 1


# Columns that tables of earlier versions lack.
LATER_COLUMNS = (
    *("draft_exposed_ms", "draft_hidden_ms", "turn", "bandwidth_mbit", *LINK_BYTES, *USAGE),
    *("draft_source", *(name for _, name in SOURCES)),
    *("verifications", "acceptance_length", "draft_acceptance_rate"),
    *("arrivals", "rate", "due_ms"),  # of capacity_requests.csv
    "series",  # of runs that were kept apart
)
REQUEST_COLUMNS: tuple[str, ...] = tuple(f.name for f in fields(RequestRecord))
ROUND_COLUMNS: tuple[str, ...] = tuple(f.name for f in fields(RoundRecord))


@contextmanager
def writing_rows(path: Path, record: type[Any]) -> Iterator[Callable[[Any], None]]:
    """A function that writes a row; the end of the block without an error makes the rows the table `path`.

    record: the dataclass of the rows, whose fields are the columns. An old `path` is deleted at the start: a table is
    of one measurement.
    """
    path.unlink(missing_ok=True)
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        ends: Any = RowEnds(file)
        table = csv.DictWriter(ends, [field.name for field in fields(record)], lineterminator=CSV_ROW_END)
        table.writeheader()

        def write(row: Any) -> None:
            table.writerow(asdict(row))
            file.flush()

        yield write


def write_rows(path: Path, record: type[Any], rows: Iterable[Any]) -> None:
    """Write a table of all of these rows; record: their dataclass."""
    with writing_rows(path, record) as write:
        for row in rows:
            write(row)
