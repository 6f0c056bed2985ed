"""Token trees and the shapes that they are drafted in."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specsplit.decoding.growth import DraftSettings, grow
from specsplit.decoding.sampling import Candidates
from specsplit.decoding.tree import MAX_BRANCHING, MAX_TREE_NODES, ROOT, TokenTree, TreeError, TreeShape

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
    empty = TokenTree()
    assert (len(empty), empty.depth(), empty.is_chain) == (0, 0, True)


@given(trees())
def test_depth_is_the_length_of_the_path(tree):
    tree.validate(vocab_size=VOCAB)
    for node, depth in enumerate(tree.depths()):
        assert depth == len(path_tokens(tree, node))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (TokenTree([1, 2], [-1], [0.0, 0.0]), "one length, got 2, 1 and 2"),
        (TokenTree([1], [0], [0.0]), "node 0: parent 0"),
        (TokenTree([1, 2], [-1, 1], [0.0, 0.0]), "node 1: parent 1"),
        (TokenTree([1], [-2], [0.0]), "node 0: parent -2"),
        (TokenTree([9], [-1], [0.0]), "token id 9 is outside the vocabulary of 5"),
        (TokenTree([-1], [-1], [0.0]), "token id -1 is outside the vocabulary of 5"),
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


# ---- the distributions that children were drawn from


def test_distributions_are_part_of_the_tree() -> None:
    tree = TokenTree.chain([1, 2])
    tree.distributions = {ROOT: ([1, 3], [0.75, 0.25]), 0: ([2], [1e-30]), 1: ([0, 4], [0.5, 0.5])}
    tree.validate(vocab_size=VOCAB)
    assert tree != TokenTree.chain([1, 2])


@pytest.mark.parametrize(
    ("node", "tokens", "probabilities", "message"),
    [
        (2, [1], [1.0], "distribution of node 2: there is no such node"),
        (-2, [1], [1.0], "distribution of node -2: there is no such node"),
        (0, [], [], "node 0: wants different tokens, each with a probability"),
        (0, [1, 2], [1.0], "node 0: wants different tokens, each with a probability"),
        (0, [1], [0.5, 0.5], "node 0: wants different tokens, each with a probability"),
        (0, [1, 1], [0.5, 0.5], "node 0: wants different tokens, each with a probability"),
        (0, [-1], [1.0], "node 0: a token is outside the vocabulary of 5"),
        (0, [1, 5], [0.5, 0.5], "node 0: a token is outside the vocabulary of 5"),
        (0, [1, 2], [0.5, 0.0], "node 0: a probability is not a finite number above 0"),
        (0, [1, 2], [0.5, -0.5], "node 0: a probability is not a finite number above 0"),
        (0, [1], [float("nan")], "node 0: a probability is not a finite number above 0"),
        (0, [1], [float("inf")], "node 0: a probability is not a finite number above 0"),
    ],
)
def test_malformed_distributions_are_refused(node, tokens, probabilities, message) -> None:
    tree = TokenTree.chain([1, 2])
    tree.distributions = {ROOT: ([1], [1.0]), node: (tokens, probabilities)}
    with pytest.raises(TreeError, match=message):
        tree.validate(vocab_size=VOCAB)


# ---- shapes


@pytest.mark.parametrize(
    ("text", "shape", "written"),
    [
        ("chain", TreeShape(), "chain"),
        ("3x2", TreeShape((3, 2)), "3x2"),
        ("4", TreeShape((4,)), "4"),
        ("1x8x1", TreeShape((1, 8, 1)), "1x8x1"),
        ("dynamic-16", TreeShape(nodes=16, width=4), "dynamic-16x4"),
        ("dynamic-64x2", TreeShape(nodes=64, width=2), "dynamic-64x2"),
        (f"dynamic-{MAX_TREE_NODES}x1", TreeShape(nodes=MAX_TREE_NODES, width=1), f"dynamic-{MAX_TREE_NODES}x1"),
    ],
)
def test_shapes_are_written_as_text(text: str, shape: TreeShape, written: str) -> None:
    assert TreeShape.parse(text) == shape
    assert str(shape) == written
    assert TreeShape.parse(str(shape)) == shape


@given(st.lists(st.integers(1, MAX_BRANCHING), max_size=5), st.integers(0, MAX_TREE_NODES), st.integers(1, 9))
def test_every_shape_is_read_as_it_is_written(branching: list[int], nodes: int, width: int) -> None:
    shape = TreeShape(nodes=nodes, width=width) if nodes else TreeShape(tuple(branching))
    assert TreeShape.parse(str(shape)) == shape


@pytest.mark.parametrize(
    "text",
    ["", "tree", "Chain", "3x", "x3", "3,2", "3 x 2", "0", "3x0", f"{MAX_BRANCHING + 1}", "-1", "3x2x", "3.5"],
)
def test_other_texts_are_no_shape(text: str) -> None:
    with pytest.raises(ValueError, match="is not a tree: write chain, 3x2") as caught:
        TreeShape.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("rest", ["", "-", "-0", "-4x0", f"-{MAX_TREE_NODES + 1}", "-8x", "-8x2x2", "-8x999"])
def test_malformed_dynamic_shapes(rest: str) -> None:
    with pytest.raises(ValueError, match="is not a tree"):
        TreeShape.parse(f"dynamic{rest}")


@pytest.mark.parametrize(
    ("shape", "gamma", "nodes"),
    [("chain", 4, 4), ("2", 3, 6), ("2x2", 3, 10), ("3x2x1", 2, 9), ("5", 0, 0), ("dynamic-12x3", 4, 12)],
)
def test_the_most_nodes_of_a_shape(shape: str, gamma: int, nodes: int) -> None:
    assert TreeShape.parse(shape).size(gamma) == nodes


def test_children_level_by_level() -> None:
    assert [TreeShape((3, 2)).children(depth) for depth in range(4)] == [3, 2, 1, 1]
    assert [TreeShape().children(depth) for depth in range(2)] == [1, 1]


@pytest.mark.parametrize(
    ("shape", "p_min", "drafted"),
    [
        ("chain", 0.0, [[7], [7, 7], [7, 7, 7]]),
        ("chain", 0.49, [[7]]),
        ("chain", 0.48, [[7], [7, 7]]),  # .7 * .7 = .49
        ("chain", 0.71, []),
        ("2x2", 0.2, [[7], [2], [7, 7], [7, 2], [2, 7], [7, 7, 7]]),
        ("dynamic-4x4", 0.2, [[7], [7, 7], [7, 7, 7], [2]]),
        ("dynamic-9x4", 0.2, [[7], [7, 7], [7, 7, 7], [2], [7, 2], [2, 7]]),
        ("dynamic-9x4", 0.71, []),
    ],
)
def test_a_draft_has_no_path_less_probable_than_p_min(shape: str, p_min: float, drafted: list[list[int]]) -> None:
    """After every text the token 7 has probability .7, and 2 has .299."""
    known = defaultdict(lambda: Candidates([7, 2], [math.log(0.7) - 1e-9, math.log(0.299)]))
    asked = DraftSettings(3, TreeShape.parse(shape), p_min=p_min)
    growth, numbers, fed = grow(asked, 3, ROOT, known), count(), 0
    try:
        wanted = next(growth)
        while True:
            fed += len(wanted)
            wanted = growth.send([next(numbers) for _ in wanted])
    except StopIteration as end:
        tree = end.value
    assert sorted(path_tokens(tree, node) for node in range(len(tree))) == sorted(drafted)
    assert fed <= len(drafted)  # nothing is fed that is not drafted
