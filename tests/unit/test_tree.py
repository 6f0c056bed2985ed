"""Token trees and their verification."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specsplit.decoding.tree import ROOT, TokenTree, TreeError, tree_size
from specsplit.decoding.verification import verify_greedy

VOCAB = 5


@st.composite
def trees(draw, max_nodes: int = 12) -> TokenTree:
    """Valid trees: no token twice under one parent."""
    tree, taken = TokenTree(), set()
    for _ in range(draw(st.integers(0, max_nodes))):
        parent = draw(st.integers(ROOT, len(tree) - 1))
        token = draw(st.integers(0, VOCAB - 1))
        if (parent, token) not in taken:
            taken.add((parent, token))
            tree.add(token, parent, -draw(st.floats(0, 10)))
    return tree


def path_tokens(tree: TokenTree, node: int) -> list[int]:
    tokens = []
    while node != ROOT:
        tokens.insert(0, tree.token_ids[node])
        node = tree.parents[node]
    return tokens


def test_chain():
    chain = TokenTree.chain([7, 8, 9])
    assert (chain.parents, chain.depths(), chain.depth(), chain.is_chain) == ([-1, 0, 1], [1, 2, 3], 3, True)
    assert chain.walk([7, 8, 1, 9]) == [0, 1]
    empty = TokenTree()
    assert (len(empty), empty.depth(), empty.walk([1]), empty.is_chain) == (0, 0, [], True)


@given(trees())
def test_depth_is_the_length_of_the_path_and_walk_finds_every_node(tree):
    tree.validate(vocab_size=VOCAB)
    for node, depth in enumerate(tree.depths()):
        tokens = path_tokens(tree, node)
        assert depth == len(tokens)
        assert tree.walk(tokens)[-1] == node


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (TokenTree([1, 2], [-1], [0.0, 0.0]), "one length, got 2, 1 and 2"),
        (TokenTree([1], [0], [0.0]), "node 0: parent 0"),
        (TokenTree([1, 2], [-1, 1], [0.0, 0.0]), "node 1: parent 1"),
        (TokenTree([1], [-2], [0.0]), "node 0: parent -2"),
        (TokenTree([9], [-1], [0.0]), "token id 9 is outside the vocabulary of 5"),
        (TokenTree([-1], [-1], [0.0]), "token id -1 is negative"),
        (TokenTree.chain([1, 2], []), "one length, got 2, 2 and 0"),
        (TokenTree([1], [-1], [0.5]), "log-probability 0.5"),
        (TokenTree([1], [-1], [float("nan")]), "log-probability nan"),
        (TokenTree([1], [-1], [float("-inf")]), "log-probability -inf"),
        (TokenTree([1, 1], [-1, -1], [0.0, 0.0]), "node 1: token 1 stands twice under parent -1"),
    ],
)
def test_malformed_trees_are_refused_with_the_node(tree, message):
    with pytest.raises(TreeError, match=message):
        tree.validate(vocab_size=VOCAB)


def test_node_limit():
    with pytest.raises(TreeError, match="3 nodes, the limit is 2"):
        TokenTree.chain([1, 2, 3]).validate(max_nodes=2)


@pytest.mark.parametrize(
    ("shape", "gamma", "nodes"), [([], 4, 4), ([2], 3, 6), ([2, 2], 3, 10), ([3, 2, 1], 2, 9), ([5], 0, 0)]
)
def test_tree_size(shape, gamma, nodes):
    assert tree_size(shape, gamma) == nodes


@given(trees(), st.data())
def test_verification_against_the_definition(tree, data):
    """Accepted + next token is what the target emits alone, as far as the tree goes; found here by brute force."""
    context_choice = data.draw(st.integers(0, VOCAB - 1))
    choices = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=len(tree), max_size=len(tree)))
    verdict = verify_greedy(tree, context_choice, choices)

    def accepted(node: int) -> bool:
        parent = tree.parents[node]
        choice = context_choice if parent == ROOT else choices[parent]
        return tree.token_ids[node] == choice and (parent == ROOT or accepted(parent))

    expected = [node for node in range(len(tree)) if accepted(node)]
    assert verdict.path == expected
    assert verdict.next_token == (choices[expected[-1]] if expected else context_choice)


def test_verification_needs_a_choice_for_every_node():
    with pytest.raises(ValueError, match="2 nodes need 2 choices, got 1"):
        verify_greedy(TokenTree.chain([1, 2]), 1, [2])


@given(trees(), st.integers(0, VOCAB))
def test_within_keeps_what_can_be_reached(tree, limit):
    kept = tree.within(limit)
    kept.validate(vocab_size=limit)
    reachable = [i for i in range(len(tree)) if all(token < limit for token in path_tokens(tree, i))]
    assert [path_tokens(kept, i) for i in range(len(kept))] == [path_tokens(tree, i) for i in reachable]
