"""The throughput formulas, against closed cases, a simulation of rounds, and the known table."""

from __future__ import annotations

import random

import pytest

from specsplit.decoding.theory import expected_tokens, round_ms
from specsplit.decoding.tree import TreeShape
from specsplit.decoding.tree_plan import hit_probability, plans, tpot_ms


@pytest.mark.parametrize(
    ("alpha", "gamma", "tokens"), [(0.0, 5, 1.0), (1.0, 5, 6.0), (0.8, 0, 1.0), (0.5, 1, 1.5), (0.8, 2, 2.44)]
)
def test_expected_tokens(alpha, gamma, tokens):
    assert expected_tokens(alpha, gamma) == pytest.approx(tokens)
    if alpha < 1:
        assert expected_tokens(alpha, gamma) == pytest.approx((1 - alpha ** (gamma + 1)) / (1 - alpha))


def simulate(alpha: float, gamma: int, rounds: int, seed: int = 0) -> list[tuple[int, int]]:
    """(tokens accepted, rank of the target's own token among the draft's candidates) of each round."""
    chance = random.Random(seed)

    def rank() -> int:
        r = 1
        while chance.random() > alpha:
            r += 1
        return r

    outcomes = []
    for _ in range(rounds):
        accepted = 0
        while (r := rank()) == 1 and accepted < gamma:
            accepted += 1
        outcomes.append((accepted, r))
    return outcomes


@pytest.mark.parametrize(("alpha", "gamma"), [(0.8, 4), (0.5, 3), (0.95, 8)])
def test_formulas_against_simulated_rounds(alpha, gamma):
    n = 40_000
    outcomes = simulate(alpha, gamma, n)
    assert sum(a + 1 for a, _ in outcomes) / n == pytest.approx(expected_tokens(alpha, gamma), rel=0.02)
    whole = sum(a == gamma and r == 1 for a, r in outcomes) / n
    plan = plans(TreeShape(), alpha, gamma, 8)[gamma]
    assert whole == pytest.approx(hit_probability("overlap", alpha, gamma, plan), abs=0.01)
    # What the fan-out is spent on: the likeliest outcomes, rank 1 being drafted already.
    ranked = sorted(
        (-(alpha ** (accepted + 1)) * (1 - alpha) ** (rank - 1), accepted, rank)
        for accepted in range(gamma + 1)
        for rank in range(2 if accepted < gamma else 1, 30)
    )
    for fan_out in (1, 4, 8, 20):
        likeliest = {(accepted, rank) for _, accepted, rank in ranked[:fan_out]}
        hits = sum(outcome in likeliest for outcome in outcomes) / n
        assert hits == pytest.approx(plans(TreeShape(), alpha, gamma, fan_out)[gamma].hit, abs=0.01)


@pytest.mark.parametrize(("rtt", "sync", "overlap"), [(0, 12.1, 11.1), (14, 15.6, 14.7), (50, 24.0, 23.3)])
def test_the_worked_example(rtt, sync, overlap):
    """alpha .8, 3 ms a drafted token, 30 ms a verification, best gamma."""
    for mode, expected in (("sync", sync), ("overlap", overlap)):
        assert min(tpot_ms(mode, gamma, 0.8, 3, 30, rtt) for gamma in range(21)) == pytest.approx(expected, abs=0.06)
    assert tpot_ms("sync", 1, 0.5, 40, 30) > tpot_ms("sync", 0, 0.5, 40, 30)  # a draft as slow as the target


@pytest.mark.parametrize("hit", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize(("gamma", "rtt"), [(3, 0), (5, 14), (8, 50), (9, 14)])
def test_lookahead_rounds_against_simulated_ones(hit, gamma, rtt):
    """Verdicts and drafts as they are sent: drafts for the next outcome leave when the last verdict has come."""
    chance, draft, verify = random.Random(1), 3.0, 30.0
    x = rtt + (gamma + 1) * draft  # from a verdict to the arrival of the drafts for the verdict after it
    now, earlier, begun, rounds = 0.0, None, 0.0, 20_000
    for _ in range(rounds):
        if chance.random() < hit:
            # After a miss the drafts ahead were asked for when the draft was sent.
            ready = begun + (gamma + 1) * draft if earlier is None else earlier + x
            earlier, now = now, max(now, ready) + verify
        else:
            begun = now + rtt + gamma * draft
            earlier, now = None, begun + verify
    assert now / rounds == pytest.approx(round_ms("lookahead", gamma, draft, verify, rtt, hit), rel=0.02)
