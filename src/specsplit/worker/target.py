"""Verification: one pass of the target over new context tokens and the drafted tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from specsplit.decoding.sampling import GREEDY, NonFiniteLogits, Sampling
from specsplit.decoding.tree import TokenTree
from specsplit.decoding.verification import Verdict, checked_pass
from specsplit.worker.refusals import NotFinite
from specsplit.worker.sessions import Session

if TYPE_CHECKING:
    from specsplit.engines.passes import Steps


def verify_tree(
    model: Steps,
    session: Session,
    context: Sequence[int],
    prefix_length: int,
    tree: TokenTree,
    sampling: Sampling = GREEDY,
) -> Verdict:
    """Decide which drafted tokens the target accepts, and its own next token.

    context: the full context; the session holds its first `prefix_length` tokens. Afterwards the session holds the
    context and the accepted tokens, in its token list and in its cache. A pass that fails leaves a consistent session.
    Raises NotFinite when the target's own logits are not finite.
    """
    cache = session.cache
    cache.rollback(min(cache.length, prefix_length, len(context) - 1))
    session.tokens = list(context[: cache.length])  # true even if the pass below fails
    try:
        verdict = checked_pass(model, cache, context, tree, sampling)
    except NonFiniteLogits as error:
        raise NotFinite(str(error)) from error
    session.tokens = [*context, *(tree.token_ids[node] for node in verdict.path)]
    return verdict


def read_context(model: Steps, session: Session, context: Sequence[int], prefix_length: int) -> None:
    """Run the context but for its last token, as `verify_tree` does, and verify nothing."""
    cache = session.cache
    cache.rollback(min(cache.length, prefix_length, len(context) - 1))
    session.tokens = list(context[: cache.length])
    if rest := context[cache.length : -1]:
        model.step(cache, rest)
    session.tokens = list(context[:-1])
