"""Texts from synchronous code, over channels that stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import grpc

from specsplit.client.event_loop import event_loop
from specsplit.client.pipeline import run_speculative_loop_async
from specsplit.client.result import SpeculativeResult
from specsplit.client.streamed import stream_target_async
from specsplit.rpc.credentials import Access
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import OrchestratorConfig


class TextWriter:
    """Writes texts, one after another. Use as a context manager.

    draft: address of the draft worker, None when gamma is 0. access: how the client shows who it is.
    identities: role -> what the worker there said of itself, by default before the first text; another model at that
    address is refused from then on.
    """

    def __init__(
        self,
        draft: str | None,
        target: str,
        identities: Mapping[str, pb.DescribeReply] | None = None,
        *,
        access: Access | None = None,
    ) -> None:
        self._addresses = draft, target
        self._identities = dict(identities or {})
        self._access = access or Access()

    def __enter__(self) -> Self:
        async def open_channels() -> list[grpc.aio.Channel | None]:
            return [address and self._access.aio_channel(address) for address in self._addresses]

        self._draft, self._target = event_loop().run(open_channels())
        return self

    def __exit__(self, *_: object) -> None:
        for channel in (self._draft, self._target):
            if channel is not None:
                event_loop().run(channel.close())

    def write(self, prompt_ids: Sequence[int], config: OrchestratorConfig, **options: Any) -> SpeculativeResult:
        """As `run_speculative_loop_async`, which has these options: on_tokens, controller, request_id."""
        draft = None if self._draft is None else self._access.stub("draft", self._draft)
        target = self._access.stub("target", self._target)
        options["identities"] = self._identities
        return event_loop().run(run_speculative_loop_async(draft, target, prompt_ids, config, **options))

    def stream_target(self, prompt_ids: Sequence[int], config: OrchestratorConfig, **options: Any) -> SpeculativeResult:
        """As `stream_target_async`: the target alone, which streams its tokens. options: on_tokens, request_id."""
        target = self._access.stub("target", self._target)
        return event_loop().run(stream_target_async(target, prompt_ids, config, identities=self._identities, **options))
