"""Connecting to the two workers of a text and checking that they belong together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from specsplit.errors import UserError
from specsplit.rpc.connection import Connection, connect
from specsplit.rpc.credentials import Access
from specsplit.settings.run import OrchestratorConfig


@contextmanager
def connected_pair(
    config: OrchestratorConfig, tokenizer_sha256: str | None, *, draft: bool | None = None
) -> Iterator[tuple[Connection | None, Connection]]:
    """Connections to the draft worker, or None, and to the target worker.

    tokenizer_sha256: of the tokenizer that makes the prompts; None when there is none. draft: whether there is a draft
    worker; by default there is unless config.gamma is 0. Raises UserError when a worker is missing or the
    tokenizers are not all the same.
    """
    with ExitStack() as stack:
        options: dict[str, Any] = {"timeout_s": config.connect_timeout_s, "access": Access.of(config)}
        target = stack.enter_context(connect("target", config.target_address, **options))
        drafter = None
        if config.gamma if draft is None else draft:
            drafter = stack.enter_context(connect("draft", config.draft_address, **options))
        check_tokenizers(
            {
                **({} if tokenizer_sha256 is None else {"--tokenizer": tokenizer_sha256}),
                **{
                    f"the {c.role} worker ({c.description.model})": c.description.tokenizer_sha256
                    for c in (drafter, target)
                    if c is not None
                },
            }
        )
        yield drafter, target


def check_tokenizers(named: dict[str, str]) -> None:
    """Refuse to go on when the tokenizers differ. named: who -> tokenizer sha256."""
    if len(set(named.values())) > 1:
        lines = ", ".join(f"{who} has {sha[:12] or 'none'}" for who, sha in named.items())
        raise UserError(
            f"the tokenizers differ ({lines}): token ids would mean different text. "
            f"Use a draft and a target that share one tokenizer."
        )
