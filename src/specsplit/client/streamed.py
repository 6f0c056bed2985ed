"""The target alone, streaming: one call a text, in which the worker decodes by itself and sends each token.

This is what servers do without a draft, so it is what speculation has to beat. Gamma 0 through the loop (`pipeline`)
pays a round trip for every token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from specsplit.client.network import simulated, until
from specsplit.client.recovery import Recovery, WorkerFailed
from specsplit.client.result import Round, SpeculativeResult
from specsplit.client.session import HeldPrefix
from specsplit.client.spans import text_span
from specsplit.client.stream import Spent, Stream
from specsplit.client.text import OnTokens, Text
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import OrchestratorConfig


async def stream_target_async(
    target_stub: Any,
    prompt_ids: Sequence[int],
    config: OrchestratorConfig,
    *,
    on_tokens: OnTokens | None = None,
    identities: dict[str, pb.DescribeReply] | None = None,
    request_id: str | None = None,
) -> SpeculativeResult:
    """Write one text as gamma 0 of `run_speculative_loop_async` does, token for token, with one call to the target.

    A simulated round trip is paid once a text: half of it by the request, half by each token on its way, all of which
    are under way at once. A worker that fails is waited for and asked for the rest. Errors are those of the loop.
    """
    with text_span(config, request_id) as span:
        recovery = Recovery(config, {} if identities is None else identities, span)
        info = await recovery.describe("target", target_stub)
        text = recovery.begin(Text(prompt_ids, config, info, None, on_tokens))
        text.started = time.perf_counter()
        while True:
            try:
                await _stream(text, target_stub)
                return text.result
            except WorkerFailed as error:
                failed = error
            await recovery.describe(failed.role, target_stub, failed)


async def _stream(text: Text, target_stub: Any) -> None:
    """One call, until the text is finished. Raises WorkerFailed."""
    config = text.config
    left = text.length_limit - len(text.tokens)
    if config.max_rounds is not None:
        left = min(left, config.max_rounds - len(text.result.rounds))
    request = pb.StreamTextRequest(
        context=HeldPrefix.of(config).context(text.tokens),
        sampling=text.sampling_message,
        max_tokens=left,
        stop_token_ids=text.stop_ids,
    )
    began = time.perf_counter()
    call = target_stub.StreamText if text.span is None else text.span.carry(target_stub.StreamText)
    links = simulated(config)
    if links:
        await until(links[0].due(request, began))
    spent = Spent()
    spent["target_sent_bytes"] = request.ByteSize()
    stream = Stream("target", lambda: call(request), timeout_s=config.rpc_timeout_s, links=links, spent=spent)
    try:
        while not text.finished:
            reply = await stream.receive()
            for token in reply.token_ids:
                now = time.perf_counter()
                wall_ms, began = (now - began) * 1e3, now
                measured = Round(
                    round=len(text.result.rounds) + 1,
                    verify_wall_ms=wall_ms,
                    verify_compute_ms=reply.timings.compute_ms,
                    verify_queue_ms=reply.timings.queue_ms,
                    network_ms=max(0.0, wall_ms - reply.timings.server_ms),
                    **spent.take(),
                )
                text.take([], token, measured)
                if text.finished:
                    break
    finally:
        stream.end()
        await stream.ended()
