"""The text as it grows, and what ends it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from specsplit.client.limits import DraftLimits
from specsplit.client.result import Round, SpeculativeResult
from specsplit.client.spans import TextSpan
from specsplit.decoding.forced import forced
from specsplit.decoding.sampling import Sampling
from specsplit.decoding.tree import TreeShape
from specsplit.errors import PromptError
from specsplit.rpc.codec import sampling_to_message
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import OrchestratorConfig

OnTokens = Callable[[list[int]], int | None]
"""Told of the tokens that a round adds; a number that it returns ends the text after so many of them."""


class Text:
    """Prompt and generated tokens, with the limits that the workers and the configuration set.

    target, draft: what the workers say of themselves; draft may be None. limits: of a draft, by both. span: told of
    each round, where there is one. known: the whole text, where it is known. Raises PromptError when the prompt is
    empty, has a token that the target does not know, or leaves no room for one.
    """

    span: TextSpan | None = None
    known: Sequence[int] = ()

    def __init__(
        self,
        prompt_ids: Sequence[int],
        config: OrchestratorConfig,
        target: pb.DescribeReply,
        draft: pb.DescribeReply | None,
        on_tokens: OnTokens | None = None,
    ) -> None:
        self.config = config
        rejection = config.sampling == "rejection"
        self.sampling = Sampling(config.temperature, config.top_k, config.top_p, config.seed, rejection)
        self.sampling_message = sampling_to_message(self.sampling)
        self.limits = DraftLimits.of(config, target, draft)
        self.limit = self.limits.context
        self.vocab_size = target.vocab_size
        self._draft_vocab = draft.vocab_size if draft else 0
        self._draft_limit = min(self.limit, draft.max_context) if draft else 0
        if len(prompt_ids) >= self.limit:
            raise PromptError(
                f"the prompt has {len(prompt_ids)} tokens, a text can have {self.limit}: shorten the prompt"
            )
        if not prompt_ids:
            raise PromptError("the prompt has no tokens")
        if (outside := next((t for t in prompt_ids if not 0 <= t < target.vocab_size), None)) is not None:
            raise PromptError(f"token id {outside} is outside the vocabulary of {target.vocab_size}")
        self.stop_ids: list[int] = []
        if not config.ignore_eos:
            named = target.eos_token_ids if config.stop_token_ids is None else config.stop_token_ids
            self.stop_ids = [token for token in named if 0 <= token < target.vocab_size]
        # What the draft worker is told; nothing depends on it but that drafts end there.
        self.known_stop_ids = self.stop_ids[: self.limits.stop_tokens]
        self.tokens = list(prompt_ids)
        self.prompt_length = len(self.tokens)
        self.length_limit = min(self.limit, len(prompt_ids) + config.max_output_tokens)
        self.result = SpeculativeResult()
        self._on_tokens = on_tokens
        self.started = time.perf_counter()

    @property
    def finished(self) -> bool:
        return bool(self.result.finish_reason)

    def room(self, ahead: int = 0) -> int:
        """The deepest draft that makes sense after `ahead` more tokens: the last token is always the target's own; 0
        when the draft worker cannot hold it, or cannot read the text."""
        length, gamma = len(self.tokens) + ahead, self.target_room(ahead)
        # Models with one tokenizer may pad their vocabularies differently: a draft cannot read every token.
        if not self._draft_vocab or max(self.tokens) >= self._draft_vocab:
            return 0
        shape = self.limits.shape
        while gamma > 0 and length + shape.size(gamma) > self._draft_limit:
            gamma -= 1
        return gamma

    def target_room(self, ahead: int = 0) -> int:
        """As `room`, of a chain that no worker drafts: no longer than what a tree may have of nodes."""
        longest = min(self.limits.gamma, self.limits.shape.size(self.limits.gamma))
        return max(0, min(longest, self.length_limit - len(self.tokens) - ahead - 1))

    def draft_fields(self, gamma: int, shape: TreeShape, ahead: pb.Ahead | None = None) -> dict[str, Any]:
        """Every field of GenerateDraftsRequest but `context`."""
        deepest = max(gamma, ahead.max_draft_tokens) if ahead is not None else gamma
        return {
            "max_draft_tokens": gamma,
            "branching": shape.branching[:deepest],
            "tree_nodes": shape.nodes,
            "tree_width": shape.width if shape.nodes else 0,
            "stop_token_ids": self.known_stop_ids,
            "sampling": self.sampling_message,
            "vocab_size": self.vocab_size,
            "length_limit": self.length_limit,
            "ahead": ahead,
            "memory": self.config.memory,
            "prompt_tokens": self.prompt_length,
            "p_min": self.config.p_min,
            "forced": self._forced(gamma + 1 + ahead.max_draft_tokens if ahead else gamma),
        }

    def _forced(self, count: int) -> pb.Forced | None:
        """The next `count` tokens of the text that is known beforehand, where acceptance is forced."""
        start, acceptance = len(self.tokens), self.config.draft_acceptance
        if acceptance is None or self.known[:start] != self.tokens or len(self.known) == start:
            return None
        made = forced(self.known[start : start + count], start, acceptance, self.config.seed)
        return pb.Forced(tokens=made.tokens, right=made.right)

    def drop_draft(self) -> None:
        """From here on the target writes alone."""
        self._draft_vocab = 0

    def take(self, accepted: list[int], next_token: int, measured: Round) -> None:
        """Add what a round brought; sets result.finish_reason when the text ends with it."""
        result = self.result
        new = [*accepted, next_token]
        self.tokens += new
        end = next((i for i, token in enumerate(new) if token in self.stop_ids), None)
        fresh = new[:end]
        now_ms = (time.perf_counter() - self.started) * 1e3
        kept: int | None = None
        if fresh:
            result.ttft_ms = now_ms if result.ttft_ms is None else result.ttft_ms
            if self._on_tokens is not None:
                kept = self._on_tokens(fresh)
            result.output_tokens += fresh[:kept]
        result.total_ms = now_ms
        result.rounds.append(replace(measured, arrived_ms=now_ms))
        if self.span is not None:
            self.span.round(measured)
        if kept is not None:
            result.finish_reason = "stop"
        elif end is not None:
            result.finish_reason = "eos"
        elif len(result.output_tokens) >= self.config.max_output_tokens:
            result.finish_reason = "length"
        elif len(self.tokens) >= self.limit:
            result.finish_reason = "context"
        elif self.config.max_rounds is not None and len(result.rounds) >= self.config.max_rounds:
            result.finish_reason = "max_rounds"
