"""Connecting to the two workers of a text and checking that they belong together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from specsplit.client.states import check_states
from specsplit.errors import UserError, listed
from specsplit.rpc.connection import Connection, connect
from specsplit.rpc.credentials import Access
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import OrchestratorConfig


@contextmanager
def connected_pair(
    config: OrchestratorConfig, tokenizer_sha256: str | None, *, draft: bool | None = None
) -> Iterator[dict[str, Connection]]:
    """Connections by role, to the target worker and, where there is one, the draft worker.

    tokenizer_sha256: of the tokenizer that makes the prompts; None when there is none. draft: whether there is a draft
    worker; by default there is unless config.gamma is 0. Raises UserError when a worker is missing, the tokenizers are
    not all the same, or the settings name stop tokens that the target does not have.
    """
    with ExitStack() as stack:
        options: dict[str, Any] = {"timeout_s": config.connect_timeout_s, "access": Access.of(config)}
        target = stack.enter_context(connect("target", config.target_address, **options))
        workers = {"target": target}
        if config.gamma if draft is None else draft:
            workers = {"draft": stack.enter_context(connect("draft", config.draft_address, **options)), **workers}
        named = {} if tokenizer_sha256 is None else {"--tokenizer": tokenizer_sha256}
        for role, worker in workers.items():
            named[f"the {role} worker ({worker.description.model})"] = worker.description.tokenizer_sha256
        check_tokenizers(named)
        check_stop_tokens(config, target.description)
        if "draft" in workers:
            check_states(workers["draft"].description, target.description, config)
        yield workers


def text_limit(*workers: pb.DescribeReply) -> tuple[int, bool]:
    """Tokens of the longest text that all of these workers can hold, and whether a setting, not a model, limits it."""
    limits = []
    for worker in workers:
        own = worker.runtime.get("model_max_context", "")
        limits.append((worker.max_context, not own.isdecimal() or worker.max_context < int(own)))
    return min(limits)


def check_stop_tokens(config: OrchestratorConfig, target: pb.DescribeReply) -> None:
    """Raise UserError for stop tokens of the settings that the target cannot write: no text would end by them."""
    if beyond := [token for token in config.stop_token_ids or () if token >= target.vocab_size]:
        raise UserError(
            f"stop_token_ids (generation.stop_token_ids, {config.flag('stop_token_ids')}): {listed(beyond)} is beyond "
            f"the vocabulary of {target.vocab_size} tokens of {target.model}, so no text would end by it; give the "
            "numbers of its tokens"
        )


def check_tokenizers(named: dict[str, str]) -> None:
    """Refuse to go on when the tokenizers differ. named: who -> tokenizer sha256."""
    if len(set(named.values())) > 1:
        lines = ", ".join(f"{who} has {sha[:12] or 'none'}" for who, sha in named.items())
        target = next((sha for who, sha in named.items() if who.startswith("the target")), None)
        drafts = {sha for who, sha in named.items() if who.startswith("the draft")}
        mend = "Start the draft worker with --target-tokenizer FOLDER, the folder of the target's model"
        if drafts <= {target}:
            mend = "Give the tokenizer of the target's model"
        raise UserError(f"the tokenizers differ ({lines}): token ids would mean different text. {mend}.")
