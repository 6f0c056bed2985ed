"""Gamma chosen from what was measured: acceptance, times of draft and target, the way between them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean, median
from typing import Any, Literal

from specsplit.decoding.lookup import MatchRates
from specsplit.decoding.theory import PipelineMode, round_ms
from specsplit.decoding.tree import TreeShape
from specsplit.decoding.tree_plan import Plan, hit_probability, plans

DECAY = 0.99  # weight of a drafted round against the one after it: about 100 are remembered
PRIOR_ALPHA, PRIOR_WEIGHT = 0.7, 3.0  # as many drafted tokens as PRIOR_WEIGHT says, accepted at that rate
START, START_NODES = 4, 16  # the first gamma, and nodes of its draft at most
# What drafts from a worker have to win at least over none: what is not in the times of rounds is that it reads each
# prompt beside the target, and that two models push each other out of a processor's caches.
UNPRICED = 0.01
# After so many rounds with a draft one has none, where that is at most so many times as dear: what is not seen for long
# is not known.
ALONE_AFTER, ALONE_WITHIN = 16, 1.15
MARGIN = 0.005  # another gamma has to promise this much, so that noise does not make it wander
FIRST_DRAFTS = 8  # rounds with a draft before it may choose to have none
FIRST_PAUSE = 8  # rounds between two probes
PROBE_SHARE = 0.015  # of the time that probes may lose
REMEMBERED = 32  # times of each kind
COUNTS = "_tried", "_lasted", "_kept"  # of a controller
UNTYPICAL = 3.0  # A time of so many medians is of something else: a prompt, a pause, a neighbour.
FADE = 0.998  # weight of a kind of pass that was not seen in a round
FADED = 0.02


class _Times(deque[float]):
    """The last times of one kind."""

    typical = 0.0  # their mean, without those that are not typical; 0 without any

    def __init__(self, values: Iterable[float] = ()) -> None:
        super().__init__(values, REMEMBERED)
        if self:
            self._note()

    def append(self, value: float) -> None:
        super().append(value)
        self._note()

    def _note(self) -> None:
        most = UNTYPICAL * median(self)
        self.typical = fmean(value for value in self if value <= most)


class _Cost:
    """Milliseconds of a pass or of several: a * passes + b * tokens, neither negative.

    Least squares of the relative error over the kinds (passes, tokens) that were seen, so that a kind which is seen
    always does not push out what is known of the others. Where one was seen often, its own mean counts.
    """

    def __init__(self, rows: Iterable[Sequence[Any]] = ()) -> None:
        """rows: what iterating over another one gave."""
        # By kind: the weight that is left, and the times.
        self._seen = {(passes, tokens): (weight, _Times(times)) for passes, tokens, weight, times in rows}
        self._fit = self._fitted()
        self._priced: dict[tuple[float, float], float] = {}

    def __bool__(self) -> bool:
        return bool(self._seen)

    def __iter__(self) -> Iterator[list[Any]]:
        return iter([[*kind, weight, list(times)] for kind, (weight, times) in self._seen.items()])

    def add(self, passes: float, tokens: float, ms: float) -> None:
        kind = passes, tokens
        _, times = self._seen.get(kind, (1.0, _Times()))
        times.append(ms)
        faded = {k: (FADE * weight, seen) for k, (weight, seen) in self._seen.items()} | {kind: (1.0, times)}
        self._seen = {k: (weight, seen) for k, (weight, seen) in faded.items() if weight >= FADED}
        self._fit = self._fitted()
        self._priced.clear()

    def at(self, passes: float, tokens: float) -> float:
        if (passes, tokens) not in self._priced:
            self._priced[passes, tokens] = self._price(passes, tokens)
        return self._priced[passes, tokens]

    def _price(self, passes: float, tokens: float) -> float:
        a, b = self._fit
        fitted = a * passes + b * tokens
        weight, own = self._seen.get((passes, tokens), (0.0, _Times()))
        trust = weight * len(own) / (len(own) + 4)
        return trust * own.typical + (1 - trust) * fitted

    def _fitted(self) -> tuple[float, float]:
        xx = xz = zz = xy = zy = 0.0
        for kind, (weight, times) in self._seen.items():
            if not (ms := times.typical):
                continue
            weight, x, z = weight * len(times), kind[0] / ms, kind[1] / ms
            xx, xz, zz = xx + weight * x * x, xz + weight * x * z, zz + weight * z * z
            xy, zy = xy + weight * x, zy + weight * z
        by_passes = (xy / xx if xx else 0.0), 0.0
        by_tokens = 0.0, (zy / zz if zz else 0.0)
        determinant = xx * zz - xz * xz
        if determinant <= 1e-6 * xx * zz:  # one kind alone, or all in proportion
            return by_passes
        a, b = (xy * zz - zy * xz) / determinant, (zy * xx - xy * xz) / determinant
        return by_tokens if a < 0 else by_passes if b < 0 else (a, b)


LEARNT = _Times, _Cost, MatchRates  # attributes of a controller that iterate over what they are made of


class GammaController:
    """Chooses gamma for every round by the throughput formula of `theory`; one may serve text after text.

    limit: the largest gamma. shape: of the drafts.
    p_min: as `growth.grow` has it; above 0 it learns how deep drafts become, and an empty one has its price.
    When the target alone is faster by the formula it chooses 0, and tries a short draft again after 8 and ever more
    rounds, as long as that loses more than PROBE_SHARE, so that a change is noticed at little cost. One of the first
    rounds has no draft, and later some where drafts pay little more, so that the target alone is known.
    """

    def __init__(
        self,
        mode: PipelineMode,
        limit: int,
        *,
        fan_out: int = 8,
        shape: TreeShape | None = None,
        p_min: float = 0.0,
    ) -> None:
        self.mode: PipelineMode = mode
        self.limit = limit
        self.fan_out = fan_out
        self.shape = TreeShape() if shape is None else shape
        self._gamma = min(START, limit)
        while self._gamma > 1 and not self.shape.nodes and self.shape.size(self._gamma) > START_NODES:
            self._gamma -= 1
        self._tried: dict[int, tuple[float, float]] = {}  # by width: drafted among so many siblings, and accepted
        self._p_min = p_min
        # With p_min, by depth: drafts that went as deep as the one before and could go on, and did; and likewise what
        # was accepted. Drafts are longer where they are right, so the second is not a product with the first.
        self._lasted: dict[int, tuple[float, float]] = {}
        self._kept: dict[int, tuple[float, float]] = {}
        self._brought = self._expected = 0.0  # accepted tokens, and those that the plan promised
        self._draft, self._ahead, self._verify = _Cost(), _Cost(), _Cost()
        self._network_ms, self._target_network_ms = _Times(), _Times()  # with a draft from a worker, and without
        self._hits = self._hits_expected = 0.0
        self._idle_rounds = 0
        self._pause, self._probe = FIRST_PAUSE, 1
        self._matches = MatchRates()
        self._drafts = 0
        self._undrafted = 0  # tokens since the last draft
        self._alone: Literal["unknown", "next", "known"] = "unknown"  # the time of a round without a draft
        self._since_alone = 0  # rounds since it was measured

    def state(self) -> dict[str, Any]:
        """All that it has learnt, as JSON can hold it."""
        plain = {name: value for name, value in vars(self).items() if isinstance(value, int | float | str)}
        learnt = {name: list(value) for name, value in vars(self).items() if isinstance(value, LEARNT)}
        counts = {name: [[key, *two] for key, two in getattr(self, name).items()] for name in COUNTS}
        return {**plain, **learnt, **counts}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        for name, value in state.items():
            made = type(getattr(self, name))
            setattr(self, name, made(value) if issubclass(made, LEARNT) else value)
        for name in COUNTS:
            setattr(self, name, {key: (tried, won) for key, tried, won in state.get(name, [])})

    @property
    def alpha(self) -> float:
        """The probability that the draft's first choice is accepted, as estimated so far."""
        width = 1 if 1 in self._tried else max(self._tried, key=self._tried.__getitem__, default=1)
        return 1 - (1 - self._won(width, PRIOR_ALPHA)) ** (1 / width)

    @property
    def choice_is_for_one_round(self) -> bool:
        """Whether what `choose` gives is a trial, so that its round has to be observed before it is asked again."""
        return self._alone == "next" or (self._gamma == 0 and self._idle_rounds >= self._pause)

    def choose(self, room: int) -> int:
        """Gamma of the next round, at most `room`; 0 = do not draft."""
        if self._alone == "next" or (self._gamma == 0 and self._idle_rounds < self._pause):
            return 0
        return max(min(self._gamma or self._probe, room, self.limit), 0)

    def choose_for_match(self, agreed: int, room: int) -> int:
        """How much to draft of what followed an earlier occurrence of the text's end that agrees in so many tokens."""
        room = min(room, self.limit)
        if not self._verify:
            return min(START, room)
        network_ms = (self._target_network_ms or self._network_ms).typical
        return self._matches.gamma(agreed, [network_ms + self._verify.at(1, 1 + gamma) for gamma in range(room + 1)])

    def observe(
        self,
        *,
        gamma: int,
        drafted: int,
        accepted: int,
        verified_tokens: int,
        draft_ms: float = 0.0,
        verify_ms: float = 0.0,
        network_ms: float | None = 0.0,
        hit: bool | None = None,
        first: bool = False,
        ranks: Sequence[tuple[int, int]] | None = None,
        agreed: int = 0,
    ) -> None:
        """Learn from a round.

        gamma: what was asked for. drafted: depth of the draft; accepted: of these; verified_tokens: nodes + 1.
        draft_ms, verify_ms: of the models alone; network_ms: what else the round waited; None: not known.
        hit: whether the draft had been made ahead; None when that was not tried. first: a round in which a worker read
        a prompt or a whole text, whose times are not typical. ranks: as `tree_plan.ranks`; needed of dynamic trees.
        agreed: where the draft is what followed an earlier occurrence of the text's end, in how many tokens they agree.
        """
        self._matches.observe(agreed, drafted, accepted)
        if agreed:
            gamma, drafted, hit = 0, 0, None  # to the model a round without a draft
        ended = bool(self._p_min) and drafted < gamma  # after a pass which found nothing probable enough
        asked = drafted > 0 or ended
        plan = self._plans()[min(gamma if self.shape.nodes else drafted + ended, self.limit)]
        surprise = accepted == drafted and accepted >= 2 * (self._tokens(min(drafted, self.limit)) - 1)
        self._drafts += asked
        if self._p_min and asked:
            for counts, reached in ((self._lasted, drafted), (self._kept, accepted)):
                for depth, (tried, on) in counts.items():
                    counts[depth] = DECAY * tried, DECAY * on
                for depth in range(1, min(reached + 1, max(gamma, drafted)) + 1):
                    tried, on = counts.get(depth, (0.0, 0.0))
                    counts[depth] = tried + 1, on + (depth <= reached)
        if drafted or (asked and self.shape.nodes):
            self._accept(drafted, accepted, plan, ranks)
        if hit is not None and self.mode != "sync":
            self._hits = DECAY * self._hits + hit
            self._hits_expected = DECAY * self._hits_expected + self._hit_by_formula(min(max(gamma, 1), self.limit))
        if not first and verify_ms:
            self._verify.add(1, verified_tokens, verify_ms)
            alone = verified_tokens == 1 and not ended
            self._since_alone = 0 if alone else self._since_alone + 1
            if self._alone != "known":
                self._alone = "known" if alone else "next"
        if not first and asked and draft_ms:
            if hit:
                self._ahead.add(*self._ahead_work(plan), draft_ms)
            else:  # it read what was written meanwhile as well
                self._draft.add(plan.passes, plan.fed + self._undrafted, draft_ms)
        if not first and not hit and network_ms is not None:
            (self._network_ms if asked else self._target_network_ms).append(network_ms)
        self._undrafted = 0 if asked else self._undrafted + accepted + 1
        probed = self._gamma == 0 and asked
        if probed and drafted and surprise:
            self._pause = FIRST_PAUSE // 2  # doubled where it does not pay yet
        self._decide(probed=probed)

    def _accept(self, drafted: int, accepted: int, plan: Plan, ranks: Sequence[tuple[int, int]] | None) -> None:
        self._brought = DECAY * self._brought + accepted
        self._expected = DECAY * self._expected + plan.tokens - 1
        self._tried = {width: (DECAY * tried, DECAY * won) for width, (tried, won) in self._tried.items()}
        if ranks is None and self.shape.nodes:
            return
        if ranks is None:
            looked = accepted + (accepted < drafted)
            seen = [(accepted <= depth, self.shape.children(depth)) for depth in range(looked)]
        else:  # a rank tells of every smaller width as well
            seen = [(rank >= width, width) for rank, among in ranks for width in range(1, among + 1)]
        for missed, width in seen:
            tried, won = self._tried.get(width, (0.0, 0.0))
            self._tried[width] = tried + 1, won + (not missed)

    def _decide(self, *, probed: bool) -> None:
        if self._gamma == 0 and not probed:
            self._idle_rounds += 1
            return
        if not (self._draft or self._ahead) or not self._verify:
            return
        costs = self._costs()
        costs[0] *= 1 - UNPRICED
        best = min(range(self._drafts < FIRST_DRAFTS, len(costs)), key=costs.__getitem__)
        if best and costs[best] > (1 - MARGIN) * costs[self._gamma]:
            best = self._gamma
        if best == 0:
            self._idle_rounds = 0
            self._plan_probe(again=probed)
        elif self._since_alone >= ALONE_AFTER and costs[0] < ALONE_WITHIN * costs[best]:
            self._alone = "next"
        self._gamma = best

    def _costs(self) -> list[float]:
        """Milliseconds a token of each gamma; without those beyond three that were dearer each time, and the present
        one."""
        costs: list[float] = []
        for gamma in range(self.limit + 1):
            costs.append(self._tpot(gamma))
            last = costs[-4:]
            if gamma > max(self._gamma, 4) and last == sorted(last):
                break
        return costs

    def _plan_probe(self, *, again: bool) -> None:
        """The next probe: how deep, and after how many rounds. The more it loses, the later."""
        self._probe = min(range(1, self.limit + 1), key=self._tpot)
        lost = self._round_ms(self._probe) / self._round_ms(0) - self._tokens(self._probe)  # rounds of the target
        longest = max(FIRST_PAUSE, int(lost / PROBE_SHARE))
        self._pause = min(2 * self._pause if again else int(FIRST_PAUSE * max(1.0, lost) ** 2), longest)

    def _tpot(self, gamma: int) -> float:
        return self._round_ms(gamma) / self._tokens(gamma)

    def _round_ms(self, gamma: int) -> float:
        plans, asking, alone = self._plans(), self._network_ms, self._target_network_ms
        if gamma == 0:
            return self._verify.at(1, 1) + (alone or asking).typical
        network_ms = (asking or alone).typical
        verify_ms = draft_ms = ahead_ms = 0.0
        for share, depth in self._depths(gamma):
            plan = plans[min(depth + 1, gamma)]  # of the passes
            verify_ms += share * self._verify.at(1, plans[depth].verified)
            draft_ms += share * (self._draft or self._ahead).at(plan.passes, plan.fed) / gamma
            ahead_ms += share * (self._ahead or self._draft).at(*self._ahead_work(plan)) / (gamma + 1)
        return round_ms(self.mode, gamma, draft_ms, verify_ms, network_ms, self._hit(gamma), ahead_ms=ahead_ms)

    def _tokens(self, gamma: int) -> float:
        """Expected of a round: by what each width brings; of dynamic shapes by the plan and what came so far."""
        if self.shape.nodes:
            return 1 + (self._plans()[gamma].tokens - 1) * (self._brought + 10) / (self._expected + 10)
        alpha, tokens, reached = self.alpha, 1.0, 1.0
        won = [self._won(self.shape.children(depth), alpha) for depth in range(gamma)]
        for share in _going_on(self._kept, gamma, won[0]) if self._p_min and gamma else won:
            reached *= share
            tokens += reached
        return tokens

    def _depths(self, gamma: int) -> Iterator[tuple[float, int]]:
        """How often a draft of which `gamma` is asked becomes so deep."""
        reached = 1.0
        shares = _going_on(self._lasted, gamma, 1.0) if self._p_min and not self.shape.nodes else ()
        for depth, share in enumerate(shares):
            yield reached * (1 - share), depth
            reached *= share
        yield reached, gamma

    def _won(self, width: int, alpha: float) -> float:
        """How often the target's token is among the draft's first `width`, which `alpha` gives a first idea of."""
        tried, won = self._tried.get(width, (0.0, 0.0))
        return (won + (1 - (1 - alpha) ** width) * PRIOR_WEIGHT) / (tried + PRIOR_WEIGHT)

    def _ahead_work(self, plan: Plan) -> tuple[int, int]:
        """Passes and tokens of drafting ahead: the leaves of the draft, then a draft for each outcome."""
        outcomes = 1 if self.mode == "overlap" else self.fan_out
        return plan.passes + 1, plan.leaves + outcomes * plan.fed

    def _hit(self, gamma: int) -> float:
        """The formula's hit probability, corrected by how it did so far."""
        correction = (self._hits + 2) / (self._hits_expected + 2)
        return min(1.0, self._hit_by_formula(gamma) * correction)

    def _hit_by_formula(self, gamma: int) -> float:
        return hit_probability(self.mode, self.alpha, gamma, self._plans()[gamma])

    def _plans(self) -> tuple[Plan, ...]:
        # The plans of an alpha are remembered, so it is rounded; they take long to make.
        return plans(self.shape, round(self.alpha, 2), self.limit, self.fan_out)


def _going_on(counts: Mapping[int, tuple[float, float]], gamma: int, first: float) -> Iterator[float]:
    """The shares of counts by depth, 1 to `gamma`; as far as little was seen, that of the depth before. first: of 1."""
    share = first
    for depth in range(1, gamma + 1):
        tried, on = counts.get(depth, (0.0, 0.0))
        share = (on + share * PRIOR_WEIGHT) / (tried + PRIOR_WEIGHT)
        yield share
