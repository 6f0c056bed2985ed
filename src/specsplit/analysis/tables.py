"""The summary of a sweep: `comparable` takes what may be compared, `summarize` makes one row a configuration."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pandas import DataFrame

from specsplit.analysis.configurations import (
    NETWORK,
    conditions_of,
    configuration_of,
    keys_of,
    row_of,
    sort_rows,
    tuples,
)
from specsplit.analysis.measures import (
    TIMES,
    draft_position,
    interval_columns,
    median_over_repeats,
    metric_columns,
    quantiles,
    rate_columns,
    ratio,
    verifies_draft,
)
from specsplit.analysis.references import (
    BASES,
    GAMMA0,
    is_base,
    lacks_reference,
    reference_columns,
    speedup_columns,
    with_drift,
    with_references,
)
from specsplit.analysis.statistics import Comparison, check_confidence, compare_jointly, level_of_each, rate_ci
from specsplit.client.result import LINK_BYTES, USAGE
from specsplit.experiment.columns import DRAFTING, FAILED, OK, SOURCES, WORKERS
from specsplit.settings.names import AUTO

METRICS = (*TIMES, "average_acceptance_rate", "mean_accepted_length", "network_idle_fraction")


def comparable(requests: DataFrame, rounds: DataFrame) -> tuple[DataFrame, DataFrame]:
    """What may be compared: requests that every configuration with the same choice of tokens and network finished.

    Returns one row for each configuration, setup and request, the medians over its repeats, and the rounds of all
    repeats. A repeat counts when every configuration finished it, and with it all that was measured beside it. A time
    that a configuration lacks for a request (one round has no time between rounds) is empty in all of them; a
    configuration that has it for no request does not count.
    """
    turn = ["request_id", "repeat"]
    requests = with_references(requests)
    conditions = conditions_of(requests, *NETWORK)
    keys = tuples(requests[turn].assign(conditions=conditions))
    shared = ~keys.isin(set(keys[(requests["status"] == FAILED) | lacks_reference(requests)]))
    names = [*keys_of(requests), *turn]
    if not shared.all():
        rounds = rounds[tuples(rounds[names]).isin(set(tuples(requests.loc[shared, names])))]
    requests, conditions = requests[shared], conditions[shared]
    if requests.empty:
        return requests, rounds
    requests = median_over_repeats(requests, (*row_of(requests), "request_id"), "matches_gamma0").copy()
    conditions, configurations = conditions[requests.index], configuration_of(requests, row_of(requests))
    prompts = tuples(requests[["request_id"]].assign(conditions=conditions))
    for name in TIMES:
        has = requests[name].notna()
        lacking = ~has & has.groupby(configurations, sort=False).transform("any")
        if lacking.any():
            requests[name] = requests[name].mask(prompts.isin(set(prompts[lacking])))
    return requests, rounds


def compare_panel(
    requests: DataFrame, base: str, *, confidence: float, bootstrap_samples: int, seed: int
) -> tuple[list[Any], Comparison | None]:
    """The configurations of one choice of tokens and network, and how they compare end to end with one of BASES.

    requests: of `comparable`. Returns their tuples of `row_of`, first that of the base (None when it is no row), and
    the comparison of all with what was measured of the base beside them. A configuration of which fewer than two texts
    have tokens, or without that base, is left out. None as comparison where there is no base, or too few requests.
    """
    requests = with_references(requests)
    every = _by_row(requests)
    times, tokens = f"{base}_ms", f"{base}_tokens"
    first = next((key for key in every if is_base(key, base)), None)

    def usable(rows: DataFrame) -> bool:
        enough = all((rows[name] > 0).sum() > 1 for name in ("generated_tokens", tokens))
        return enough and bool(rows[times].notna().all())

    own = {key: rows.sort_values("request_id") for key, rows in every.items() if key[-1] == WORKERS and usable(rows)}
    if not own:
        return [], None
    order = [first, *(key for key in own if key != first)]
    example = next(iter(own.values()))

    def of_all(name: str, beside: str) -> list[Any]:
        return [example[beside].to_numpy(float), *(own[key][name].to_numpy(float) for key in order[1:])]

    found = compare_jointly(
        of_all("total_latency_ms", times),
        of_all("generated_tokens", tokens),
        base=(of_all(times, times), of_all(tokens, tokens)),
        confidence=confidence,
        samples=bootstrap_samples,
        seed=seed,
    )
    return order, found


def level_of_panels(requests: DataFrame, confidence: float) -> float:
    """The level for each choice of tokens and network with which what is said holds for all of them at once."""
    return level_of_each(confidence, conditions_of(requests, *NETWORK).nunique())


def _drifted(panel: DataFrame, **settings: Any) -> dict[Any, bool]:
    """Of each run of a choice of tokens and network that measured its own gamma 0: whether that was, beyond chance, of
    another speed than those of all of them together. Empty where too few requests tell."""
    runs = [(key, rows.sort_values("request_id")) for key, rows in _by_row(panel[panel["paired"]]).items()]
    runs = [(key, rows) for key, rows in runs if key[-1] == WORKERS]
    if len(runs) < 2:
        return {}
    times, tokens = (np.array([rows[f"{GAMMA0}_{unit}"] for _, rows in runs], float) for unit in ("ms", "tokens"))
    found = compare_jointly(*(np.vstack([table.mean(axis=0), table]) for table in (times, tokens)), **settings)
    return {} if found is None else {key: found.distinguishable(0, at) for at, (key, _) in enumerate(runs, 1)}


def _by_row(requests: DataFrame) -> dict[Any, DataFrame]:
    """The requests of each row of the summary, by its tuple of `row_of`."""
    return dict(list(requests.groupby(configuration_of(requests, row_of(requests)), sort=False)))


def summarize(
    requests: DataFrame, rounds: DataFrame, *, confidence: float = 0.95, bootstrap_samples: int = 10_000, seed: int = 0
) -> DataFrame:
    """One row a configuration, in their order, from the tables of `merge_runs` or `read_tables`.

    Rows are compared on the same requests: all columns but `requests`, the `lossless` and the failures are over those
    that every configuration with the same choice of tokens and network finished (`comparable`). A table with references
    (`with_references`) has rows for the baselines too. Where requests were repeated, all but `inter_chunk_ms` and what
    is over rounds is of the medians over the repeats of each request, so that intervals are over prompts. No interval
    is given below `MIN_PROMPTS` (6) requests.

    gamma, mode, tree, draft, sampling, temperature, top_k, top_p, rtt_ms, jitter_ms, bandwidth_mbit
        the configuration; gamma is a number or `auto`.
    setup
        `workers`: through the loop; `target_streamed`, `colocated`: a baseline, measured in turn with a run's requests.
    requests, compared, repeats, generated_tokens
        number of requests that did not fail; of those that every configuration finished, which the rest is over; times
        that each was run; tokens generated by the compared ones once.
    speedup, speedup_ci_low, speedup_ci_high
        end to end against gamma 0 with the same way to choose tokens and the same network, measured in the same run:
        its milliseconds per generated token (total latency / tokens, over all requests) divided by this
        configuration's; an interval for this row alone (`paired_ratio_ci`). 1, [1, 1] for gamma 0 itself. Empty without
        such a gamma 0 or tokens. Of a run that measured none of its own it is against the run of gamma 0.
    speedup_joint_low, speedup_joint_high
        the interval that holds for all `workers` rows of the table at once (`compare_jointly` within a choice of tokens
        and network, `level_of_panels` between them): to judge a row that was picked by its speedup. Empty for
        baselines.
    speedup_over_streamed, speedup_over_colocated, each with _ci_low, _ci_high, _joint_low, _joint_high
        as speedup, against the target that streams by itself, and against the same pair in one process.
    <m>_mean, <m>_ci_low, <m>_ci_high, <m>_median for each m of METRICS
        over requests that have the value. The median is p50. Milliseconds for TIMES, shares for the rates and
        fractions, tokens a round for mean_accepted_length. Empty when no request has the value: tpot_ms needs
        two generated tokens, itl_ms two rounds, ttft_ms one token, average_acceptance_rate a draft (never at gamma 0),
        mean_accepted_length a round.
    <m>_p90, <m>_p99 for each m of TIMES
        linear interpolation between requests. Empty when fewer than one request is expected above: below 10, below 100.
    inter_chunk_ms_median, _p90, _p99
        time from the tokens of a round to those of the next one, over all rounds but the first of each text. Empty
        where no text has two rounds; p90 and p99 as above.
    tokens_per_second
        all tokens / total latency of all requests, one after the other.
    <link>_sent_bytes_per_token, <link>_received_bytes_per_token, both also _per_round, for each link of draft, target
        serialized messages to that worker and from it over all requests, divided by all tokens, by all rounds. 0 for a
        pair in one process; empty for tables of earlier versions.
    client_cpu_ms_per_token, draft_cpu_ms_per_token, target_cpu_ms_per_token, energy_j_per_token
        CPU milliseconds of each process and joules of the workers' machines while the texts were written, by all
        tokens. Empty where one of the requests lacks it.
    speculation_hits, speculation_misses, hit_rate, hit_rate_ci_low, hit_rate_ci_high
        rounds whose draft was made while the round before was verified, rounds for which that did not foresee what
        was accepted, and hits / (hits + misses) with an interval over requests. Empty where nothing was drafted
        ahead, as in mode sync.
    acceptance_length, _ci_low, _ci_high, acceptance_length_mean
        1 + accepted / verifications over all requests together, and the mean of that of each request. Empty where
        nothing was drafted, as at gamma 0.
    draft_acceptance_rate, _ci_low, _ci_high
        accepted / drafted tokens over all requests together.
    draft_share_session, _global, _lookup, _model, _none
        with prompt lookup or p_min and of drafts that learn, of the rounds that had or asked for a draft: share whose
        draft began with what the worker found in the text itself, in earlier texts, with what the client looked up,
        with what a model said, and that had none. Empty for other drafts.
    draft_acceptance_rate_session, _global, _lookup, _model, each with _ci_low, _ci_high
        draft_acceptance_rate of the drafts of that source alone.
    acceptance_at_1 .. acceptance_at_K, K = the largest gamma, or depth drafted at gamma auto
        how often the i-th drafted token was accepted, among rounds that drafted it and accepted the i-1
        before it. Empty where there was no such round.
    joint_acceptance_at_1 .. _K
        how often the i-th drafted token was accepted, with all before it, among all verifications of a draft.
    rounds_accepting_0 .. _K
        verifications of a draft in which so many drafted tokens were accepted.
    lossless, lossless_compared
        share of requests with the text of gamma 0, of so many that did not fail on either side. Empty, 0 where
        `matches_gamma0` is empty: without a gamma 0, and for rejection sampling at a temperature above 0.
    reference_ms_per_token, reference_drift, reference_drifted
        milliseconds per token of the gamma 0 that this row's run measured; that over the median of the runs with the
        same choice and network, minus 1; whether it is, beyond chance, another one than that of all those runs
        together. Empty where a run measured none, and for baselines; the last one also for a single run and too few
        requests.
    baselines_lossless, baselines_compared, baselines_failed
        of the texts that were measured beside this configuration: share that is the text of gamma 0, of so many that
        can be compared; how many failed.
    failed_requests, worker_failures
        rows with status failed; rounds in which a worker failed, got over or not, of all rows.

    Raises UserError for impossible confidence or bootstrap_samples.
    """
    check_confidence(confidence)
    settings: dict[str, Any] = {"confidence": confidence, "bootstrap_samples": bootstrap_samples, "seed": seed}
    requests = with_references(requests)
    shared, rounds = comparable(requests, rounds)
    numbers = [gamma for gamma in requests["gamma"] if gamma != AUTO]
    deepest = int(max([*numbers, *rounds.loc[rounds["gamma"] == AUTO, "drafted"]], default=0))
    own_of, rounds_of = _by_row(shared), dict(list(rounds.groupby(configuration_of(rounds), sort=False)))
    joint: dict[Any, dict[str, tuple[float, float]]] = {}
    drifted: dict[Any, bool] = {}
    at_once: dict[str, Any] = {**settings, "confidence": level_of_panels(requests, confidence)}
    chance = {"confidence": at_once["confidence"], "samples": bootstrap_samples, "seed": seed}
    for _, panel in shared.groupby(conditions_of(shared, *NETWORK), sort=False):
        drifted |= _drifted(panel, **chance)
        for base in BASES:
            order, found = compare_panel(panel, base, **at_once)
            if found is not None:
                for place, key in enumerate(order):
                    joint.setdefault(key, {})[base] = found.against_first(place)
    rows = []
    for configuration, all_own in _by_row(requests).items():
        own, own_rounds = own_of.get(configuration, shared[:0]), rounds_of.get(configuration[:-1], rounds[:0])
        gamma, setup = configuration[0], configuration[-1]
        ended = all_own[all_own["status"] == OK]
        tokens = own["generated_tokens"].sum()
        row: dict[str, Any] = {name: all_own[name].iloc[0] for name in row_of(all_own)}
        row |= {"requests": ended["request_id"].nunique(), "compared": len(own)}
        row |= {"repeats": all_own["repeat"].nunique(), "generated_tokens": int(tokens)}
        for base in BASES:
            joints = joint.get(configuration, {})
            row |= speedup_columns(own, base, confidence, joints, is_base(configuration, base))
        depth = float(gamma if gamma != AUTO else own_rounds["drafted"].max() if len(own_rounds) else math.nan)
        most = {} if gamma == 0 else {"average_acceptance_rate": 1.0, "mean_accepted_length": depth + 1}
        for metric in METRICS:
            row |= metric_columns(own[metric], metric, confidence, most.get(metric))
        own_rounds = own_rounds if setup == WORKERS else rounds[:0]
        gaps = own_rounds.groupby(["request_id", "repeat"], sort=False)["arrived_ms"].diff()
        row |= quantiles(gaps, "inter_chunk_ms", (50, 90, 99))
        row["tokens_per_second"] = ratio(1000 * tokens, own["total_latency_ms"].sum())
        row |= _used(own)
        hits, misses = own["speculation_hits"], own["speculation_misses"]
        row |= {"speculation_hits": hits.sum(), "speculation_misses": misses.sum()}
        row |= rate_columns("hit_rate", hits, hits + misses, confidence)
        row |= _acceptance(own, own_rounds, depth, confidence)
        row |= _by_source(own, own_rounds, confidence)
        row |= _positions(own_rounds, deepest)
        texts = median_over_repeats(ended, (*row_of(ended), "request_id"), "matches_gamma0")["matches_gamma0"].dropna()
        row |= {"lossless": ratio(texts.sum(), len(texts)), "lossless_compared": len(texts)}
        row |= reference_columns(all_own, own, drifted.get(configuration))
        row["failed_requests"] = int((all_own["status"] == FAILED).sum())
        row["worker_failures"] = int(all_own[["draft_failures", "target_failures"]].to_numpy().sum())
        rows.append(row)
    return with_drift(sort_rows(DataFrame(rows)))


def _used(own: DataFrame) -> dict[str, float]:
    tokens, rounds = own["generated_tokens"].sum(), own["num_rounds"].sum()
    sums = {name: own[name].to_numpy(float, na_value=np.nan).sum() for name in LINK_BYTES}
    return {
        f"{name}_per_{unit}": ratio(count, number)
        for name, count in sums.items()
        for unit, number in (("token", tokens), ("round", rounds))
    } | {f"{name}_per_token": ratio(own[name].astype(float).sum(skipna=False), tokens) for name in USAGE}


def _acceptance(own: DataFrame, rounds: DataFrame, depth: float, confidence: float) -> dict[str, float]:
    counted = rounds[verifies_draft(rounds) & (rounds["repeat"] == rounds["repeat"].min())].groupby("request_id").size()
    verified = own["verifications"].fillna(own["request_id"].map(counted)).fillna(0).astype(float)
    drafted, accepted = own["drafted_tokens"].astype(float), own["accepted_tokens"].astype(float)
    # A depth that no round tells has no interval.
    interval = (math.nan, math.nan)
    if depth == depth:
        interval = rate_ci(accepted * (verified > 0) / max(depth, 1), verified, confidence=confidence)
    return {
        "acceptance_length": 1 + ratio(accepted.sum(), verified.sum()),
        **interval_columns("acceptance_length", (1 + depth * interval[0], 1 + depth * interval[1])),
        "acceptance_length_mean": float(own["acceptance_length"].mean()),
        **rate_columns("draft_acceptance_rate", accepted, drafted, confidence),
    }


def _by_source(own: DataFrame, rounds: DataFrame, confidence: float) -> dict[str, float]:
    counts = {f"draft_share_{source}": float(own[name].sum()) for source, name in SOURCES}
    row = {name: ratio(count, sum(counts.values())) for name, count in counts.items()}
    for source in DRAFTING:
        sums = rounds[rounds["draft_source"] == source].groupby("request_id")[["accepted", "drafted"]].sum()
        row |= rate_columns(f"draft_acceptance_rate_{source}", sums["accepted"], sums["drafted"], confidence)
    return row


def _positions(rounds: DataFrame, deepest: int) -> dict[str, Any]:
    verified = rounds[verifies_draft(rounds)]
    at, jointly = {}, {}
    for position in range(1, deepest + 1):
        reached, kept = draft_position(rounds, position)
        at[f"acceptance_at_{position}"] = ratio(kept.sum(), reached.sum())
        jointly[f"joint_acceptance_at_{position}"] = ratio(kept.sum(), len(verified))
    counts = verified["accepted"].value_counts()
    return at | jointly | {f"rounds_accepting_{number}": int(counts.get(number, 0)) for number in range(deepest + 1)}
