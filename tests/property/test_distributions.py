"""Sampled text is distributed as the target's own: goodness of fit over fixed seeds, so the outcome never varies.

The whole path is tested: candidates -> growth -> the tree's distributions -> verify, round after round. The models are
tables: logits that depend on the whole text. What would break the law is tried as well, and must be noticed.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from specsplit.decoding import sampling as sampling_module
from specsplit.decoding import verification
from specsplit.decoding.growth import DraftSettings, grow
from specsplit.decoding.sampling import DRAFTED, Candidates, Sampling, candidates, choose, gumbel, log_probs, uniform
from specsplit.decoding.tree import ROOT, TokenTree, TreeShape
from specsplit.decoding.verification import Verdict, verify

Text = tuple[int, ...]
FITS = 1e-3  # p-values of right code are above it, for the seeds below
WRONG = 1e-6  # those of wrong code below it
REJECTION = Sampling(temperature=1.0, rejection=True)
COUPLED = Sampling(temperature=1.0)


# ---- tools


class Table:
    """A model of random logits, one row for each text, made when it is asked for."""

    def __init__(self, seed: int, vocab: int, spread: float = 1.0, like: Table | None = None) -> None:
        """like: another table that this one's logits are added to, so that the two are related."""
        self.seed, self.vocab, self.spread, self.like = seed, vocab, spread, like
        self.rows: dict[Text, torch.Tensor] = {}

    def __call__(self, text: Text) -> torch.Tensor:
        if text not in self.rows:
            noise = np.random.default_rng([self.seed, len(text), *text]).normal(size=self.vocab)
            row = torch.tensor(self.spread * noise, dtype=torch.float32)
            self.rows[text] = row if self.like is None else row + self.like(text)
        return self.rows[text]


def drafted(
    draft: Table, text: Text, position: int, sampling: Sampling, shape: TreeShape, gamma: int, count: int = 4
) -> TokenTree:
    """The draft that the draft worker makes after `text`, whose first token stands at `position`."""
    known: dict[int, Candidates] = {}
    texts: list[Text] = []

    def feed(after: Text) -> int:
        row = draft(after)[None]
        known[len(texts)] = candidates(row, [position + len(after)], sampling, count)[0]
        texts.append(after)
        return len(texts) - 1

    growth = grow(DraftSettings(gamma, shape), gamma, feed(text), known)
    try:
        wants = next(growth)
        while True:
            wants = growth.send([feed((*texts[node], token)) for node, token, _ in wants])
    except StopIteration as end:
        return end.value


def verified(target: Table, text: Text, tree: TokenTree, position: int, sampling: Sampling) -> tuple[Verdict, Text]:
    """The verdict, and the text that comes of it."""
    texts = [text]
    for token, parent in zip(tree.token_ids, tree.parents, strict=True):
        texts.append((*texts[parent + 1], token))
    verdict = verify(tree, torch.stack([target(t) for t in texts]), position + len(text), sampling)
    end = texts[verdict.path[-1] + 1] if verdict.path else text
    return verdict, (*end, verdict.next_token)


Drafter = Callable[[Text, int, Sampling], TokenTree]


def written(target: Table, drafter: Drafter, length: int, position: int, sampling: Sampling) -> Text:
    """The first `length` tokens that are written in rounds."""
    text: Text = ()
    while len(text) < length:
        _, text = verified(target, text, drafter(text, position, sampling), position, sampling)
    return text[:length]


def law(model: Table, length: int, sampling: Sampling) -> dict[Text, float]:
    """Probability of every text of `length` tokens when the model writes alone."""
    laws: dict[Text, float] = {(): 1.0}
    for _ in range(length):
        laws = {
            (*text, token): probability * p
            for text, probability in laws.items()
            for token, p in enumerate(log_probs(model(text)[None], sampling)[0].exp().tolist())
        }
    return laws


def p_value(samples: Iterable[Text], expected: dict[Text, float]) -> float:
    """Pearson's chi-square test; texts that are expected less than 5 times are counted as one. 0 when a sample is
    impossible."""
    counts = Counter(samples)
    n = counts.total()
    assert math.isclose(sum(expected.values()), 1.0)
    if any(expected.get(text, 0.0) == 0.0 for text in counts):
        return 0.0
    frequent = [text for text, p in expected.items() if n * p >= 5]
    cells = [(counts[text], n * expected[text]) for text in frequent]
    rest = n * sum(p for text, p in expected.items() if n * p < 5)
    if rest >= 5:
        cells.append((n - sum(count for count, _ in cells), rest))
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def total_variation(p: torch.Tensor, q: torch.Tensor) -> float:
    return 0.5 * float((p - q).abs().sum())


def within_error(found: float, expected: float, n: int) -> bool:
    """Is a frequency within four standard errors of its probability?"""
    return abs(found - expected) <= 4 * math.sqrt(expected * (1 - expected) / n) + 1e-6


# ---- noise


def test_the_numbers_are_uniform_and_the_noise_is_gumbel() -> None:
    n = 200_000
    numbers = sampling_module._uniform(3, 1, 17, n)
    assert p_value([(int(u * 100),) for u in numbers], {(i,): 0.01 for i in range(100)}) > FITS
    noise = gumbel(3, 1, 17, n)
    assert abs(float(noise.mean()) - np.euler_gamma) < 5 * math.pi / math.sqrt(6 * n)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.02)


def test_purposes_positions_and_seeds_are_independent() -> None:
    n = 50_000
    streams = [
        sampling_module._uniform(seed, purpose, position, n)
        for seed, purpose, position in itertools.product((0, 1, 1 << 40), range(4), (0, 1, 999))
    ]
    correlations = np.corrcoef(streams) - np.eye(len(streams))
    assert np.abs(correlations).max() < 5 / math.sqrt(n)


def test_numbers_at_neighbouring_seeds_and_positions_are_independent() -> None:
    """As they are used: one number for each token of a text, one text for each seed."""
    n = 5000
    by_seed = [uniform(seed, 2, 5, 0) for seed in range(n)]
    by_position = [uniform(5, 2, position, 0) for position in range(n)]
    for numbers in (by_seed, by_position):
        pairs = [(int(a * 5), int(b * 5)) for a, b in itertools.pairwise(numbers)]
        assert p_value(pairs, {(a, b): 1 / 25 for a in range(5) for b in range(5)}) > FITS


# ---- choosing


@pytest.mark.parametrize(
    ("sampling", "n"),
    [
        (COUPLED, 8_000),
        (Sampling(temperature=0.6, top_k=5), 8_000),
        (Sampling(temperature=1.4, top_p=0.8), 8_000),
        (Sampling(temperature=2.0, top_k=7, top_p=0.9), 8_000),
    ],
    ids=str,
)
def test_choosing_samples_the_distribution(sampling: Sampling, n: int) -> None:
    model = Table(1, vocab=10)
    row = model(())
    chosen = [(choose(row, 3, replace(sampling, seed=seed)),) for seed in range(n)]
    expected = law(model, 1, sampling)
    assert p_value(chosen, expected) > FITS
    warmer = replace(sampling, temperature=2 * sampling.temperature)
    assert p_value(chosen, law(model, 1, warmer)) < WRONG  # it would be noticed


def test_choosing_samples_over_positions() -> None:
    model = Table(2, vocab=10)
    rows = model(()).expand(10_000, -1)
    found = candidates(rows, range(10_000), COUPLED, 1)
    assert p_value([(c.token_ids[0],) for c in found], law(model, 1, COUPLED)) > FITS


def test_rejection_candidates_are_drawn_without_replacement() -> None:
    """The first is a sample of q, the second of q without the first, the third without both."""
    model = Table(3, vocab=5)
    n = 6_000
    found = [candidates(model(())[None], [2], replace(REJECTION, seed=seed), 3)[0] for seed in range(n)]
    q = log_probs(model(())[None], REJECTION)[0].exp().tolist()
    expected = {
        (a, b, c): q[a] * q[b] / (1 - q[a]) * q[c] / (1 - q[a] - q[b])
        for a, b, c in itertools.permutations(range(5), 3)
    }
    assert p_value([tuple(c.token_ids) for c in found], expected) > FITS
    assert p_value([tuple(sorted(c.token_ids)) for c in found], expected) < WRONG


def test_coupled_acceptance_is_that_of_the_gumbel_coupling() -> None:
    """Both choose token i with probability 1 / sum_j max(p_j / p_i, q_j / q_i), in all at least (1 - TV) / (1 + TV)
    (Daliri, Musco, Suresh)."""
    target = Table(4, vocab=10)
    draft = Table(5, vocab=10, spread=0.7, like=target)
    n = 6_000
    agreed = 0
    for seed in range(n):
        sampling = replace(COUPLED, seed=seed)
        tree = drafted(draft, (), 7, sampling, TreeShape(), 1)
        agreed += len(verified(target, (), tree, 7, sampling)[0].path)
    p, q = (log_probs(model(())[None], COUPLED)[0].exp() for model in (target, draft))
    expected = sum(float(1 / torch.maximum(p / p[i], q / q[i]).sum()) for i in range(10))
    distance = total_variation(p, q)
    assert 0.1 < distance < 0.5
    assert agreed / n >= (1 - distance) / (1 + distance)
    assert within_error(agreed / n, expected, n)


# ---- rejection sampling


def first_tokens(count: int) -> tuple[Table, Table, list[tuple[int, bool]]]:
    """Target, draft, and the first token and whether it was the drafted one, for each of `count` seeds."""
    target, draft = Table(6, vocab=10), Table(7, vocab=10)
    samples = []
    for seed in range(count):
        sampling = replace(REJECTION, seed=seed)
        verdict, text = verified(
            target, (), drafted(draft, (), seed % 11, sampling, TreeShape(), 1), seed % 11, sampling
        )
        samples.append((text[0], bool(verdict.path)))
    return target, draft, samples


@pytest.fixture(scope="module")
def one_child() -> tuple[Table, Table, list[tuple[int, bool]]]:
    return first_tokens(10_000)


def sampling_error(p: np.ndarray, size: int) -> float:
    """Root mean square distance of the frequencies of `size` samples from their distribution."""
    return math.sqrt((1 - float((p**2).sum())) / size)


def distances(samples: Sequence[int], reference: np.ndarray, sizes: Sequence[int]) -> list[float]:
    """Of the frequencies among the first `size` samples from the reference, for each size."""
    return [
        float(np.linalg.norm(np.bincount(samples[:size], minlength=len(reference)) / size - reference))
        for size in sizes
    ]


def check_approach(target: Table, draft: Table, samples: list[tuple[int, bool]]) -> None:
    """The idea of vLLM's test of its rejection sampler. It compares the first distance with the last, which is mostly
    the luck of the first; here each is compared with its sampling error, which shrinks with the root of the size."""
    tokens = [token for token, _ in samples]
    sizes = [size for size in (10, 100, 1_000, 10_000) if size < len(tokens)] + [len(tokens)]
    p, q = (log_probs(model(())[None], REJECTION)[0].exp().numpy() for model in (target, draft))
    for size, distance in zip(sizes, distances(tokens, p, sizes), strict=True):
        assert distance < 2 * sampling_error(p, size)
    others = [q] + [log_probs(Table(seed, vocab=10)(())[None], REJECTION)[0].exp().numpy() for seed in range(100, 200)]
    for other in others:
        assert distances(tokens, other, sizes)[-1] > 10 * sampling_error(other, sizes[-1])


def test_the_frequencies_approach_the_target_and_no_other_distribution(one_child) -> None:
    check_approach(*one_child)


@pytest.mark.slow
def test_the_frequencies_approach_the_target_over_a_hundred_thousand_samples() -> None:
    check_approach(*first_tokens(100_000))


def test_one_child_is_accepted_as_often_as_the_distributions_overlap(one_child) -> None:
    target, draft, samples = one_child
    assert p_value([(token,) for token, _ in samples], law(target, 1, REJECTION)) > FITS
    p, q = (log_probs(model(())[None], REJECTION)[0].exp() for model in (target, draft))
    rate = sum(accepted for _, accepted in samples) / len(samples)
    assert within_error(rate, 1 - total_variation(p, q), len(samples))
    # An accepted token has the law min(p, q), a correction max(p - q, 0), each normalised.
    for accepted, weights in ((True, torch.minimum(p, q)), (False, (p - q).clamp(min=0))):
        expected = {(i,): w for i, w in enumerate((weights / weights.sum()).tolist())}
        assert p_value([(token,) for token, was in samples if was == accepted], expected) > FITS


CASES = [
    # shape, gamma, length of the texts compared, sampling, vocabulary
    ("chain", 1, 2, REJECTION, 5),
    ("chain", 2, 3, REJECTION, 3),
    ("chain", 3, 3, replace(REJECTION, temperature=0.7), 3),
    ("2", 1, 2, REJECTION, 5),
    ("3", 1, 2, replace(REJECTION, temperature=1.5, top_p=0.9), 6),
    ("2x2", 2, 2, REJECTION, 5),
    ("3x2", 2, 2, replace(REJECTION, top_k=4), 6),
]


@pytest.mark.parametrize(("shape", "gamma", "length", "sampling", "vocab"), CASES, ids=lambda value: str(value)[:9])
def test_rejection_writes_what_the_target_would(
    shape: str, gamma: int, length: int, sampling: Sampling, vocab: int
) -> None:
    """The joint law of the first tokens, whichever rounds they come from."""
    target, draft = Table(8, vocab), Table(9, vocab, spread=1.5)
    tree_shape = TreeShape.parse(shape)

    def drafter(text: Text, position: int, sampling: Sampling) -> TokenTree:
        return drafted(draft, text, position, sampling, tree_shape, gamma)

    texts = [written(target, drafter, length, 40, replace(sampling, seed=seed)) for seed in range(2_000)]
    assert p_value(texts, law(target, length, sampling)) > FITS
    assert p_value(texts, law(draft, length, sampling)) < WRONG


def test_coupled_text_is_distributed_as_the_targets() -> None:
    target = Table(10, vocab=4)
    draft = Table(11, vocab=4, like=target)

    def drafter(text: Text, position: int, sampling: Sampling) -> TokenTree:
        return drafted(draft, text, position, sampling, TreeShape((2,)), 2)

    texts = [written(target, drafter, 2, 9, replace(COUPLED, seed=seed)) for seed in range(2_000)]
    assert p_value(texts, law(target, 2, COUPLED)) > FITS


# ---- mistakes that these tests must notice


def flatter(tree: TokenTree) -> TokenTree:
    """The tree with distributions that its tokens were not drawn from: those of a draft of twice the temperature."""
    tree.distributions = {
        node: (tokens, [math.sqrt(p) for p in probabilities])
        for node, (tokens, probabilities) in tree.distributions.items()
    }
    return tree


def sorted_children(tree: TokenTree) -> TokenTree:
    """A tree of depth 1 with its children likeliest first, not in the order drawn."""
    tokens, probabilities = tree.distributions[ROOT]
    q = dict(zip(tokens, probabilities, strict=True))
    tree.token_ids.sort(key=lambda token: -q[token])
    return tree


@pytest.mark.parametrize(
    ("shape", "gamma", "spoil"),
    [("chain", 1, flatter), ("3", 1, flatter), ("2", 1, sorted_children)],
    ids=["chain", "tree", "tree-sorted"],
)
def test_a_wrong_distribution_is_noticed(shape: str, gamma: int, spoil: Callable[[TokenTree], TokenTree]) -> None:
    target, draft = Table(6, vocab=10), Table(7, vocab=10)
    tokens = []
    for seed in range(3_000):
        sampling = replace(REJECTION, seed=seed)
        tree = drafted(draft, (), 5, sampling, TreeShape.parse(shape), gamma)
        tokens.append(verified(target, (), spoil(tree), 5, sampling)[1][0])
    assert p_value([(token,) for token in tokens], law(target, 1, REJECTION)) < WRONG
    p = log_probs(target(())[None], REJECTION)[0].exp().numpy()
    assert distances(tokens, p, [3_000])[0] > 2 * sampling_error(p, 3_000)  # what the right code stays below


def correction_from_the_drafts_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(verification, "RESIDUAL", DRAFTED)


def one_number_for_all_children(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(verification, "uniform", lambda seed, purpose, position, _: uniform(seed, purpose, position, 0))


@pytest.mark.parametrize(
    ("p", "q", "children", "spoil"),
    [
        ([0.01, 0.495, 0.495], [0.6, 0.35, 0.05], 1, correction_from_the_drafts_noise),
        ([0.49, 0.19, 0.32], [0.81, 0.03, 0.16], 2, one_number_for_all_children),
    ],
    ids=["correction", "children"],
)
def test_one_number_for_two_decisions_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
    p: list[float],
    q: list[float],
    children: int,
    spoil: Callable[[pytest.MonkeyPatch], None],
) -> None:
    target, draft = Table(6, vocab=3), Table(7, vocab=3)
    target.rows[()], draft.rows[()] = torch.tensor(p).log(), torch.tensor(q).log()

    def first_tokens() -> list[Text]:
        texts = []
        for seed in range(3_000):
            sampling = replace(REJECTION, seed=seed)
            tree = drafted(draft, (), 5, sampling, TreeShape((children,)), 1)
            texts.append(verified(target, (), tree, 5, sampling)[1][:1])
        return texts

    expected = law(target, 1, REJECTION)
    assert p_value(first_tokens(), expected) > FITS
    spoil(monkeypatch)
    assert p_value(first_tokens(), expected) < WRONG
