"""One text over gRPC: workers say what they are, rounds follow (`client/rounds.py`), and who fails is waited for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from specsplit.client.recovery import Recovery, WithoutDraft, WorkerFailed
from specsplit.client.result import SpeculativeResult
from specsplit.client.rounds import Rounds
from specsplit.client.spans import text_span
from specsplit.client.states import PassedStates, check_states
from specsplit.client.text import OnTokens, Text
from specsplit.decoding.adaptive import GammaController
from specsplit.decoding.tree import TreeShape
from specsplit.rpc.statuses import ALL_TAKEN
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import NO_NETWORK, OrchestratorConfig


async def run_speculative_loop_async(
    draft_stub: Any,
    target_stub: Any,
    prompt_ids: Sequence[int],
    config: OrchestratorConfig,
    *,
    on_tokens: OnTokens | None = None,
    controller: GammaController | None = None,
    identities: dict[str, pb.DescribeReply] | None = None,
    request_id: str | None = None,
) -> SpeculativeResult:
    """Write one text with speculative decoding in the mode of the configuration.

    draft_stub: a DraftServiceStub on a grpc.aio channel; may be None when config.gamma is 0, and where config.lookup
        is the only draft.
    target_stub: a TargetServiceStub on a grpc.aio channel. on_tokens: called with each round's new tokens.
    controller: chooses gamma when it is `auto`, and remembers from text to text; default: a new one.
    identities: role -> what the worker there said of itself before; filled here, and another worker is refused.
    request_id: what the span of the text calls it.

    With forced acceptance (config.draft_acceptance) the target writes the text alone before, unmeasured.

    The output is what the target alone would write, token for token (with rejection sampling: in distribution).
    A worker that fails is waited for and given the whole text again (`recovery`). Raises WorkerError, with the text so
    far, when that did not help, and UserError when the prompt does not fit.
    """
    known: list[int] = []
    if config.draft_acceptance is not None and config.gamma:
        changes = {"gamma": 0, "draft_acceptance": None, **NO_NETWORK}
        alone = await run_speculative_loop_async(
            None, target_stub, prompt_ids, config.model_copy(update=changes), identities=identities
        )
        known = [*prompt_ids, *alone.output_tokens]
    with text_span(config, request_id) as span:
        recovery = Recovery(config, {} if identities is None else identities, span)
        target_info = await recovery.describe("target", target_stub)
        draft_info = None
        if config.gamma and draft_stub is not None:
            with suppress(WithoutDraft):
                draft_info = await recovery.describe("draft", draft_stub)
        if draft_info is not None:
            check_states(draft_info, target_info, config)
        text = recovery.begin(Text(prompt_ids, config, target_info, draft_info, on_tokens))
        text.limits.say()
        text.known = known
        stubs = {"target": target_stub, "draft": draft_stub if draft_info else None}
        if config.gamma != "auto" or controller is None:
            controller = gamma_controller(config, text.limits.shape)
        text.started = time.perf_counter()
        states = None
        if draft_info is not None and draft_info.HasField("states_needed"):
            states = PassedStates(draft_info.states_needed, config, text.limits)
        rounds = Rounds(text, stubs, controller, states)
        try:
            while True:
                try:
                    await rounds.run()
                    return text.result
                except WorkerFailed as error:
                    failed = error
                # Who has to wait for the target's session keeps none of the draft worker from the one that has it.
                waits = failed.role == "target" and ALL_TAKEN in failed.details
                lost = ["draft", "target"] if waits else [failed.role]
                await rounds.close(*lost)
                try:
                    await recovery.describe(failed.role, stubs[failed.role], failed)
                    for role in lost:
                        rounds.renew(role)
                except WithoutDraft:
                    rounds.drop_draft()
        finally:
            await rounds.close("draft", "target")


def gamma_controller(config: OrchestratorConfig, shape: TreeShape | None = None) -> GammaController | None:
    """What chooses gamma when it is `auto`, else None; it learns from one text for the next.

    shape: of the drafts, where it is another than that of the configuration.
    """
    if config.gamma != "auto":
        return None
    shape = config.shape if shape is None else shape
    return GammaController(config.mode, config.gamma_limit, fan_out=config.fan_out, shape=shape, p_min=config.p_min)
