"""From a request and its text to the rows of the tables."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from specsplit.client.result import SpeculativeResult
from specsplit.errors import WorkerError
from specsplit.experiment.columns import FAILED, OK, RequestRecord, RoundRecord
from specsplit.settings.run import OrchestratorConfig


@dataclass(frozen=True)
class Request:
    """A prompt as the models get it."""

    id: str
    category: str
    token_ids: list[int]


def request_seed(seed: int, request_id: str) -> int:
    """The 32-bit seed of one text, from the run's and the request's id: other prompts do not change it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{request_id}".encode()).digest()[:4], "big")


def round_records(
    request_id: str, result: SpeculativeResult, config: OrchestratorConfig, repeat: int = 1
) -> list[RoundRecord]:
    """The rows of `per_round.csv` of one finished text."""
    gamma = config.gamma
    return [RoundRecord(request_id=request_id, gamma=gamma, repeat=repeat, **asdict(row)) for row in result.rounds]


def request_record(
    request: Request,
    result: SpeculativeResult,
    config: OrchestratorConfig,
    repeat: int = 1,
    error: WorkerError | None = None,
) -> RequestRecord:
    """The row of `requests.csv` of one text, finished or, with an error, as far as it came.

    average_acceptance_rate is the mean over the rounds that drafted something; None when none did.
    mean_accepted_length is the mean number of tokens a round added: accepted ones and the target's own.
    itl_ms is the time after the first round over the tokens of the later rounds; None when there were none. (tpot_ms
    divides the same time by all tokens but one, so it counts the rest of the first round as if it took no time.)
    All of these, and ttft_ms, are None when the request failed.
    """
    rounds, generated = result.rounds, len(result.output_tokens)
    rates = [r.accepted / r.drafted for r in rounds if r.drafted]
    idle = sum(r.network_ms for r in rounds)
    recovery_ms = sum(failure.lost_ms for failure in result.failures)
    tpot, itl = None, None
    if error is None and generated > 1 and result.ttft_ms is not None:
        tpot = (result.total_ms - result.ttft_ms) / (generated - 1)
        later = generated - (rounds[0].accepted + 1)
        itl = (result.total_ms - result.ttft_ms) / later if later > 0 else None
    return RequestRecord(
        request_id=request.id,
        gamma=config.gamma,
        prompt_length=len(request.token_ids),
        generated_tokens=generated,
        ttft_ms=None if error else result.ttft_ms,
        tpot_ms=tpot,
        average_acceptance_rate=sum(rates) / len(rates) if rates and error is None else None,
        total_network_idle_ms=idle,
        total_latency_ms=result.total_ms,
        num_rounds=len(rounds),
        category=request.category,
        finish_reason="error" if error else result.finish_reason,
        drafted_tokens=sum(r.drafted for r in rounds),
        accepted_tokens=sum(r.accepted for r in rounds),
        mean_accepted_length=sum(r.accepted + 1 for r in rounds) / len(rounds) if error is None else None,
        network_idle_fraction=idle / result.total_ms if result.total_ms else 0.0,
        draft_compute_ms=sum(r.draft_compute_ms for r in rounds),
        target_compute_ms=sum(r.verify_compute_ms for r in rounds),
        mode=config.mode,
        tree=config.tree,
        draft=config.draft_name,
        sampling=config.sampling,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        rtt_ms=config.rtt_ms,
        jitter_ms=config.jitter_ms,
        seed=config.seed,
        speculation_hits=result.speculation_hits,
        speculation_misses=result.speculation_misses,
        output_sha256=hashlib.sha256(json.dumps(result.output_tokens).encode()).hexdigest(),
        itl_ms=itl,
        repeat=repeat,
        status=FAILED if error else OK,
        error_code=error.code if error else "",
        error_message=" ".join(str(error).split()) if error else "",
        draft_failures=sum(failure.worker == "draft" for failure in result.failures),
        target_failures=sum(failure.worker == "target" for failure in result.failures),
        recovery_ms=recovery_ms,
        events="; ".join(f"{f.worker} {f.code} in round {f.round}: {f.action}" for f in result.failures),
    )
