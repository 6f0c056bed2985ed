"""Intervals for ratios, means and rates over prompts, and comparisons that allow for having picked the best.

A prompt is the unit: prompts are independent of each other, rounds of one text are not. No interval is given below
MIN_PROMPTS prompts, and no quantile that fewer than one value is expected to exceed.

- Ratios and means of positive numbers: Student's t on the logarithm, with the jackknife's standard error. Prompts of
  unequal weight count as fewer (Kish's effective number), which lowers the degrees of freedom.
- Rates: Wilson's interval at an effective number of trials (Korn and Graubard 1998; Franco et al. 2019). How alike the
  trials of a prompt are, the jackknife tells where prompts show failures. Where few do, that is drawn towards LIKENESS,
  with which a prompt counts as two trials: so does one of a rate without any failure. How fast that goes is chosen by
  simulation, as is LIKENESS: the least that covers near 0 and 1 whatever the prompts have in common.
- Several configurations: the maximum of the t statistics over all comparisons of a family (Hothorn, Bretz and
  Westfall 2008), its distribution simulated from normal samples with the correlations of the data.

tests/unit/test_statistics.py checks coverage and false claims against simulations with a known truth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from specsplit.errors import UserError

MIN_PROMPTS = 6  # an interval of fewer says little but that nothing is known
LIKENESS = 0.5  # of the variance of prompts whose trials are all alike, the share that is assumed where none is seen
_UNKNOWN = (math.nan, math.nan)
_CHUNK = 1 << 21  # normal draws at a time: 16 MB

Numbers = NDArray[np.float64]


def mean_ci(values: ArrayLike, *, confidence: float) -> tuple[float, float]:
    """Interval of the mean of `values` (one number a prompt), as (low, high) in their unit.

    confidence: share of such intervals that cover the true mean, e.g. 0.95. Unknown, (NaN, NaN), below MIN_PROMPTS
    values. Raises UserError for a confidence outside ]0, 1[, ValueError for values that are not one row of finite
    numbers (drop missing ones before: only the caller knows what they mean).
    """
    check_confidence(confidence)
    data = _numbers("values", values)
    if data.size < MIN_PROMPTS:
        return _UNKNOWN
    if (data >= 0).all() and np.count_nonzero(data) >= 2:
        ones = np.ones_like(data)
        return paired_ratio_ci(data, ones, ones, ones, confidence=confidence)
    mean = float(data.mean())
    half = t_quantile(confidence, data.size - 1) * float(data.std(ddof=1)) / math.sqrt(data.size)
    low = mean - half
    return max(0.0, low) if (data >= 0).all() else low, mean + half


def paired_ratio_ci(
    num_a: ArrayLike, den_a: ArrayLike, num_b: ArrayLike, den_b: ArrayLike, *, confidence: float
) -> tuple[float, float]:
    """Interval of (sum num_a / sum den_a) / (sum num_b / sum den_b), where entry i of all four is prompt i.

    What makes a prompt slow on both sides cancels out. Unknown, (NaN, NaN), below MIN_PROMPTS prompts or when a sum
    is not positive with one prompt left out.

    Raises UserError and ValueError as `mean_ci`, and ValueError when the four differ in length.
    """
    check_confidence(confidence)
    columns = [
        _numbers(name, values)
        for name, values in (("num_a", num_a), ("den_a", den_a), ("num_b", num_b), ("den_b", den_b))
    ]
    count = columns[0].size
    if any(column.size != count for column in columns):
        raise ValueError(f"columns of different lengths: {[column.size for column in columns]}")
    if count < MIN_PROMPTS:
        return _UNKNOWN
    a, b = _LogRatio.of(*columns[:2]), _LogRatio.of(*columns[2:])
    if a is None or b is None:
        return _UNKNOWN
    half = t_quantile(confidence, _degrees([a, b])) * _error(a.deviations - b.deviations)
    return _scaled(a.value - b.value, half)


def rate_ci(kept: ArrayLike, reached: ArrayLike, *, confidence: float) -> tuple[float, float]:
    """Interval of the rate sum(kept) / sum(reached); entry i is the counts of prompt i, kept <= reached.

    Prompts that reached nothing are left out. Unknown, (NaN, NaN), below MIN_PROMPTS others. Raises as `mean_ci`.
    """
    check_confidence(confidence)
    top, bottom = _numbers("kept", kept), _numbers("reached", reached)
    if top.size != bottom.size:
        raise ValueError(f"columns of different lengths: {[top.size, bottom.size]}")
    top, bottom = top[bottom > 0], bottom[bottom > 0]
    return _wilson(top, bottom, confidence)


def bounded_mean_ci(values: ArrayLike, upper: float, *, confidence: float) -> tuple[float, float]:
    """Interval of the mean of `values` that lie between 0 and `upper`, one a prompt, such as the mean rate of each.

    As `rate_ci`: a mean at a bound has an interval too. Unknown, (NaN, NaN), below MIN_PROMPTS values.
    """
    check_confidence(confidence)
    data = _numbers("values", values)
    if not upper > 0 or not np.isfinite(upper):
        return _UNKNOWN
    trials = np.full_like(data, 1 / LIKENESS)  # how many is not known
    low, high = _wilson(data / upper * trials, trials, confidence)
    return low * upper, high * upper


def quantile(values: ArrayLike, share: float) -> float:
    """The quantile of `values` by linear interpolation; NaN when fewer than one of them is expected above it: the
    90th percentile needs 10 values, the 99th 100."""
    data = _numbers("values", values)
    return float(np.quantile(data, share)) if data.size and data.size * (1 - share) >= 1 - 1e-9 else math.nan


@dataclass(frozen=True)
class Comparison:
    """Milliseconds per token of several configurations on the same prompts, compared at one level of confidence.

    `against_first` holds for all configurations at once, and `distinguishable` for all pairs at once: in at most
    1 - confidence of experiments one interval of the family misses, or one equal pair is told apart. So the best may be
    picked by its result. Made by `compare_jointly`.
    """

    logs: Numbers  # [configurations]: of milliseconds per token, over those of the base
    errors: Numbers  # [configurations, configurations]: standard errors of the differences of logs
    critical_first: float
    critical_pairs: float

    def against_first(self, place: int) -> tuple[float, float]:
        """Interval of how many times as fast as the first configuration this one is."""
        if place == 0:
            return 1.0, 1.0
        return _scaled(float(self.logs[0] - self.logs[place]), self.critical_first * float(self.errors[0, place]))

    def distinguishable(self, one: int, other: int) -> bool:
        """Whether two configurations differ beyond doubt. With the first one, as `against_first` has it; two others
        never when neither can be told from the first."""
        if 0 in (one, other):
            return self._differs_from_first(one + other)
        if not (self._differs_from_first(one) or self._differs_from_first(other)):
            return False
        return bool(abs(self.logs[one] - self.logs[other]) > self.critical_pairs * self.errors[one, other])

    def _differs_from_first(self, place: int) -> bool:
        low, high = self.against_first(place)
        return low > 1 or high < 1


def compare_jointly(
    milliseconds: ArrayLike,
    tokens: ArrayLike,
    *,
    base: tuple[ArrayLike, ArrayLike] | None = None,
    confidence: float,
    samples: int,
    seed: int,
) -> Comparison | None:
    """Compare configurations on the same prompts; the first one is what the others are measured against.

    milliseconds, tokens: [configurations, prompts]. base: milliseconds and tokens of the same shape: what was measured
    beside each configuration, of the first one itself; then each is compared by its ratio to that, so that what changed
    between the runs of two configurations cancels out. samples: draws of the maximum's distribution; the same arguments
    give the same result. None when nothing can be said: below MIN_PROMPTS prompts, or sums that are not positive.
    Raises UserError for impossible settings, ValueError for tables of different shape or without finite numbers.
    """
    check_confidence(confidence)
    if samples < 1:
        raise UserError(f"bootstrap_samples is {samples}: it must be at least 1, e.g. 10000")
    times, counts = np.asarray(milliseconds, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    if times.ndim != 2 or times.shape != counts.shape or not np.isfinite([times, counts]).all():
        raise ValueError("milliseconds, tokens: two tables of finite numbers of one shape are needed")
    if times.shape[1] < MIN_PROMPTS:
        return None
    known = _log_ratios(times, counts)
    beside = known and _log_ratios(*(np.asarray(table, dtype=np.float64) for table in base or (times[:1], counts[:1])))
    if not known or not beside:
        return None
    beside = beside if base else beside * len(known)
    deviations = np.array([own.deviations - other.deviations for own, other in zip(known, beside, strict=True)])
    logs = np.array([own.value - other.value for own, other in zip(known, beside, strict=True)])
    # Of the most unequal one, so that no joint interval is within that of its row alone.
    degrees = min(_degrees([own, other]) for own, other in zip(known, beside, strict=True))
    first, pairs = _critical_values(deviations, degrees, confidence, samples, seed)
    errors = np.array([[_error(one - other) for other in deviations] for one in deviations])
    return Comparison(logs, errors, first, pairs)


def t_quantile(confidence: float, degrees: float) -> float:
    """Student's t that the absolute value stays below with probability `confidence`; degrees of freedom above 0."""
    return _t_quantile(confidence, round(degrees, 2))


@lru_cache(maxsize=4096)
def _t_quantile(confidence: float, degrees: float) -> float:
    # With t = sqrt(degrees) tan(angle) the density is cos(angle) ** (degrees - 1), here over the log of the distance
    # from a right angle, so that few degrees (a pole at the end) and many (a peak at 0) are both resolved.
    rest = np.concatenate([np.geomspace(1e-12, 1e-2, 1000), np.linspace(1e-2, np.pi / 2, 4000)[1:]])
    density = np.sin(rest) ** (degrees - 1)
    beyond = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(rest))])
    angle = np.interp((1 - confidence) * beyond[-1], beyond, rest)
    return float(math.sqrt(degrees) / math.tan(angle))


def level_of_each(confidence: float, number: int) -> float:
    """The level of each of so many intervals with which all of them hold at once (Bonferroni)."""
    return 1 - (1 - confidence) / max(1, number)


def check_confidence(confidence: float) -> None:
    """Raises UserError for a level that is no share between 0 and 1."""
    if not 0 < confidence < 1:
        raise UserError(f"confidence is {confidence:g}: it must lie between 0 and 1, e.g. 0.95")


@dataclass(frozen=True)
class _LogRatio:
    """log(sum top / sum bottom) over prompts. deviations: of the value without each prompt, from their mean.
    shares: of each prompt in the top."""

    value: float
    deviations: Numbers
    shares: Numbers

    @classmethod
    def of(cls, top: Numbers, bottom: Numbers) -> _LogRatio | None:
        total, count = float(top.sum()), float(bottom.sum())
        tops, bottoms = total - top, count - bottom
        if min(total, count, tops.min(), bottoms.min()) <= 0:
            return None
        left_out = np.log(tops) - np.log(bottoms)
        return cls(math.log(total / count), left_out - left_out.mean(), top / total)


def _log_ratios(tops: Numbers, bottoms: Numbers) -> list[_LogRatio]:
    """One a row; none at all when one of them is not known."""
    ratios = [_LogRatio.of(top, bottom) for top, bottom in zip(tops, bottoms, strict=True)]
    known = [ratio for ratio in ratios if ratio is not None]
    return known if len(known) == len(ratios) else []


def _error(deviations: Numbers) -> float:
    """The jackknife's standard error. Differences of rounding are none."""
    count = deviations.size
    error = math.sqrt((count - 1) / count * float(deviations @ deviations))
    return error if error > 1e-12 else 0.0


def _degrees(ratios: list[_LogRatio]) -> float:
    shares = np.mean([ratio.shares for ratio in ratios], axis=0)
    return max(1.0, float(1 / (shares @ shares)) - 1)


def _scaled(log: float, half: float) -> tuple[float, float]:
    # Rounding must not put the interval of equal columns beside 1.
    log = 0.0 if abs(log) < 1e-12 else log
    return math.exp(log - half) if half < 700 else 0.0, math.exp(log + half) if half < 700 else math.inf


def _wilson(top: Numbers, bottom: Numbers, confidence: float) -> tuple[float, float]:
    count, total = top.size, float(bottom.sum())
    if count < MIN_PROMPTS:
        return _UNKNOWN
    rate = min(1.0, max(0.0, float(top.sum()) / total))
    prompts = total**2 / float(bottom @ bottom)  # effective number: Kish
    assumed = share = max(LIKENESS, prompts / total)  # not below that of independent trials
    if 0 < rate < 1:
        without = (top - rate * bottom) / (total - bottom)  # what leaving a prompt out changes, but for its sign
        variance = (count - 1) / count * float(without @ without)  # jackknife
        seen = min(int((top < bottom).sum()), int((top > 0).sum()))
        trust = seen ** (4 * (seen / count) ** 2)
        share = (min(1.0, variance * prompts / (rate * (1 - rate))) * trust + assumed) / (trust + 1)
    trials = prompts / share
    t = t_quantile(confidence, max(1.0, prompts - 1))
    middle = (rate + t * t / (2 * trials)) / (1 + t * t / trials)
    half = t * math.sqrt(rate * (1 - rate) / trials + (t / (2 * trials)) ** 2) / (1 + t * t / trials)
    return max(0.0, min(rate, middle - half)), min(1.0, max(rate, middle + half))


def _critical_values(
    deviations: Numbers, degrees: float, confidence: float, samples: int, seed: int
) -> tuple[float, float]:
    """What the largest |t| stays below, of all configurations against the first, and of all pairs of the others.

    deviations: [configurations, prompts]. What all configurations share of a prompt is taken out, and correlations
    are drawn a little towards none: few prompts exaggerate them.
    """
    number, prompts = deviations.shape
    single = t_quantile(confidence, degrees)
    if number < 3:
        return single, single
    own = deviations - deviations.mean(axis=0)
    scale = np.sqrt((own**2).mean(axis=1))
    scale[scale == 0] = 1.0
    covariance = own @ own.T / prompts
    weight = min(0.5, 3 / prompts)
    covariance = (1 - weight) * covariance + weight * np.diag(np.diag(covariance))
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    draws = max(2, round(degrees) + 1)
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // (draws * number))
    upper = np.triu_indices(number, 1)
    of_first = upper[0] == 0
    largest_first, largest_pair = [], []
    for start in range(0, samples, rows):
        sample = rng.standard_normal((min(rows, samples - start), draws, number)) @ root.T
        means = sample.mean(axis=1)
        centred = sample - means[:, None]
        spread = centred.transpose(0, 2, 1) @ centred / (draws - 1)
        variance = np.diagonal(spread, axis1=1, axis2=2)
        squared = variance[:, upper[0]] + variance[:, upper[1]] - 2 * spread[:, upper[0], upper[1]]
        distance = np.abs(means[:, upper[0]] - means[:, upper[1]])
        squared = np.where(squared > 1e-9 * (scale**2).max(), squared, np.inf)
        t = distance / np.sqrt(squared / draws)
        largest_first.append(t[:, of_first].max(axis=1))
        largest_pair.append(t[:, ~of_first].max(axis=1))
    first, pairs = (float(np.quantile(np.concatenate(found), confidence)) for found in (largest_first, largest_pair))
    return max(single, first), max(single, pairs)


def _numbers(name: str, values: ArrayLike) -> Numbers:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not np.isfinite(numbers).all():
        raise ValueError(f"{name}: one row of finite numbers is needed")
    return numbers
