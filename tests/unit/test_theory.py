"""The throughput formulas, against closed cases, a simulation of rounds, and the known table."""

from __future__ import annotations

import random

import pytest

from specsplit.decoding.theory import (
    best_gamma,
    expected_tokens,
    fan_out_per_depth,
    hit_probability,
    lookahead_round_ms,
    mode_hit_probability,
    round_ms,
    tpot_ms,
)


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
    assert whole == pytest.approx(mode_hit_probability("overlap", alpha, gamma), abs=0.01)
    for fan_out in (1, 4, 8, 20):
        # The candidates that the fan-out spends at each depth are its likeliest, rank 1 being drafted already.
        spent = fan_out_per_depth(alpha, gamma, fan_out)
        assert sum(spent) == fan_out
        hits = sum(r - (a < gamma) <= spent[a] for a, r in outcomes) / n
        assert hits == pytest.approx(hit_probability(alpha, gamma, fan_out), abs=0.01)


@pytest.mark.parametrize(
    ("rtt", "sync", "overlap", "lookahead"), [(0, 12.1, 11.1, 7.2), (14, 15.6, 14.7, 8.9), (50, 24.0, 23.3, 17.8)]
)
def test_the_worked_example(rtt, sync, overlap, lookahead):
    """alpha .8, 3 ms a drafted token, 30 ms a verification, best gamma, lookahead hits 9 of 10."""
    for mode, expected, hit in (("sync", sync, None), ("overlap", overlap, None), ("lookahead", lookahead, 0.9)):
        gamma = best_gamma(mode, 0.8, 3, 30, rtt, 20, hit=hit, plain=True)
        assert tpot_ms(mode, gamma, 0.8, 3, 30, rtt, hit=hit, plain=True) == pytest.approx(expected, abs=0.06)


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
    assert now / rounds == pytest.approx(lookahead_round_ms(gamma, draft, verify, rtt, hit), rel=0.02)


def test_best_gamma_is_the_best():
    for mode in ("sync", "overlap", "lookahead"):
        for alpha in (0.3, 0.8, 0.97):
            costs = [tpot_ms(mode, g, alpha, 3, lambda n: 25 + n, 14) for g in range(17)]
            assert best_gamma(mode, alpha, 3, lambda n: 25 + n, 14) == costs.index(min(costs))
    assert best_gamma("sync", 0.5, 40, 30) == 0  # a draft as slow as the target


def test_impossible_arguments_are_refused():
    for bad in (lambda: expected_tokens(1.5, 3), lambda: expected_tokens(0.5, -1), lambda: round_ms("fast", 1, 1, 1)):
        with pytest.raises(ValueError, match=r"alpha|gamma|mode"):
            bad()
