"""One gamma for all texts that share a target, by what the target writes in all.

A text alone can price a draft by its own times (`adaptive`). Where texts share the passes of a target, a token drafted
for one costs all of them time, and how long they wait for each other depends on what all of them do. So the target
measures instead: with each gamma for a while, how many rounds it ends in a second, and how many tokens a round brings.
docs/gamma.md explains it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

GAMMAS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
FIRST = (2, 0, 4)  # tried before their neighbours
SETTLING, MEASURED = 3, 10  # rounds of each text: that pass after a change, and that are measured then
HOPELESS_AFTER, HOPELESS = 3, 0.85  # a trial ends after so many rounds of each text, when it is as bad as that
CLOSE, SURE = 0.93, 4  # how often those are measured that come so near to the best
BETTER = 1.01  # another gamma has to be better by so much
HOLD, LONGEST_HOLD = 32, 256  # measurements of the best one between two of others
TRIAL_SHARE = 0.01  # of the time that trials may lose
OLD = 0.75  # weight of what was measured before against a new measurement
DECAY = 0.998  # weight of a round's acceptance against the one after it


@dataclass
class _Load:
    """What is known at about so many texts. speeds: rounds a second with each gamma; tried: how often."""

    speeds: dict[int, float] = field(default_factory=dict)
    tried: Counter[int] = field(default_factory=Counter)
    best: int = FIRST[0]
    held: int = 0  # measurements of the best one since the last trial
    hold: float = HOLD


class SharedGamma:
    """Told of every round that a target ends; says which gamma all of its texts should have next.

    It tries 2, 0 and 4, then the neighbours of the best, those near the best again, and then keeps to the best and
    ever more seldom tries the neighbour or 0 that was tried least. The score of a gamma is rounds a second times
    1 + sum over i <= gamma of P(i drafted tokens accepted), the latter from all rounds that drafted so deep.

    gamma: None while there are fewer than two texts. Not for several threads at once.
    """

    def __init__(self) -> None:
        self.gamma: int | None = None
        self._loads: dict[int, _Load] = {}
        self._load = _Load()
        self._reached: dict[int, tuple[float, float]] = {}  # by depth: rounds that drafted it; and accepted so far
        self._turn_s = 0.0  # since when it is the turn of this gamma
        self._begin(0.0)

    def _begin(self, now_s: float, *, settled: bool = False) -> None:
        self._began_s, self._settled = now_s, settled
        self._rounds = self._followed = 0

    def observe(self, now_s: float, texts: int, drafted: int, accepted: int) -> None:
        """A round has ended. texts: that the target holds now. drafted: depth asked of its draft; accepted: of it."""
        for depth in range(1, drafted + 1):
            tried, won = self._reached.get(depth, (1.0, 0.5))
            self._reached[depth] = DECAY * tried + 1, DECAY * won + (accepted >= depth)
        if texts < 2:
            self.gamma = None
            return
        load = self._loads.setdefault(round(2 * math.log2(texts)), _Load())
        if self.gamma is None or load is not self._load:
            self._load, self.gamma, self._turn_s = load, load.best, now_s
            self._begin(now_s)
            return
        self._rounds += 1
        self._followed += drafted == self.gamma
        if not self._settled and self._rounds >= SETTLING * texts:
            self._begin(now_s, settled=True)
        elif self._settled and self._rounds >= HOPELESS_AFTER * texts and now_s > self._began_s:
            speed = self._rounds / (now_s - self._began_s)
            best = self._score(load.best) if load.speeds else 0.0
            if self._rounds >= MEASURED * texts or speed * self._tokens(self.gamma) < HOPELESS * best:
                if 2 * self._followed > self._rounds:  # others may have a gamma of their own
                    self._measured(speed, now_s, texts)
                self._begin(now_s)

    def _measured(self, speed: float, now_s: float, texts: int) -> None:
        load, gamma = self._load, self.gamma
        assert gamma is not None
        load.tried[gamma] += 1
        new = max(1 - OLD, 1 / load.tried[gamma])
        load.speeds[gamma] = (1 - new) * load.speeds.get(gamma, speed) + new * speed
        if gamma == load.best:
            load.held += 1
        else:  # It has settled as well, and the draft had to read what was written without it.
            took_s, rounds = now_s - self._turn_s, (SETTLING + MEASURED) * texts
            lost = 1 - rounds * self._tokens(gamma) / self._score(load.best) / took_s if load.best in load.speeds else 0
            load.hold = max(min(2 * load.hold, LONGEST_HOLD), lost / TRIAL_SHARE * took_s / (rounds / speed))
        best = max(load.speeds, key=self._score)
        if load.best not in load.speeds or self._score(best) > BETTER * self._score(load.best):
            load.best, load.held, load.hold = best, 0, HOLD
        self.gamma, self._turn_s = self._next(), now_s

    def _next(self) -> int:
        load = self._load
        beside = [*GAMMAS[max(GAMMAS.index(load.best) - 1, 0) : GAMMAS.index(load.best) + 2]]
        for gamma in (*FIRST, *beside):
            if gamma not in load.speeds:
                return gamma
        close = [gamma for gamma in load.speeds if self._score(gamma) > CLOSE * self._score(load.best)]
        least = min(close, key=lambda gamma: load.tried[gamma])
        if len(close) > 1 and load.tried[least] < SURE:
            return least
        if load.held < load.hold:
            return load.best
        load.held = 0
        return min({0, *beside} - {load.best}, key=lambda gamma: load.tried[gamma])

    def _tokens(self, gamma: int) -> float:
        reached = (self._reached.get(depth, (1.0, 0.0)) for depth in range(1, gamma + 1))
        return 1 + sum(won / tried for tried, won in reached)

    def _score(self, gamma: int) -> float:
        """Tokens a second, of all texts together."""
        return self._load.speeds[gamma] * self._tokens(gamma)
