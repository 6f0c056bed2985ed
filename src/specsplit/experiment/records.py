"""From prompts to requests, and from a request and its text to the rows of the tables."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from specsplit.client.result import LINK_BYTES, SpeculativeResult
from specsplit.client.writer import TextWriter
from specsplit.decoding.measures import acceptance_length, acceptance_rate, per_token_ms, verifications
from specsplit.errors import UserError, WorkerError, counted, listed
from specsplit.experiment.columns import FAILED, OK, SOURCES, RequestRecord, RoundRecord
from specsplit.experiment.prompt import Prompt
from specsplit.experiment.prompt_tokens import prompt_tokens
from specsplit.io import json_sha256
from specsplit.models.tokenizer import TextCodec
from specsplit.rpc.credentials import Access
from specsplit.settings.run import NO_NETWORK, OrchestratorConfig

T = TypeVar("T")
# Columns of requests.csv that are settings of the same name.
SETTINGS = {"mode", "tree", "sampling", "temperature", "top_k", "top_p", *NO_NETWORK, "seed"}


@dataclass(frozen=True)
class Request:
    """A prompt as the models get it.

    token_ids: none yet for a later turn, which waits for the answers before it. prompt: where they are from.
    previous: the request whose answer comes before a later turn. repeat: which time it is measured, from 1; 0: not.
    """

    id: str
    category: str
    token_ids: list[int]
    prompt: Prompt | None = field(default=None, compare=False)
    previous: Request | None = field(default=None, compare=False)
    repeat: int = field(default=0, compare=False)

    @property
    def key(self) -> tuple[int, str]:
        """Which of a run's texts it is: its repeat and its id."""
        return self.repeat, self.id

    @property
    def turn(self) -> int:
        """Its place in a conversation, from 1."""
        return self.prompt.turn if self.prompt else 1


def encode_prompts(
    prompts: Sequence[Prompt],
    codec: TextCodec,
    *,
    chat: bool,
    limit: int,
    raisable: bool = True,
    later_turns: bool = False,
) -> list[Request]:
    """Token ids of every prompt, those that were prepared where they fit this tokenizer and template.

    later_turns: also a request for each later turn, which gets its token ids when the one before it is answered.
    raisable: the limit is a setting, not the model's own.
    Raises UserError that names the prompts of `limit` tokens or more, before any work is done.
    """
    made: dict[str, Request] = {}
    for p in prompts:
        if p.after is None:
            made[p.id] = Request(p.id, p.category, prompt_tokens(p, codec, chat=chat), p)
        elif later_turns:
            made[p.id] = Request(p.id, p.category, [], p, made[p.after])
    requests = list(made.values())
    long = [f"{r.id} ({counted(len(r.token_ids), 'token')})" for r in requests if len(r.token_ids) >= limit]
    if long:
        raise UserError(
            f"{counted(len(long), 'prompt does', 'prompts do')} not fit into the target's context of "
            f"{limit} tokens: {listed(long)}. "
            + ("Shorten them or raise workers.max_context." if raisable else "Shorten them: the model has no more.")
        )
    return requests


def requests_sha256(requests: Sequence[Request]) -> str:
    """A hash of what is known of the requests before they are run."""
    return json_sha256(
        [
            [r.id, r.category, r.token_ids, *([r.prompt.prompt, r.previous.id] if r.prompt and r.previous else [])]
            for r in requests
        ]
    )


def request_config(config: OrchestratorConfig, request: Request) -> OrchestratorConfig:
    """The settings of one text: its 32-bit seed is made of the run's and the request's id, so other prompts do not
    change it. A draft that learns does so from texts of the same repeat."""
    seed = int.from_bytes(hashlib.sha256(f"{config.seed}/{request.id}".encode()).digest()[:4], "big")
    return config.model_copy(update={"seed": seed, "memory": f"{config.memory} {request.repeat}"})


def repeated(requests: Sequence[Request], repeats: int) -> list[Request]:
    """All of the requests, so many times."""
    return [replace(request, repeat=repeat) for repeat in range(1, repeats + 1) for request in requests]


def in_turn(items: Sequence[T], number: int) -> list[T]:
    """The items in the order of the turn `number`: the first one moves on with each turn, so that none always follows
    the same one."""
    shift = number % len(items)
    return [*items[shift:], *items[:shift]]


def deciding(config: OrchestratorConfig) -> dict[str, Any]:
    """The settings that decide texts and times, as JSON: without addresses, timeouts and the like."""
    return config.model_dump(mode="json", exclude=config.operating())


def text_writer(config: OrchestratorConfig) -> TextWriter:
    """What writes texts through the workers that the settings name; through the target alone at gamma 0."""
    draft = config.draft_address if config.gamma else None
    return TextWriter(draft, config.target_address, access=Access.of(config))


def tokens_sha256(tokens: Sequence[int]) -> str:
    """The hash that tells whether two texts are the same, token for token."""
    return hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest()


def round_records(request: Request, result: SpeculativeResult, config: OrchestratorConfig) -> list[RoundRecord]:
    """The rows of `per_round.csv` of one finished text."""
    about: dict[str, Any] = {"request_id": request.id, "gamma": config.gamma, "repeat": max(1, request.repeat)}
    return [RoundRecord(**about, **asdict(row)) for row in result.counted_rounds]


def request_record(
    request: Request, result: SpeculativeResult, config: OrchestratorConfig, error: WorkerError | None = None
) -> RequestRecord:
    """The row of `requests.csv` of one text, finished or, with an error, as far as it came.

    itl_ms is over the tokens of all rounds but the first. (tpot_ms divides the same time by all tokens but one, as if
    the rest of the first round took no time.) mean_accepted_length counts what the user gets, so no end-of-text token;
    acceptance_length is the field's 1 + accepted / verifications. Times per token, rates, lengths and ttft_ms are None
    when the request failed.
    """
    rounds, generated = result.counted_rounds, len(result.output_tokens)
    drafted, accepted = sum(r.drafted for r in rounds), sum(r.accepted for r in rounds)
    idle = sum(r.network_ms for r in rounds)
    sources: dict[str, Any] = {}
    if any(r.draft_source for r in rounds):
        sources = {name: sum(r.draft_source == source for r in rounds) for source, name in SOURCES}
    ttft_ms = None if error else result.ttft_ms
    return RequestRecord(
        request_id=request.id,
        gamma=config.gamma,
        prompt_length=len(request.token_ids),
        generated_tokens=generated,
        ttft_ms=ttft_ms,
        tpot_ms=per_token_ms(result.total_ms, ttft_ms, generated),
        average_acceptance_rate=None if error else acceptance_rate(rounds),
        total_network_idle_ms=idle,
        total_latency_ms=result.total_ms,
        num_rounds=len(rounds),
        category=request.category,
        finish_reason="error" if error else result.finish_reason,
        drafted_tokens=drafted,
        accepted_tokens=accepted,
        mean_accepted_length=None if error else generated / len(rounds),
        network_idle_fraction=idle / result.total_ms if result.total_ms else 0.0,
        draft_exposed_ms=sum(r.draft_exposed_ms for r in rounds),
        draft_hidden_ms=sum(r.draft_hidden_ms for r in rounds),
        **sources,
        draft_compute_ms=sum(r.draft_compute_ms for r in rounds),
        target_compute_ms=sum(r.verify_compute_ms for r in rounds),
        draft=config.draft_name,
        **config.model_dump(include=SETTINGS),
        speculation_hits=result.speculation_hits,
        speculation_misses=result.speculation_misses,
        output_sha256=tokens_sha256(result.output_tokens),
        itl_ms=per_token_ms(result.total_ms, ttft_ms, generated, rounds[0].accepted + 1) if rounds else None,
        verifications=verifications(rounds),
        acceptance_length=None if error else acceptance_length(rounds),
        draft_acceptance_rate=accepted / drafted if drafted and not error else None,
        turn=request.turn,
        **{name: sum(getattr(r, name) for r in rounds) for name in LINK_BYTES},
        repeat=max(1, request.repeat),
        status=FAILED if error else OK,
        error_code=error.code if error else "",
        error_message=" ".join(str(error).split()) if error else "",
        draft_failures=sum(failure.worker == "draft" for failure in result.failures),
        target_failures=sum(failure.worker == "target" for failure in result.failures),
        recovery_ms=sum(failure.lost_ms for failure in result.failures),
        events="; ".join(f"{f.worker} {f.code} in round {f.round}: {f.action}" for f in result.failures),
    )
