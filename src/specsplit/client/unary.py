"""The synchronous draft -> verify loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from specsplit.client.recovery import Recovery, WithoutDraft, reach
from specsplit.client.requests import draft_fields, verify_fields
from specsplit.client.result import Round, SpeculativeResult
from specsplit.client.session import Call, RemoteSession
from specsplit.client.spans import text_span
from specsplit.client.text import OnTokens, Text
from specsplit.decoding.tree import TokenTree
from specsplit.errors import UserError
from specsplit.rpc.codec import tree_from_message
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import OrchestratorConfig


def run_speculative_loop(
    draft_stub: Any,
    target_stub: Any,
    prompt_ids: Sequence[int],
    config: OrchestratorConfig,
    *,
    on_tokens: OnTokens | None = None,
    request_id: str | None = None,
) -> SpeculativeResult:
    """Write one text with speculative decoding (Leviathan et al. 2023): one round after the other, unary calls.

    draft_stub: a DraftServiceStub; may be None when config.gamma is 0 (the target alone, same path).
    target_stub: a TargetServiceStub. on_tokens: called with each round's new tokens as they are accepted.
    request_id: what the span of the text calls it.
    config: mode `sync` and a number for gamma; `pipeline.run_speculative_loop_async` has the other modes and `auto`.

    The output is, token for token, what the target alone would write. A worker that fails is waited for and given the
    whole text again (`recovery`). Raises WorkerError, with the text so far, when that did not help, and UserError when
    the prompt does not fit.
    """
    if config.mode != "sync" or config.gamma == "auto":
        raise UserError("this loop is synchronous, with a fixed gamma: use run_speculative_loop_async")
    with text_span(config, request_id) as span:
        return _write(Recovery(config, {}, span), draft_stub, target_stub, prompt_ids, config, on_tokens)


def _write(
    recovery: Recovery,
    draft_stub: Any,
    target_stub: Any,
    prompt_ids: Sequence[int],
    config: OrchestratorConfig,
    on_tokens: OnTokens | None,
) -> SpeculativeResult:
    target_info = reach(recovery, "target", target_stub)
    draft_info = None
    if config.gamma:
        with suppress(WithoutDraft):
            draft_info = reach(recovery, "draft", draft_stub)
    text = recovery.begin(Text(prompt_ids, config, target_info, draft_info, on_tokens))
    target = RemoteSession("target", target_stub, "VerifyDrafts", config, recovery, rtt_ms=config.rtt_ms)
    draft = RemoteSession("draft", draft_stub, "GenerateDrafts", config, recovery) if draft_info else None
    text.started = time.perf_counter()
    try:
        while not text.finished:
            tree, drafted, gamma = TokenTree(), None, text.room()
            if draft is not None and gamma > 0:
                try:
                    drafted = draft.call(text.tokens, partial(pb.GenerateDraftsRequest, **draft_fields(text, gamma)))
                    draft.holds(text.tokens)
                    tree = tree_from_message(drafted.reply.tree)
                except WithoutDraft:
                    draft, gamma = None, 0
                    text.drop_draft()
            verified = target.call(text.tokens, partial(pb.VerifyDraftsRequest, **verify_fields(text, tree)))
            accepted = list(verified.reply.accepted_tokens)
            target.holds([*text.tokens, *accepted])
            number = len(text.result.rounds) + 1
            text.take(
                accepted, verified.reply.next_token, _round(number, tree, len(accepted), drafted, verified, gamma)
            )
    finally:
        target.end()
        if draft is not None:
            draft.end()
    return text.result


def _round(number: int, tree: TokenTree, accepted: int, drafted: Call | None, verified: Call, gamma: int) -> Round:
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
        gamma_asked=gamma,
    )
