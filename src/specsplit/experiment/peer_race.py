"""Ours and the peers on the same requests, in turn, so that a drift of the machine affects all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from specsplit.client.pipeline import gamma_controller
from specsplit.decoding.measures import per_token_ms
from specsplit.experiment.columns import writing_rows
from specsplit.experiment.hugging_face import HuggingFace
from specsplit.experiment.journal import journal_beside
from specsplit.experiment.peers import Peer, PeerProcess, PeerText
from specsplit.experiment.records import Request, in_turn, repeated, request_config, text_writer, tokens_sha256
from specsplit.rpc.connection import Connection
from specsplit.rpc.v1.specsplit_pb2 import DescribeReply
from specsplit.settings.run import OrchestratorConfig

SETTLE_S = 0.25  # between turns: threads that wait actively go to sleep (Intel's OpenMP after 0.2 s)
REFERENCE = "gamma_0"  # whose texts the others are compared with: ours, the target alone


@dataclass(frozen=True)
class Ours:
    """One of our points: what it is called, its settings, and its workers by role (no draft at gamma 0)."""

    label: str
    config: OrchestratorConfig
    workers: Mapping[str, Connection]

    @property
    def target(self) -> DescribeReply:
        """What the target worker says of itself."""
        return self.workers["target"].description


@dataclass(frozen=True)
class PeerRecord:
    """One request of one contender: one row of `peers_requests.csv`. Times are milliseconds; None is an empty cell.

    engine: specsplit, transformers or llama.cpp. place: in the turn of this request, from 1. num_rounds: passes of the
        target.
    identical: token for token the text of REFERENCE in its first repeat. first_divergence: the first token (from 0)
        that differs, where one text ends before the other that end. margin: there, by how much Hugging Face's
        target prefers the token of REFERENCE (logits): near 0, rounding decided.
    """

    request_id: str
    contender: str
    engine: str
    repeat: int
    place: int
    prompt_length: int
    generated_tokens: int
    ttft_ms: float | None
    tpot_ms: float | None
    itl_ms: float | None
    total_latency_ms: float
    num_rounds: int
    category: str
    finish_reason: str
    identical: bool
    first_divergence: int | None
    margin: float | None
    output_sha256: str


_Write = Callable[[Request], PeerText]


def race(
    requests: Sequence[Request],
    ours: Sequence[Ours],
    peers: Mapping[Peer, PeerProcess],
    hugging_face: HuggingFace,
    output: Path,
    *,
    warmup: int,
    repeats: int,
    decides: Mapping[str, Any] | None = None,
    on_row: Callable[[PeerRecord], None] = lambda row: None,
) -> list[str]:
    """Every request by every contender, `repeats` times; writes a row each to `output`. Returns when attempts began.

    decides: what else the rows depend on, as models and code. What is in the journal of an earlier attempt with the
    same ones is not measured again; with a gamma that learns from text to text (auto) it is.

    ours: the first one is REFERENCE. peers: each with its process. warmup: requests that each contender runs before, in
        no table.
    The order of the contenders moves on by one with each request, so that none always follows the same one.
    """
    if ours[0].label != REFERENCE:
        raise ValueError(f"the first of ours is {ours[0].label}, not {REFERENCE}")
    limit = min(contender.target.max_context for contender in ours)
    with ExitStack() as stack:
        contenders: dict[str, tuple[str, _Write]] = {
            contender.label: ("specsplit", _our_writer(contender, stack)) for contender in ours
        }
        for peer, process in peers.items():
            contenders[peer.label] = peer.engine, _peer_writer(peer, process, ours[0].config, ours[0].target, limit)
        labels = list(contenders)
        expected: dict[str, list[int]] = {}
        learns = any(contender.config.gamma == "auto" for contender in ours)
        own = {"contenders": labels, "warmup": warmup, "repeats": repeats, **(decides or {})}
        for _, write in contenders.values():
            for request in islice(cycle(requests), warmup):
                write(request)
        journal = stack.enter_context(journal_beside(output, requests, own, resume=not learns))
        with writing_rows(output, PeerRecord) as write_row:
            for number, request in enumerate(repeated(requests, repeats)):
                turn = number % len(requests) + request.repeat - 1
                order = {label: contenders[label] for label in in_turn(labels, turn)}
                measure = partial(_take_turn, request, order, expected.get(request.id), hugging_face)
                taken = journal.measured(request.key, measure)
                expected.setdefault(request.id, taken["right"])
                for row in taken["rows"]:
                    write_row(PeerRecord(**row))
                    on_row(PeerRecord(**row))
        journal.remove()
        return journal.attempts


def _take_turn(
    request: Request,
    contenders: Mapping[str, tuple[str, _Write]],
    right: list[int] | None,
    hugging_face: HuggingFace,
) -> dict[str, Any]:
    """The rows of one request by every contender in this order, and the text that is right: that of REFERENCE, where
    none is given."""
    turn: dict[str, PeerText] = {}
    for label, (_, write) in contenders.items():
        time.sleep(SETTLE_S)
        turn[label] = write(request)
    right = turn[REFERENCE].output_tokens if right is None else right
    rows = []
    for place, (label, text) in enumerate(turn.items(), start=1):
        where = _divergence(text.output_tokens, right)
        record = PeerRecord(
            request_id=request.id,
            contender=label,
            engine=contenders[label][0],
            repeat=request.repeat,
            place=place,
            prompt_length=len(request.token_ids),
            generated_tokens=len(text.output_tokens),
            ttft_ms=text.ttft_ms,
            tpot_ms=per_token_ms(text.total_ms, text.ttft_ms, len(text.output_tokens)),
            itl_ms=per_token_ms(text.total_ms, text.ttft_ms, len(text.output_tokens), text.first),
            total_latency_ms=text.total_ms,
            num_rounds=text.rounds,
            category=request.category,
            finish_reason=text.finish_reason,
            identical=where is None,
            first_divergence=where,
            margin=_margin(hugging_face, request, text.output_tokens, right, where),
            output_sha256=tokens_sha256(text.output_tokens),
        )
        rows.append(asdict(record))
    return {"right": right, "rows": rows}


def _our_writer(contender: Ours, stack: ExitStack) -> _Write:
    config = contender.config
    writer, controller = stack.enter_context(text_writer(config)), gamma_controller(config)

    def write(request: Request) -> PeerText:
        own = request_config(config, request)
        result = writer.write(request.token_ids, own, controller=controller, request_id=request.id)
        chunks = [r.accepted + 1 for r in result.rounds]
        return PeerText(result.output_tokens, result.finish_reason, chunks, [result.total_ms], result.ttft_ms)

    return write


def _peer_writer(
    peer: Peer, process: PeerProcess, config: OrchestratorConfig, target: DescribeReply, limit: int
) -> _Write:
    stop_ids: Sequence[int] = ()
    if not config.ignore_eos:
        named = config.stop_token_ids
        stop_ids = list(target.eos_token_ids) if named is None else named

    def write(request: Request) -> PeerText:
        max_tokens = min(config.max_output_tokens, limit - len(request.token_ids))
        return process.write(peer, request.token_ids, max_tokens=max_tokens, stop_ids=stop_ids)

    return write


def _divergence(tokens: Sequence[int], expected: Sequence[int]) -> int | None:
    """The first place at which the texts differ; the end of the shorter one when it begins the other; None if equal."""
    for place, (one, other) in enumerate(zip(tokens, expected, strict=False)):
        if one != other:
            return place
    return None if len(tokens) == len(expected) else min(len(tokens), len(expected))


def _margin(
    hugging_face: HuggingFace, request: Request, tokens: Sequence[int], expected: Sequence[int], where: int | None
) -> float | None:
    if where is None or where >= min(len(tokens), len(expected)):
        return None
    return hugging_face.margin([*request.token_ids, *expected[:where]], expected[where], tokens[where])
