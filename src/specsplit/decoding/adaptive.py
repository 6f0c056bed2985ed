"""Gamma chosen from what was measured: acceptance, times of draft and target, the way between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specsplit.decoding.theory import PipelineMode, mode_hit_probability, tpot_ms

DECAY = 0.985  # weight of a round against the one after it: about 67 rounds are remembered
PRIOR_ALPHA, PRIOR_WEIGHT = 0.7, 3.0  # as many drafted tokens as PRIOR_WEIGHT says, accepted at that rate
START = 4
MARGIN = 0.01  # another gamma has to promise this much, so that noise does not make it wander
PROBE_GAMMA = 2
FIRST_PAUSE, LONGEST_PAUSE = 8, 64


class _Mean:
    """An exponentially weighted mean; None until something was added."""

    def __init__(self) -> None:
        self.total = self.weight = 0.0

    def add(self, value: float) -> None:
        self.total = DECAY * self.total + value
        self.weight = DECAY * self.weight + 1.0

    @property
    def value(self) -> float | None:
        return self.total / self.weight if self.weight else None


class _Line:
    """y = a + b x by exponentially weighted least squares, b >= 0; a horizontal line while x does not vary."""

    def __init__(self) -> None:
        self.n = self.x = self.y = self.xx = self.xy = 0.0

    def add(self, x: float, y: float) -> None:
        for name, value in (("n", 1.0), ("x", x), ("y", y), ("xx", x * x), ("xy", x * y)):
            setattr(self, name, DECAY * getattr(self, name) + value)

    def at(self, x: float) -> float | None:
        if not self.n:
            return None
        mean_x, mean_y = self.x / self.n, self.y / self.n
        spread = self.xx / self.n - mean_x**2
        slope = max(0.0, (self.xy / self.n - mean_x * mean_y) / spread) if spread > 0.25 else 0.0
        return max(0.0, mean_y + slope * (x - mean_x))


class GammaController:
    """Chooses gamma for every round by the throughput formula of `theory`; one may serve text after text.

    limit: the largest gamma. When the target alone is faster by the formula it chooses 0, and tries a short draft again
    after 8, 16, 32, then every 64 rounds, so that a change is noticed at little cost.
    """

    def __init__(self, mode: PipelineMode, limit: int, *, fan_out: int = 8) -> None:
        self.mode: PipelineMode = mode
        self.limit = limit
        self.fan_out = fan_out
        self._gamma = min(START, limit)
        self._accepted = self._tried = 0.0
        self._draft_ms, self._ahead_ms, self._network_ms = _Mean(), _Mean(), _Mean()
        self._verify_ms = _Line()
        self._hits = self._hits_expected = 0.0
        self._idle_rounds = 0
        self._pause = FIRST_PAUSE
        self._undrafted = 0  # rounds since the last draft

    def state(self) -> dict[str, Any]:
        """All that it has learnt, as JSON can hold it."""
        return {name: dict(vars(v)) if isinstance(v, _Mean | _Line) else v for name, v in vars(self).items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        for name, value in state.items():
            if isinstance(value, Mapping):
                vars(getattr(self, name)).update(value)
            else:
                setattr(self, name, value)

    @property
    def alpha(self) -> float:
        """The probability that a drafted token is accepted, as estimated so far."""
        return (self._accepted + PRIOR_ALPHA * PRIOR_WEIGHT) / (self._tried + PRIOR_WEIGHT)

    def choose(self, room: int) -> int:
        """Gamma of the next round, at most `room`; 0 = do not draft."""
        limit = min(room, self.limit)
        if limit < 1:
            return 0
        if self._gamma == 0:
            if self._idle_rounds < self._pause:
                return 0
            return min(PROBE_GAMMA, limit)
        return min(self._gamma, limit)

    def observe(
        self,
        *,
        gamma: int,
        drafted: int,
        accepted: int,
        verified_tokens: int,
        draft_ms: float = 0.0,
        verify_ms: float = 0.0,
        network_ms: float = 0.0,
        hit: bool | None = None,
        first: bool = False,
    ) -> None:
        """Learn from a round.

        gamma: what was asked for. drafted: depth of the draft; accepted: of these; verified_tokens: nodes + 1.
        draft_ms, verify_ms: of the models alone; network_ms: what else the round waited.
        hit: whether the draft had been made ahead; None when that was not tried. first: the round of the prompt, whose
        times are not typical.
        """
        if drafted:
            self._accepted = DECAY * self._accepted + accepted
            self._tried = DECAY * self._tried + accepted + (accepted < drafted)
        if hit is not None and self.mode != "sync":
            self._hits = DECAY * self._hits + hit
            self._hits_expected = DECAY * self._hits_expected + self._hit_by_formula(max(gamma, 1))
        if not first:
            if verify_ms:
                self._verify_ms.add(verified_tokens, verify_ms)
            if drafted and draft_ms and hit:
                self._ahead_ms.add(draft_ms / (drafted + 1))
            elif drafted and draft_ms and not self._undrafted:  # else it read what was written meanwhile as well
                self._draft_ms.add(draft_ms / drafted)
            if not hit:
                self._network_ms.add(network_ms)
        self._undrafted = 0 if drafted else self._undrafted + 1
        self._decide(probed=self._gamma == 0 and drafted > 0)

    def _decide(self, *, probed: bool) -> None:
        draft_ms = self._draft_ms.value or self._ahead_ms.value
        verify_ms = self._verify_ms.at(1)
        if self._gamma == 0 and not probed:
            self._idle_rounds += 1
            return
        if draft_ms is None or verify_ms is None:
            return
        costs = [self._tpot(gamma, draft_ms) for gamma in range(self.limit + 1)]
        best = min(range(len(costs)), key=costs.__getitem__)
        if best and costs[best] > (1 - MARGIN) * costs[self._gamma]:
            best = self._gamma
        if best == 0:
            self._pause = min(2 * self._pause, LONGEST_PAUSE) if probed else FIRST_PAUSE
            self._idle_rounds = 0
        self._gamma = best

    def _tpot(self, gamma: int, draft_ms: float) -> float:
        return tpot_ms(
            self.mode,
            gamma,
            self._rounded_alpha(),
            draft_ms,
            lambda tokens: self._verify_ms.at(tokens) or 0.0,
            self._network_ms.value or 0.0,
            self.fan_out,
            hit=self._hit(gamma),
            ahead_ms=self._ahead_ms.value,
        )

    def _hit(self, gamma: int) -> float:
        """The formula's hit probability, corrected by how it did so far."""
        if self.mode == "sync" or gamma == 0:
            return 0.0
        correction = (self._hits + 2) / (self._hits_expected + 2)
        return min(1.0, self._hit_by_formula(gamma) * correction)

    def _hit_by_formula(self, gamma: int) -> float:
        return mode_hit_probability(self.mode, self._rounded_alpha(), gamma, self.fan_out)

    def _rounded_alpha(self) -> float:
        return round(self.alpha, 2)  # the outcomes of an alpha are remembered; they take long to list
