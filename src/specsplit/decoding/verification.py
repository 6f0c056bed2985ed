"""Which drafted tokens the target confirms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from specsplit.decoding.sampling import (
    ACCEPTANCE,
    RESIDUAL,
    NonFiniteLogits,
    Sampling,
    check_chosen,
    choose,
    gumbel,
    log_probs,
    uniform,
)
from specsplit.decoding.tree import ROOT, TokenTree


@dataclass(frozen=True)
class Verdict:
    """path: node indices of the accepted path, root first. next_token: the target's own token after it
    (the correction of the first rejected token, or the bonus token when a whole path was accepted)."""

    path: list[int]
    next_token: int


def checked_pass(model: Any, cache: Any, text: Sequence[int], tree: TokenTree, sampling: Sampling) -> Verdict:
    """Verify a draft in one pass. model: anything that has `loop.Model.step`; it may have `verdict` as well, which does
    where the logits are what `verify` does, or gives None. The cache holds a beginning of `text`, and `text` and the
    accepted tokens afterwards.

    A drafted token may make the model overflow where the target alone would not go, and so may a token that once stood
    in one pass with what the cache holds. So a pass with numbers that are not finite is repeated without the draft, and
    then over all of the text. Raises NonFiniteLogits when they are those of the text itself; the cache is empty then.
    """
    held = cache.length
    verdict: Verdict | None = None
    try:
        if hasattr(model, "verdict"):
            verdict = model.verdict(cache, text[held:], tree, sampling)
        if verdict is None:
            verdict = verify(tree, model.step(cache, text[held:], tree), len(text), sampling)
    except NonFiniteLogits:
        cache.rollback(held if len(tree) else 0)
        cache.clean()
        if not len(tree) and not held:
            raise
        return checked_pass(model, cache, text, TokenTree(), sampling)
    cache.keep(len(text), verdict.path)
    return verdict


def verify(tree: TokenTree, logits: torch.Tensor, position: int, sampling: Sampling) -> Verdict:
    """Verify a draft by the method that `sampling` names.

    logits: the target's, [1 + nodes, vocab]: after the context, then after each node.
    position: of the first drafted token in the text, so the length of the context.
    Raises NonFiniteLogits when a row on the path is not finite; other rows are not looked at.
    """
    if len(logits) != 1 + len(tree):
        raise ValueError(f"{len(tree)} nodes need {1 + len(tree)} rows of logits, got {len(logits)}")
    if sampling.uses_rejection:
        return verify_rejection(tree, logits, position, sampling)
    if not sampling.greedy:
        return follow(tree, lambda node, depth: choose(logits[node + 1], position + depth, sampling))
    tokens = logits.argmax(-1)
    best = logits.gather(-1, tokens[:, None])[:, 0]
    choices, scores = torch.stack([tokens.double(), best.double()]).tolist()  # one transfer from the device

    def choice_after(node: int, depth: int) -> int:
        check_chosen(scores[node + 1], position + depth)
        return int(choices[node + 1])

    return follow(tree, choice_after)


def follow(tree: TokenTree, choice_after: Callable[[int, int], int]) -> Verdict:
    """Follow the target's own choices down the tree as far as a drafted token agrees.

    choice_after(node, depth): its choice after a node, ROOT for the context; asked for nodes on the path alone.
    The accepted tokens plus `next_token` are exactly what the target alone would emit (Leviathan et al. 2023 at
    temperature 0; SpecInfer, Miao et al. 2024, for trees).
    """
    children: dict[tuple[int, int], int] = {}
    for i, (parent, token) in enumerate(zip(tree.parents, tree.token_ids, strict=True)):
        children.setdefault((parent, token), i)
    path: list[int] = []
    choice = choice_after(ROOT, 0)
    while (child := children.get((path[-1] if path else ROOT, choice))) is not None:
        path.append(child)
        choice = choice_after(child, len(path))
    return Verdict(path, choice)


def verify_rejection(tree: TokenTree, logits: torch.Tensor, position: int, sampling: Sampling) -> Verdict:
    """Rejection sampling: the text is distributed as the target's own, whatever the draft (not token for token).

    A chain: Leviathan et al. 2023, Chen et al. 2023. Several children under a node: SpecInfer's multi-step sampling in
    the form for children drawn without replacement (recursive rejection, Jeon et al. 2024): each in its turn is
    accepted with probability min(1, p / q); after a rejection p becomes the normalised positive part of p - q, and q
    loses the rejected token. `tree.distributions` must hold the q that the children of a node were drawn from.
    Raises ValueError when a node has children but no distribution, or a child that its distribution cannot draw, and
    NonFiniteLogits.
    """
    offspring: dict[int, list[int]] = {}
    for node, parent in enumerate(tree.parents):
        offspring.setdefault(parent, []).append(node)
    path: list[int] = []
    while True:
        node, here = (path[-1] if path else ROOT), position + len(path)
        p = log_probs(logits[node + 1][None], sampling)[0].exp().cpu().numpy()
        check_chosen(float(p.sum()), here)
        accepted = None
        if node in offspring:
            q = _dense(tree, node, len(p))
            for turn, child in enumerate(offspring[node]):
                token = tree.token_ids[child]
                if not q[token] > 0:
                    raise ValueError(f"node {child}: its distribution cannot draw token {token}")
                if uniform(sampling.seed, ACCEPTANCE, here, turn) * q[token] < p[token]:
                    accepted = child
                    break
                rest = np.maximum(p - q, 0.0)
                rest[token] = 0.0  # rejected, so q > p; exact where rounding is not
                if (total := rest.sum()) > 0:
                    p = rest / total
                q[token] = 0.0
                if (total := q.sum()) > 0:
                    q /= total
        if accepted is None:
            with np.errstate(divide="ignore"):
                scores = np.log(p) + gumbel(sampling.seed, RESIDUAL, here, len(p)).numpy()
            return Verdict(path, int(scores.argmax()))
        path.append(accepted)


def _dense(tree: TokenTree, node: int, vocab: int) -> np.ndarray:
    if node not in tree.distributions:
        where = "the context" if node == ROOT else f"node {node}"
        raise ValueError(f"rejection sampling needs the draft's distribution after {where}")
    token_ids, probabilities = tree.distributions[node]
    q = np.zeros(vocab)
    q[token_ids] = probabilities
    return q / q.sum()
