"""The synchronous draft -> verify loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from specsplit.config import OrchestratorConfig
from specsplit.decoding.tree import TokenTree, tree_size
from specsplit.errors import UserError
from specsplit.rpc.codec import tree_from_message, tree_to_message
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.workers.orchestrator.session import Call, RemoteSession, describe


@dataclass(frozen=True)
class Round:
    """One round as measured; fields as in `bench.metrics.RoundRecord`, times in milliseconds."""

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


@dataclass
class SpeculativeResult:
    """A finished text.

    output_tokens: generated token ids, the end-of-text token left out.
    finish_reason: eos | length (max_output_tokens) | max_rounds | context (the target can hold no more).
    ttft_ms: start of the request to the first token, None when none came. total_ms: start to the last round.
    """

    output_tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    rounds: list[Round] = field(default_factory=list)
    ttft_ms: float | None = None
    total_ms: float = 0.0


def run_speculative_loop(
    draft_stub: Any,
    target_stub: Any,
    prompt_ids: Sequence[int],
    config: OrchestratorConfig,
    *,
    on_tokens: Callable[[list[int]], None] | None = None,
) -> SpeculativeResult:
    """Write one text with speculative decoding (Leviathan et al. 2023), greedily.

    draft_stub: a DraftServiceStub; may be None when config.max_draft_tokens is 0 (the target alone, same path).
    target_stub: a TargetServiceStub. on_tokens: called with each round's new tokens as they are accepted.

    The output is, token for token, what the target alone would write. Raises WorkerError when a worker fails for
    good and UserError when the prompt does not fit.
    """
    target_info = describe("target", target_stub, config)
    stop_ids = _stop_token_ids(config, target_info)
    limit = min(config.max_context or target_info.max_context, target_info.max_context)
    draft_limit = draft_vocab = 0
    if config.max_draft_tokens:
        draft_info = describe("draft", draft_stub, config)
        draft_limit, draft_vocab = min(limit, draft_info.max_context), draft_info.vocab_size
    if len(prompt_ids) >= limit:
        raise UserError(f"the prompt has {len(prompt_ids)} tokens, a text can have {limit}: shorten the prompt")
    if not prompt_ids:
        raise UserError("the prompt has no tokens")

    tokens = list(prompt_ids)
    result = SpeculativeResult()
    target = RemoteSession("target", target_stub.VerifyDrafts, config)
    draft = RemoteSession("draft", draft_stub.GenerateDrafts, config) if config.max_draft_tokens else None
    started = time.perf_counter()
    try:
        while not result.finish_reason:
            tree, drafted = TokenTree(), None
            # The last token is always the target's own, so there is no use for a draft of all that remains.
            remaining = min(config.max_output_tokens - len(result.output_tokens), limit - len(tokens))
            gamma = min(config.max_draft_tokens, remaining - 1)
            while gamma > 0 and len(tokens) + tree_size(config.branching, gamma) > draft_limit:
                gamma -= 1
            # Models with one tokenizer may pad their vocabularies differently: a draft cannot read every token.
            if draft is not None and gamma > 0 and max(tokens) < draft_vocab:
                request = partial(
                    pb.GenerateDraftsRequest,
                    max_draft_tokens=gamma,
                    branching=config.branching,
                    stop_token_ids=stop_ids,
                )
                drafted = draft.call(tokens, request)
                draft.holds(tokens)
                tree = tree_from_message(drafted.reply.tree).within(target_info.vocab_size)
            verified = target.call(tokens, partial(pb.VerifyDraftsRequest, tree=tree_to_message(tree)))
            accepted = list(verified.reply.accepted_tokens)
            tokens += accepted
            target.holds(tokens)
            tokens.append(verified.reply.next_token)
            fresh, ended = _until_stop([*accepted, verified.reply.next_token], stop_ids)
            now_ms = (time.perf_counter() - started) * 1e3
            if fresh:
                result.ttft_ms = now_ms if result.ttft_ms is None else result.ttft_ms
                result.output_tokens += fresh
                if on_tokens is not None:
                    on_tokens(fresh)
            result.total_ms = now_ms
            result.rounds.append(_round(len(result.rounds) + 1, tree, len(accepted), drafted, verified))
            result.finish_reason = _finish_reason(result, config, ended=ended, full=len(tokens) >= limit)
    finally:
        target.end(target_stub.EndSession)
        if draft is not None:
            draft.end(draft_stub.EndSession)
    return result


def _stop_token_ids(config: OrchestratorConfig, target_info: pb.DescribeReply) -> list[int]:
    if config.ignore_eos:
        return []
    return list(target_info.eos_token_ids) if config.stop_token_ids is None else config.stop_token_ids


def _until_stop(tokens: list[int], stop_ids: Sequence[int]) -> tuple[list[int], bool]:
    for i, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[:i], True
    return tokens, False


def _finish_reason(result: SpeculativeResult, config: OrchestratorConfig, *, ended: bool, full: bool) -> str:
    if ended:
        return "eos"
    if len(result.output_tokens) >= config.max_output_tokens:
        return "length"
    if full:
        return "context"
    if config.max_rounds is not None and len(result.rounds) >= config.max_rounds:
        return "max_rounds"
    return ""


def _round(number: int, tree: TokenTree, accepted: int, drafted: Call | None, verified: Call) -> Round:
    timings = drafted.reply.timings if drafted else pb.Timings()
    return Round(
        round=number,
        drafted=tree.depth(),
        accepted=accepted,
        tree_nodes=len(tree),
        draft_wall_ms=drafted.wall_ms if drafted else 0.0,
        draft_compute_ms=timings.compute_ms,
        draft_queue_ms=timings.queue_ms,
        verify_wall_ms=verified.wall_ms,
        verify_compute_ms=verified.reply.timings.compute_ms,
        verify_queue_ms=verified.reply.timings.queue_ms,
        network_ms=verified.network_ms + (drafted.network_ms if drafted else 0.0),
    )
