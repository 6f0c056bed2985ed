"""Which drafted tokens the target confirms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specsplit.decoding.tree import ROOT, TokenTree


@dataclass(frozen=True)
class Verdict:
    """path: node indices of the accepted path, root first. next_token: the target's own token after it
    (the correction of the first rejected token, or the bonus token when a whole path was accepted)."""

    path: list[int]
    next_token: int


def verify_greedy(tree: TokenTree, context_choice: int, node_choices: Sequence[int]) -> Verdict:
    """Follow the target's greedy choices down the tree as far as a drafted token agrees.

    context_choice: the target's most likely token after the context.
    node_choices[i]: its most likely token after node i, so n entries for n nodes.

    The accepted tokens plus `next_token` are exactly what the target alone would emit (Leviathan et al. 2023 at
    temperature 0; SpecInfer, Miao et al. 2024, for trees).
    """
    if len(node_choices) != len(tree):
        raise ValueError(f"{len(tree)} nodes need {len(tree)} choices, got {len(node_choices)}")
    children: dict[tuple[int, int], int] = {}
    for i, (parent, token) in enumerate(zip(tree.parents, tree.token_ids, strict=True)):
        children.setdefault((parent, token), i)
    path: list[int] = []
    node, choice = ROOT, context_choice
    while (child := children.get((node, choice))) is not None:
        path.append(child)
        node, choice = child, node_choices[child]
    return Verdict(path, choice)
