"""A finished text and its rounds, as measured. Imports nothing heavy: the tables take their columns from here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

LINK_BYTES = ("draft_sent_bytes", "draft_received_bytes", "target_sent_bytes", "target_received_bytes")
# Columns of a text that a run measures beside it (`experiment/usage.py`).
USAGE = ("client_cpu_ms", "draft_cpu_ms", "target_cpu_ms", "energy_j")


@dataclass(frozen=True)
class Round:
    """One draft -> verify round as measured; one row of `per_round.csv`. Times are milliseconds.

    drafted: depth of the draft, so the most tokens that could be accepted (0 when nothing was drafted).
    accepted: drafted tokens that the target confirmed.
    tree_nodes: nodes sent for verification; 0 when the round had no draft.
    *_wall_ms: at the client; draft: what the round waited for its draft, 0 when it was there already; verify: from then
        to the reply. *_compute_ms, *_queue_ms: measured by the server.
    network_ms: what the round waited that was no server's time, exposed part only.
    speculation: `hit` when the draft was made ahead, while the round before was verified; `miss` when that did not
        foresee what was accepted, or not in time; `none` when nothing was drafted ahead.
    gamma_asked: depth asked of the draft worker, or tokens looked up: less than gamma near the end of a text, chosen
        when gamma is auto.
    arrived_ms: from the start of the request until its tokens were at the client.
    draft_exposed_ms, draft_hidden_ms: all work of the draft worker, without its queues, of which the client heard in
        this round: what the round waited for, and what went on meanwhile, of use or not (drafts ahead that missed).
    *_sent_bytes, *_received_bytes: serialized messages that went to that worker and came from it since the round
        before, without the headers of gRPC; 0 within one process.
    draft_source: of a draft that learns: session | global | model | none; with prompt lookup or p_min: lookup | model |
        none (asked for and empty); else empty, as without a draft.
    """

    round: int
    drafted: int = 0
    accepted: int = 0
    tree_nodes: int = 0
    draft_wall_ms: float = 0.0
    draft_compute_ms: float = 0.0
    draft_queue_ms: float = 0.0
    verify_wall_ms: float = 0.0
    verify_compute_ms: float = 0.0
    verify_queue_ms: float = 0.0
    network_ms: float = 0.0
    speculation: str = "none"
    gamma_asked: int = 0
    arrived_ms: float = 0.0
    draft_exposed_ms: float = 0.0
    draft_hidden_ms: float = 0.0
    draft_sent_bytes: int = 0
    draft_received_bytes: int = 0
    target_sent_bytes: int = 0
    target_received_bytes: int = 0
    draft_source: str = ""


@dataclass
class Failure:
    """A worker that failed while a text was written, however often it was tried again in that round.

    worker: draft | target. round: the one under way, from 1. code, message: the first status, by its gRPC name.
    action: reconnect | target_alone (the rest of the text) | gave_up. lost_ms: from noticing it until the worker was
    back, or was no longer waited for.
    """

    worker: str
    round: int
    code: str
    message: str
    action: str = "reconnect"
    lost_ms: float = 0.0


@dataclass
class SpeculativeResult:
    """A finished text, or what there is of one that failed.

    output_tokens: generated token ids, the end-of-text token left out.
    finish_reason: eos | stop (`on_tokens` ended it) | length (max_output_tokens) | max_rounds | context (the target can
        hold no more); empty while the text is not finished.
    ttft_ms: start of the request to the first token, None when none came. total_ms: start to the last round.
    speculation_hits, speculation_misses: rounds whose draft was made ahead, and those whose was to be but could not be
        used; both 0 in sync mode.
    failures: of workers, in order, those that were got over included.
    """

    output_tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    rounds: list[Round] = field(default_factory=list)
    ttft_ms: float | None = None
    total_ms: float = 0.0
    failures: list[Failure] = field(default_factory=list)

    @property
    def counted_rounds(self) -> list[Round]:
        """The rounds with the tokens that the user gets: where the draft foresaw the end of the text, what follows it,
        and the end-of-text token itself, is in neither `drafted` nor `accepted`."""
        if self.finish_reason not in ("eos", "stop") or not self.rounds:
            return self.rounds
        *earlier, last = self.rounds
        given = len(self.output_tokens) - sum(r.accepted + 1 for r in earlier)
        return [*earlier, replace(last, drafted=given, accepted=given)] if given < last.accepted else self.rounds

    @property
    def speculation_hits(self) -> int:
        return sum(r.speculation == "hit" for r in self.rounds)

    @property
    def speculation_misses(self) -> int:
        return sum(r.speculation == "miss" for r in self.rounds)
