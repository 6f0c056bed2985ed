"""Round after round of draft and verification with simulated models, which show a cache that holds something else."""

from __future__ import annotations

import itertools
import random

import pytest

from specsplit.decoding.growth import DraftSettings
from specsplit.decoding.sampling import Sampling
from specsplit.decoding.tree import TokenTree, TreeShape
from specsplit.engines.synthetic import SyntheticLM
from specsplit.models.vocabulary import Vocabulary
from specsplit.worker.draft import Drafter
from specsplit.worker.sessions import Session
from specsplit.worker.target_service import verify_tree

DRAFT, TARGET = SyntheticLM(acceptance=0.8, seed=1), SyntheticLM(seed=1)
VOCABULARY = Vocabulary(TARGET.vocab_size)
LENGTH = 300
SHAPES = [TreeShape.parse(shape) for shape in ("chain", "3x2", "dynamic-12x3")]


def alone(prompt: list[int], sampling: Sampling) -> list[int]:
    session, text = Session(TARGET.new_cache(1024)), list(prompt)
    while len(text) < LENGTH:
        length = len(session.tokens)
        text.append(verify_tree(TARGET, session, text, length, TokenTree(), sampling).next_token)
    return text


class Drafting:
    """Both engines on one text; counts its rounds and drafted and accepted tokens."""

    def __init__(self) -> None:
        self.rounds = self.drafted = self.accepted = self.used_ahead = 0

    def write(self, prompt: list[int], sampling: Sampling, chance: random.Random) -> list[int]:
        """A text; every round has a gamma and a shape of its own, and may draft ahead."""
        ours, theirs = Session(DRAFT.new_cache(2048)), Session(TARGET.new_cache(2048))
        text = list(prompt)
        while len(text) < LENGTH:
            gamma = chance.randint(1, 6)
            settings = DraftSettings(gamma, chance.choice(SHAPES), sampling)
            drafter = Drafter(DRAFT, VOCABULARY, ours, text, settings)
            tree = drafter.draft()
            ahead = drafter.ahead(tree, 3, 4) if chance.random() < 0.3 else []
            verdict = verify_tree(TARGET, theirs, text, min(len(text), len(theirs.tokens)), tree, sampling)
            accepted = [tree.token_ids[node] for node in verdict.path]
            self.used_ahead += any((o.accepted_tokens, o.next_token) == (accepted, verdict.next_token) for o in ahead)
            text += [*accepted, verdict.next_token]
            self.rounds += 1
            self.drafted += tree.depth()
            self.accepted += len(accepted)
        return text[:LENGTH]


def check_rounds(count: int) -> None:
    drafting, chance = Drafting(), random.Random(0)
    for number in itertools.count():
        prompt = [65 + number % 26, 66, 67 + number // 26 % 26]
        sampling = Sampling(temperature=chance.choice([0.0, 1.0]), seed=number)
        assert drafting.write(prompt, sampling, chance) == alone(prompt, sampling), number
        if drafting.rounds >= count:
            break
    # Each happened often: acceptance, rejection, an outcome that was foreseen, and one that was not.
    assert 0.3 < drafting.accepted / drafting.drafted < 0.9
    assert 0.05 < drafting.used_ahead / drafting.rounds < 0.29


def test_every_text_is_the_targets_own() -> None:
    check_rounds(1_000)


@pytest.mark.slow
def test_every_text_is_the_targets_own_over_a_hundred_thousand_rounds() -> None:
    check_rounds(100_000)
