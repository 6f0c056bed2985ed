"""The columns of every table that a benchmark run writes, and how they follow from the rounds.

The first ten columns of `requests.csv` are a contract: their names and order do not change.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class RoundRecord:
    """One draft -> verify round: one row of `per_round.csv`. Times are milliseconds.

    drafted: depth of the draft, so the most tokens that could be accepted (0 when nothing was drafted).
    accepted: drafted tokens that the target confirmed.
    tree_nodes: nodes sent for verification (equal to `drafted` for a chain).
    *_wall_ms: at the client, request sent to reply read; *_compute_ms, *_queue_ms: measured by the server.
    network_ms: wall minus server time, summed over the round's calls, exposed part only.
    speculation: `none` in sync mode; `hit` or `miss` in the modes that draft ahead.
    """

    request_id: str
    gamma: int
    round: int
    drafted: int
    accepted: int
    tree_nodes: int
    draft_wall_ms: float
    draft_compute_ms: float
    draft_queue_ms: float
    verify_wall_ms: float
    verify_compute_ms: float
    verify_queue_ms: float
    network_ms: float
    speculation: str = "none"


@dataclass(frozen=True)
class RequestRecord:
    """One request: one row of `requests.csv`. Times are milliseconds; None is written as an empty cell."""

    request_id: str
    gamma: int
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
    seed: int
    output_sha256: str


REQUEST_COLUMNS: tuple[str, ...] = tuple(f.name for f in fields(RequestRecord))
ROUND_COLUMNS: tuple[str, ...] = tuple(f.name for f in fields(RoundRecord))
