"""Speculative decoding on one page: draft, verify, accept. No transport, no sessions.

A small draft model proposes a tree of tokens; the target model scores all of them in one pass; the longest path that
the target confirms is kept, and the target adds one token of its own (Leviathan et al. 2023; Chen et al. 2023; for
trees SpecInfer, Miao et al. 2024). The workers and the client, in every mode and with every engine, must write what
this loop writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from specsplit.decoding.growth import CANDIDATES, DraftSettings, grow
from specsplit.decoding.sampling import Candidates, candidates
from specsplit.decoding.tree import ROOT, TokenTree
from specsplit.decoding.verification import checked_pass

NO_DRAFT = TokenTree()


class Model(Protocol):
    """A language model and its cache; every engine is one.

    step: feeds `tokens`, then the nodes of `tree` from number `cached_nodes` on (the earlier ones are in the cache).
    Returns logits [rows, vocab_size]: after the last of `tokens`, if there are any, then after each node fed.
    A cache has length, rollback(length), keep(length, path): so many tokens, then the nodes of a path; and clean(),
    which leaves nothing behind `length` that a later pass could read.
    """

    vocab_size: int
    max_context: int

    def new_cache(self, capacity: int) -> Any: ...
    def step(
        self, cache: Any, tokens: Sequence[int], tree: TokenTree = NO_DRAFT, cached_nodes: int = 0
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Round:
    """One draft and what came of it. accepted: drafted tokens confirmed. tokens: what the round added to the text."""

    tree: TokenTree
    accepted: int
    tokens: list[int]


def speculate(
    target: Model, draft: Model | None, prompt: Sequence[int], asked: DraftSettings, *, max_new_tokens: int
) -> Iterator[Round]:
    """Continue `prompt` by at most `max_new_tokens` tokens, round by round; a stop token ends the text and is its last.

    draft: reads and writes the target's token ids; None = the target alone. One that reads the target's hidden states
    has `layers`, whose inputs the target's cache then keeps, and `project`, which joins them.
    The text is the target's own: token for token (greedy, coupled sampling), or in distribution (rejection sampling).
    """
    text = list(prompt)
    limit = min(len(text) + max_new_tokens, target.max_context, asked.length_limit)
    asked = replace(asked, vocab_size=min(asked.vocab_size, target.vocab_size), length_limit=limit)
    capacity = limit + max(asked.shape.size(asked.gamma), asked.shape.width * asked.gamma)
    at_target, at_draft = target.new_cache(capacity), (draft or target).new_cache(capacity)
    head: Any = draft if hasattr(draft, "project") else None
    if head is not None:
        at_target.tap(head.layers)
    while len(text) < limit:
        # The first token is the target's: a draft would delay it.
        tree = NO_DRAFT
        if draft and len(text) > len(prompt):
            states = head.project(at_target.states[at_draft.length : len(text) - 1]) if head else None
            tree = draft_tree(draft, at_draft, text, asked, states)
        verdict = checked_pass(target, at_target, text, tree, asked.sampling)
        tokens = [*(tree.token_ids[node] for node in verdict.path), verdict.next_token]
        end = next((i for i, token in enumerate(tokens) if token in asked.stop_token_ids), len(tokens))
        text += tokens[: end + 1]
        yield Round(tree, len(verdict.path), tokens[: end + 1])
        if end < len(tokens):
            return


def draft_tree(
    model: Any, cache: Any, text: Sequence[int], asked: DraftSettings, states: torch.Tensor | None = None
) -> TokenTree:
    """What the draft model proposes after `text`. The cache holds a beginning of `text`, and all of it afterwards.

    states: of a model that reads hidden states: those of the token before each one that the cache lacks. The first
    token has none before it, and no place in the cache.
    """
    gamma = min(asked.gamma, asked.length_limit - len(text) - 1)  # the last token is always the target's own
    while gamma > 0 and len(text) + asked.shape.size(gamma) > model.max_context:
        gamma -= 1
    if gamma < 1 or max(text) >= model.vocab_size:  # no room, or a token that the draft model does not know
        return NO_DRAFT
    fed, depth = TokenTree(), {ROOT: 0}  # what the model has read after the text
    found: dict[int, Candidates] = {}

    def learn(nodes: Sequence[int], logits: torch.Tensor) -> None:
        positions = [len(text) + depth[node] for node in nodes]
        best = candidates(logits[:, : asked.vocab_size], positions, asked.sampling, CANDIDATES)
        found.update(zip(nodes, best, strict=True))

    given = {} if states is None else {"states": states}
    read = text[1 if given else 0 :]
    learn([ROOT], model.step(cache, read[cache.length :], **given)[-1:])
    growth = grow(asked, gamma, ROOT, found)
    nodes: list[int] | None = None
    try:
        while True:
            wanted = growth.send(nodes)  # None begins it
            nodes = [fed.add(token, parent, log_prob) for parent, token, log_prob in wanted]
            depth.update((node, depth[fed.parents[node]] + 1) for node in nodes)
            learn(nodes, model.step(cache, (), fed, nodes[0]))
    except StopIteration as grown:
        cache.rollback(len(read))
        tree: TokenTree = grown.value
        return tree
