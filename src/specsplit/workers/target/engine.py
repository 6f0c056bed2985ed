"""Verification: one pass of the target over new context tokens and the drafted tree."""

from __future__ import annotations

from collections.abc import Sequence

from specsplit.decoding.tree import TokenTree
from specsplit.decoding.verification import Verdict, verify_greedy
from specsplit.models.causal_lm import CausalLM
from specsplit.workers.sessions import Session


def verify_tree(
    model: CausalLM, session: Session, context: Sequence[int], prefix_length: int, tree: TokenTree
) -> Verdict:
    """Which drafted tokens the target confirms, and its own next token.

    `context` agrees with the session's tokens up to `prefix_length`. The session then holds the context and the
    accepted tokens, in its token list and in its cache.
    """
    cache = session.cache
    cache.rollback(min(cache.length, prefix_length, len(context) - 1))
    session.tokens = list(context[: cache.length])  # true even if the pass below fails
    logits = model.step(cache, context[cache.length :], tree)
    choices = logits.argmax(-1).tolist()
    verdict = verify_greedy(tree, choices[0], choices[1:])
    cache.keep(len(context), verdict.path)
    session.tokens = [*context, *(tree.token_ids[node] for node in verdict.path)]
    return verdict
