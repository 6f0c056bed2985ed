"""Texts from synchronous code, over channels that stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import grpc

from specsplit.client.event_loop import event_loop
from specsplit.client.pipeline import run_speculative_loop_async
from specsplit.client.result import SpeculativeResult
from specsplit.client.streamed import stream_target_async
from specsplit.rpc.credentials import Access
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import OrchestratorConfig


def open_stubs(addresses: Mapping[str, str], access: Access) -> tuple[dict[str, Any], Callable[[], None]]:
    """Stubs of workers for the client's event loop, and what closes their channels. addresses: role -> address."""

    async def opened() -> dict[str, grpc.aio.Channel]:
        return {role: access.aio_channel(address) for role, address in addresses.items()}

    async def closed() -> None:
        for channel in channels.values():
            await channel.close()

    channels = event_loop().run(opened())
    stubs = {role: access.stub(role, channel) for role, channel in channels.items()}
    return stubs, lambda: event_loop().run(closed())


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
        self._addresses = {"target": target} | ({} if draft is None else {"draft": draft})
        self._identities = dict(identities or {})
        self._access = access or Access()

    def __enter__(self) -> Self:
        self._stubs, self._close = open_stubs(self._addresses, self._access)
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def write(self, prompt_ids: Sequence[int], config: OrchestratorConfig, **options: Any) -> SpeculativeResult:
        """As `run_speculative_loop_async`, which has these options: on_tokens, controller, request_id."""
        stubs, options["identities"] = self._stubs, self._identities
        text = run_speculative_loop_async(stubs.get("draft"), stubs["target"], prompt_ids, config, **options)
        return event_loop().run(text)

    def stream_target(self, prompt_ids: Sequence[int], config: OrchestratorConfig, **options: Any) -> SpeculativeResult:
        """As `stream_target_async`: the target alone, which streams its tokens. options: on_tokens, request_id."""
        options["identities"] = self._identities
        return event_loop().run(stream_target_async(self._stubs["target"], prompt_ids, config, **options))
