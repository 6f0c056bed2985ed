"""Gamma chosen while writing: it finds the best one, stops when drafting loses, and goes on when it pays again."""

from __future__ import annotations

import random

import pytest

from specsplit.decoding.adaptive import GammaController
from specsplit.decoding.theory import best_gamma, mode_hit_probability, round_ms, tpot_ms


def drive(
    controller: GammaController,
    mode: str,
    alpha: float,
    draft_ms: float,
    verify_ms: float,
    rtt_ms: float,
    rounds: int,
    seed: int = 0,
) -> tuple[float, list[int]]:
    """Rounds by the model of `theory`, with noise on the times; ms per token, and the gammas chosen."""
    chance = random.Random(seed)
    total, tokens, gammas = 0.0, 0, []
    for number in range(rounds):
        gamma = controller.choose(64)
        accepted = 0
        while accepted < gamma and chance.random() < alpha:
            accepted += 1
        p = mode_hit_probability(mode, alpha, gamma) if gamma else 0.0
        hit = None if mode == "sync" or not gamma else chance.random() < p
        noise = [chance.uniform(0.97, 1.06) for _ in range(3)]
        controller.observe(
            gamma=gamma,
            drafted=gamma,
            accepted=accepted,
            verified_tokens=gamma + 1,
            draft_ms=(gamma + bool(hit)) * draft_ms * noise[0],
            verify_ms=verify_ms * noise[1],
            network_ms=0.0 if hit else rtt_ms * noise[2],
            hit=hit,
            first=number == 0,
        )
        total += round_ms(mode, gamma, draft_ms, verify_ms, rtt_ms, float(bool(hit)))
        tokens += accepted + 1
        gammas.append(gamma)
    return total / tokens, gammas


@pytest.mark.parametrize("rtt_ms", [0.0, 14.0, 50.0])
@pytest.mark.parametrize("mode", ["sync", "overlap", "lookahead"])
@pytest.mark.parametrize(("alpha", "draft_ms"), [(0.8, 3.0), (0.6, 2.0), (0.95, 5.0)])
def test_it_settles_near_the_best(mode, alpha, draft_ms, rtt_ms):
    controller = GammaController(mode, 16)
    drive(controller, mode, alpha, draft_ms, 30.0, rtt_ms, 60)
    _, gammas = drive(controller, mode, alpha, draft_ms, 30.0, rtt_ms, 400, seed=1)

    def cost(gamma: int) -> float:
        return tpot_ms(mode, gamma, alpha, draft_ms, 30.0, rtt_ms)

    best = cost(best_gamma(mode, alpha, draft_ms, 30.0, rtt_ms))
    # A high acceptance is hard to tell from a higher one, so there it may be a little further off.
    assert sum(cost(gamma) for gamma in gammas) / len(gammas) < (1.05 if alpha < 0.9 else 1.08) * best


def test_it_stops_drafting_when_that_loses_and_loses_little():
    controller = GammaController("sync", 16)
    drive(controller, "sync", 0.3, 30.0, 30.0, 0.0, 30)
    tpot, gammas = drive(controller, "sync", 0.3, 30.0, 30.0, 0.0, 600)
    assert tpot < 1.05 * 30.0
    tried = [i for i, gamma in enumerate(gammas) if gamma]
    assert 4 <= len(tried) <= 40  # it looks again, ever more seldom
    assert max(gammas) <= 2 or max(gammas[30:]) <= 2


def test_it_goes_on_when_acceptance_rises():
    controller = GammaController("sync", 16)
    drive(controller, "sync", 0.05, 10.0, 30.0, 0.0, 300)
    assert controller.choose(64) in (0, 2)
    _, gammas = drive(controller, "sync", 0.95, 10.0, 30.0, 0.0, 1500, seed=3)
    assert min(gammas[-50:]) >= 2


def test_it_keeps_to_the_room_and_the_limit():
    controller = GammaController("lookahead", 6)
    assert [controller.choose(room) for room in (0, 1, 2, 99)] == [0, 1, 2, 4]
    _, gammas = drive(controller, "lookahead", 0.99, 0.5, 30.0, 50.0, 100)
    assert max(gammas) == 6
    assert GammaController("sync", 0).choose(10) == 0


def test_rounds_without_times_teach_acceptance_alone():
    controller = GammaController("sync", 8)
    before = controller.alpha
    for _ in range(20):
        controller.observe(gamma=4, drafted=4, accepted=4, verified_tokens=5)
    assert controller.alpha > before
    assert controller.choose(8) == 4  # nothing is known of the times yet
