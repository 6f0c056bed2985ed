"""Masks and positions against their definition, node by node."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specsplit.decoding.tree import ROOT, TokenTree
from specsplit.engines.tree_attention import additive, positions, visible

from test_tree import trees


def ancestors(tree: TokenTree, node: int) -> set[int]:
    found = set()
    while node != ROOT:
        found.add(node)
        node = tree.parents[node]
    return found


@given(trees(), st.integers(0, 6), st.integers(0, 4), st.data(), st.none() | st.integers(1, 5))
def test_mask_and_positions(tree, context, linear, data, window):
    cached = data.draw(st.integers(0, len(tree))) if not linear else 0
    if context + linear == 0:
        context = 1
    mask = visible(context, linear, tree, cached, window)
    length = context + linear
    assert mask.shape == (linear + len(tree) - cached, length + len(tree))
    place = [*range(length), *(length - 1 + depth for depth in tree.depths())]
    fed = [*range(context, length), *range(length + cached, length + len(tree))]
    assert positions(context, linear, tree, cached) == [place[slot] for slot in fed]
    for row, slot in enumerate(fed):
        for key in range(length + len(tree)):
            on_path = slot >= length and (key < length or key - length in ancestors(tree, slot - length))
            sees = on_path or (slot < length and key <= slot)
            if window is not None:
                sees = sees and place[slot] - place[key] < window
            assert bool(mask[row, key]) == sees


def test_context_cannot_follow_cached_nodes():
    with pytest.raises(ValueError, match="cannot follow"):
        visible(3, 1, TokenTree.chain([1, 2]), cached_nodes=1)


def test_additive_mask():
    mask = additive(torch.tensor([[True, False]]), torch.float32, torch.device("cpu"))
    assert mask.shape == (1, 1, 1, 2)
    assert mask[0, 0, 0].tolist() == [0.0, torch.finfo(torch.float32).min]
