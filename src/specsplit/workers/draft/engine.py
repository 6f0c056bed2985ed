"""Drafting: a token tree that continues the context, grown level by level."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from specsplit.decoding.tree import ROOT, TokenTree, branching_of
from specsplit.models.causal_lm import CausalLM
from specsplit.workers.sessions import Session


def draft_tree(
    model: CausalLM,
    session: Session,
    context: Sequence[int],
    prefix_length: int,
    *,
    gamma: int,
    branching: Sequence[int] = (),
    stop_token_ids: Collection[int] = (),
) -> TokenTree:
    """The draft model's most likely continuations of `context`, as a tree of depth at most `gamma`.

    `context` agrees with the session's tokens up to `prefix_length`. One pass per level; each node gets
    `branching[level]` children (1 beyond its end), the most likely ones; nothing is drafted after a stop token.
    The session then holds the context, followed in the cache by every node but those of the last level.
    """
    fed = reuse_last_draft(session, context, prefix_length)
    tree = TokenTree()
    frontier = [ROOT]
    logits = model.step(session.cache, context[fed:])[-1:]
    cached_nodes = 0
    for depth in range(gamma):
        frontier = _grow(tree, frontier, logits, branching_of(branching, depth), stop_token_ids)
        if not frontier or depth == gamma - 1:
            break
        # Every node of the new level is fed, stop tokens too: the cache holds nodes in the order of the tree.
        first_new = cached_nodes
        logits = model.step(session.cache, (), tree, cached_nodes)
        logits = logits[[node - first_new for node in frontier]]
        cached_nodes = len(tree)
    session.tokens, session.tree, session.cached_nodes = list(context), tree, cached_nodes
    return tree


def reuse_last_draft(session: Session, context: Sequence[int], prefix_length: int) -> int:
    """Bring the cache to a prefix of `context`, keeping what the last draft got right; returns its length.

    Accepted drafted tokens were fed while drafting, so their keys and values are kept (compacted along the
    accepted path); everything else after the common prefix is forgotten.
    """
    cache = session.cache
    path: list[int] = []
    if prefix_length == len(session.tokens) and prefix_length + session.cached_nodes == cache.length:
        # The last token of the context is always fed again: its logits are needed.
        path = [n for n in session.tree.walk(context[prefix_length:-1]) if n < session.cached_nodes]
    held = min(cache.length, prefix_length, len(context) - 1)
    cache.keep(held, path) if path else cache.rollback(held)
    # Said at once, so that a pass that fails later leaves a session that tells the truth.
    session.tokens, session.tree, session.cached_nodes = list(context[: cache.length]), TokenTree(), 0
    return cache.length


def _grow(
    tree: TokenTree, parents: Sequence[int], logits: torch.Tensor, width: int, stop_token_ids: Collection[int]
) -> list[int]:
    """Add the `width` most likely children of every parent; returns those that may be drafted from.

    logits: [len(parents), vocab].
    """
    width = min(width, logits.shape[-1])
    scores, tokens = logits.float().log_softmax(-1).topk(width, dim=-1)
    frontier = []
    for parent, row_scores, row_tokens in zip(parents, scores.tolist(), tokens.tolist(), strict=True):
        for log_prob, token in zip(row_scores, row_tokens, strict=True):
            node = tree.add(token, parent, min(log_prob, 0.0))
            if token not in stop_token_ids:
                frontier.append(node)
    return frontier
