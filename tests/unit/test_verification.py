"""Which drafted tokens are confirmed, token for token. What holds on average is in property/test_distributions.py."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specsplit.decoding.sampling import GREEDY, Sampling, candidates, choose, log_probs
from specsplit.decoding.tree import ROOT, TokenTree
from specsplit.decoding.verification import Verdict, follow, verify, verify_rejection

from test_tree import VOCAB, path_tokens, trees

REJECTION = Sampling(temperature=1.0, rejection=True)
Model = Callable[[list[int]], torch.Tensor]


def model_of(seed: int, spread: float = 2.0) -> Model:
    """A model as a table: random logits [vocab] for every text."""
    return lambda text: torch.from_numpy(
        np.random.default_rng([seed, len(text), *text]).normal(scale=spread, size=VOCAB).astype(np.float32)
    )


def rows_of(model: Model, tree: TokenTree) -> torch.Tensor:
    """Its logits after the context and after every node."""
    return torch.stack([model(path_tokens(tree, node)) for node in range(ROOT, len(tree))])


def one_hot(*tokens: int) -> torch.Tensor:
    """Logits of a model that is sure of tokens[i] after row i; [len(tokens), VOCAB]."""
    rows = torch.full((len(tokens), VOCAB), -math.inf)
    rows[range(len(tokens)), list(tokens)] = 0.0
    return rows


def walk(tree: TokenTree, tokens: list[int]) -> list[int]:
    """Nodes of the longest path from the root that spells a prefix of `tokens`."""
    path: list[int] = []
    for token in tokens:
        below = [i for i, parent in enumerate(tree.parents) if parent == (path[-1] if path else ROOT)]
        if not (found := [i for i in below if tree.token_ids[i] == token]):
            break
        path += found[:1]
    return path


def emitted(tree: TokenTree, verdict: Verdict) -> list[int]:
    return [*(tree.token_ids[node] for node in verdict.path), verdict.next_token]


# ---- greedy


@given(trees(), st.data())
def test_greedy_against_the_definition(tree: TokenTree, data: st.DataObject) -> None:
    """Accepted + next token is what the target emits alone, as far as the tree goes; found here by brute force."""
    context_choice = data.draw(st.integers(0, VOCAB - 1))
    choices = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=len(tree), max_size=len(tree)))
    verdict = follow(tree, lambda node, _: context_choice if node == ROOT else choices[node])

    def accepted(node: int) -> bool:
        parent = tree.parents[node]
        choice = context_choice if parent == ROOT else choices[parent]
        return tree.token_ids[node] == choice and (parent == ROOT or accepted(parent))

    expected = [node for node in range(len(tree)) if accepted(node)]
    assert verdict.path == expected
    assert verdict.next_token == (choices[expected[-1]] if expected else context_choice)


@given(trees(), st.integers(0, 100), st.booleans())
def test_temperature_0_is_greedy_whatever_else_is_said(tree: TokenTree, seed: int, rejection: bool) -> None:
    logits = rows_of(model_of(seed), tree)
    choices = logits.argmax(-1).tolist()
    sampling = Sampling(temperature=0.0, top_k=2, top_p=0.5, seed=seed, rejection=rejection)
    assert verify(tree, logits, 5, sampling) == follow(tree, lambda node, _: choices[node + 1])


# ---- every method


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0), REJECTION], ids=["greedy", "coupled", "rejection"])
def test_each_node_needs_a_row_of_logits(sampling: Sampling) -> None:
    tree = TokenTree.chain([1, 2])
    for rows in (0, 2, 4):
        with pytest.raises(ValueError, match=f"2 nodes need 3 rows of logits, got {rows}"):
            verify(tree, torch.zeros(rows, VOCAB), 0, sampling)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8), Sampling(0.8, rejection=True)], ids=str)
def test_a_sure_target_takes_its_own_path(sampling: Sampling) -> None:
    """Context -> 1 -> 3 -> 0; nodes: 2 and 1 after the context, 4 and 3 after node 1, 2 after node 3."""
    tree = TokenTree([2, 1, 4, 3, 2], [ROOT, ROOT, 1, 1, 3], [-1.0] * 5)
    tree.distributions = {node: ([0, 1, 2, 3, 4], [0.2] * 5) for node in (ROOT, 1, 3)}
    logits = one_hot(1, 0, 3, 0, 0, 4)
    assert verify(tree, logits, 6, sampling) == Verdict([1, 3], 0)
    logits[4] = one_hot(2)[0]  # then the whole path is right, and a bonus token follows
    assert verify(tree, logits, 6, sampling) == Verdict([1, 3, 4], 4)
    logits[0] = one_hot(3)[0]
    assert verify(tree, logits, 6, sampling) == Verdict([], 3)


@pytest.mark.parametrize("kind", [Sampling(1.0), REJECTION], ids=["coupled", "rejection"])
def test_without_a_draft_the_target_samples_alone(kind: Sampling) -> None:
    logits = model_of(3, spread=0.5)([])[None]
    found = set()
    for seed in range(60):
        sampling = Sampling(1.0, top_k=3, seed=seed, rejection=kind.rejection)
        verdict = verify(TokenTree(), logits, seed, sampling)
        assert verdict.path == []
        found.add(verdict.next_token)
    assert found == set(logits[0].topk(3).indices.tolist())


# ---- coupled


kinds = st.builds(
    Sampling,
    temperature=st.floats(0.2, 3.0),
    top_k=st.sampled_from([0, 0, 3]),
    top_p=st.sampled_from([1.0, 1.0, 0.8]),
    seed=st.integers(0, 2**64 - 1),
)


def written_alone(model: Model, start: list[int], position: int, length: int, sampling: Sampling) -> list[int]:
    """What `choose` writes token by token, the first of `start` standing at `position`."""
    text = list(start)
    while len(text) < length:
        text.append(choose(model(text), position + len(text), sampling))
    return text


@settings(max_examples=100)
@given(trees(), kinds, st.integers(0, 1000), st.integers(0, 4096), st.integers(0, 4))
def test_coupled_text_is_what_the_target_writes_alone(
    tree: TokenTree, sampling: Sampling, seed: int, position: int, planted: int
) -> None:
    """For any tree, here with `planted` tokens of the right path in it; and the whole of that path is accepted."""
    model = model_of(seed)
    alone = written_alone(model, [], position, 20, sampling)
    for depth in range(planted):
        path = walk(tree, alone[: depth + 1])
        if len(path) == depth:
            tree.add(alone[depth], path[-1] if path else ROOT, -1.0)
    verdict = verify(tree, rows_of(model, tree), position, sampling)
    text = emitted(tree, verdict)
    assert text == alone[: len(text)]
    assert verdict.path == walk(tree, alone)
    assert len(verdict.path) >= planted


@settings(max_examples=100)
@given(kinds, st.integers(0, 1000), st.integers(0, 4096), st.integers(1, 4), st.integers(1, 3))
def test_coupled_text_does_not_depend_on_how_it_is_drafted(
    sampling: Sampling, seed: int, position: int, gamma: int, children: int
) -> None:
    """Rounds with a draft model of its own, any depth, any width."""
    target, draft = model_of(seed), model_of(seed + 1)
    text: list[int] = []
    while len(text) < 12:
        tree, level = TokenTree(), [ROOT]
        for depth in range(gamma):
            rows = torch.stack([draft([*text, *path_tokens(tree, node)]) for node in level])
            found = candidates(rows, [position + len(text) + depth] * len(level), sampling, children)
            level = [
                tree.add(token, node, log_prob)
                for node, best in zip(level, found, strict=True)
                for token, log_prob in zip(best.token_ids, best.log_probs, strict=True)
            ]
        logits = rows_of(lambda path, text=text: target([*text, *path]), tree)
        text = text + emitted(tree, verify(tree, logits, position + len(text), sampling))
    assert text == written_alone(target, [], position, len(text), sampling)


def test_a_draft_like_the_target_is_accepted_whole() -> None:
    """Coupled: the same noise on both sides, so it is the target's own text."""
    model = model_of(9)
    for seed in range(50):
        sampling = Sampling(1.3, top_p=0.9, seed=seed)
        tree = TokenTree()
        for depth in range(4):
            best = candidates(model(tree.token_ids)[None], [30 + depth], sampling, 1)[0]
            tree.add(best.token_ids[0], depth - 1, best.log_probs[0])
        assert verify(tree, rows_of(model, tree), 30, sampling).path == [0, 1, 2, 3]


# ---- rejection


def drawn(draft: Model, position: int, sampling: Sampling, gamma: int, children: int = 1) -> TokenTree:
    """A draft as the draft worker makes it: `children` of the context, chains below."""
    tree, level = TokenTree(), [ROOT]
    for depth in range(gamma):
        below = []
        for node in level:
            best = candidates(draft(path_tokens(tree, node))[None], [position + depth], sampling, children)[0]
            tree.distributions[node] = (best.support, best.probabilities)
            below += [tree.add(t, node, v) for t, v in zip(best.token_ids, best.log_probs, strict=True)]
        level, children = below, 1
    tree.validate(vocab_size=VOCAB)
    return tree


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.7)])
def test_a_draft_distributed_as_the_target_is_always_accepted(top_k: int, top_p: float) -> None:
    model = model_of(4)
    for seed in range(500):
        sampling = Sampling(0.9, top_k, top_p, seed, rejection=True)
        tree = drawn(model, 10, sampling, gamma=3)
        assert verify(tree, rows_of(model, tree), 10, sampling).path == [0, 1, 2]


def test_a_draft_of_impossible_tokens_is_never_accepted() -> None:
    target_row, draft_row = model_of(5)([]), model_of(6)([])
    target_row[3:], draft_row[:3] = -math.inf, -math.inf
    found = []
    for seed in range(500):
        sampling = Sampling(1.0, seed=seed, rejection=True)
        tree = drawn(lambda _: draft_row, 10, sampling, gamma=2, children=2)
        verdict = verify(tree, target_row.expand(1 + len(tree), -1), 10, sampling)
        assert verdict.path == []
        found.append(verdict.next_token)
    assert set(found) == {0, 1, 2}
    # All of the target's mass is left: the correction is a sample of p.
    frequencies = np.bincount(found, minlength=VOCAB) / len(found)
    p = log_probs(target_row[None], REJECTION)[0].exp().numpy()
    assert np.abs(frequencies - p).max() < 4 * 0.5 / math.sqrt(len(found))


def test_a_draft_that_covers_the_target_with_all_its_children_is_always_accepted() -> None:
    """Every token that the target may want stands in the tree; the last child that remains takes what is left."""
    target, draft = model_of(7), model_of(8)
    for seed in range(300):
        sampling = Sampling(1.0, seed=seed, rejection=True)
        tree = drawn(draft, 10, sampling, gamma=1, children=VOCAB)
        assert len(tree) == VOCAB
        assert len(verify(tree, rows_of(target, tree), 10, sampling).path) == 1


def test_rejection_is_repeatable_and_depends_on_seed_and_position() -> None:
    target, draft = model_of(11), model_of(12)
    tree = drawn(draft, 10, REJECTION, gamma=3, children=2)
    logits = rows_of(target, tree)
    assert verify(tree, logits, 10, REJECTION) == verify(tree, logits, 10, REJECTION)
    by_seed = {str(verify(tree, logits, 10, Sampling(1.0, seed=seed, rejection=True))) for seed in range(50)}
    by_position = {str(verify(tree, logits, position, REJECTION)) for position in range(50)}
    assert len(by_seed) > 1
    assert len(by_position) > 1


def test_only_the_ratio_of_the_probabilities_sent_counts() -> None:
    """They are normalised by their sum."""
    target, draft = model_of(13), model_of(14)
    for seed in range(50):
        sampling = Sampling(1.0, seed=seed, rejection=True)
        tree = drawn(draft, 10, sampling, gamma=2, children=2)
        before = verify(tree, rows_of(target, tree), 10, sampling)
        tree.distributions = {node: (t, [p / 8 for p in ps]) for node, (t, ps) in tree.distributions.items()}
        assert verify(tree, rows_of(target, tree), 10, sampling) == before


def test_rejection_needs_the_distribution_of_every_node_with_children() -> None:
    tree = TokenTree.chain([1, 2])
    logits = one_hot(1, 2, 0)
    with pytest.raises(ValueError, match="needs the draft's distribution after the context"):
        verify_rejection(tree, logits, 0, REJECTION)
    tree.distributions[ROOT] = ([1, 2], [0.5, 0.5])
    with pytest.raises(ValueError, match="needs the draft's distribution after node 0"):
        verify_rejection(tree, logits, 0, REJECTION)
    tree.distributions[0] = ([2], [1.0])
    assert verify_rejection(tree, logits, 0, REJECTION) == Verdict([0, 1], 0)


def test_a_child_that_its_distribution_cannot_draw_is_refused() -> None:
    tree = TokenTree([1, 2], [ROOT, ROOT], [-1.0, -1.0])
    tree.distributions[ROOT] = ([1, 3], [0.5, 0.5])
    with pytest.raises(ValueError, match=re.escape("node 1: its distribution cannot draw token 2")):
        verify_rejection(tree, one_hot(0, 0, 0), 0, REJECTION)
    tree = TokenTree([1, 1], [ROOT, ROOT], [-1.0, -1.0])  # without replacement: not twice
    tree.distributions[ROOT] = ([1, 3], [0.5, 0.5])
    with pytest.raises(ValueError, match=re.escape("node 1: its distribution cannot draw token 1")):
        verify_rejection(tree, one_hot(0, 0, 0), 0, REJECTION)
