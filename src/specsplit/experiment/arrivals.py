"""When requests arrive in an open loop, which does not wait for the texts before."""

from __future__ import annotations

import numpy as np

from specsplit.settings.measure import ArrivalPattern


def arrival_times(count: int, rate: float, pattern: ArrivalPattern, burstiness: float, seed: int) -> list[float]:
    """Seconds from the first of `count` requests to each of them, ascending; the first is 0.

    rate: mean requests per second. pattern: gaps that are all alike (`constant`), exponential (`poisson`) or from a
    gamma distribution of shape `burstiness` (`gamma`: below 1 in bursts, 1 as poisson, above 1 more even), as in the
    load generators of vLLM and AIPerf. The same arguments give the same times.
    """
    draws = np.random.default_rng(seed)
    if pattern == "constant":
        gaps = np.ones(count - 1)
    elif pattern == "poisson":
        gaps = draws.exponential(size=count - 1)
    else:
        gaps = draws.gamma(burstiness, 1 / burstiness, size=count - 1)
    return [0.0, *(np.cumsum(gaps) / rate).tolist()]
