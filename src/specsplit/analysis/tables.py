"""The tables of an experiment: the runs of a sweep put together, and their summary.

`merge_runs` reads the folder of each run, `read_tables` reads them
again, and `summarize` makes one row a configuration. What is wrong in a file is refused with its name and line: a
table that lost rows on the way would still give plausible means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from pandas import DataFrame, Series, isna

from specsplit.analysis.configurations import (
    NETWORK,
    conditions_of,
    configuration_of,
    keys_of,
    ratio,
    row_of,
    sort_rows,
    tuples,
)
from specsplit.analysis.reading import listed, read_files
from specsplit.analysis.references import (
    BASES,
    GAMMA0,
    is_base,
    lacks_reference,
    matches_alone,
    merge_references,
    read_references,
    reference_columns,
    speedup_columns,
    texts_alone,
    with_drift,
    with_references,
)
from specsplit.analysis.repeats import median_over_repeats
from specsplit.analysis.series import KEEP_APART, check_joined, series_of
from specsplit.analysis.statistics import (
    Comparison,
    bounded_mean_ci,
    check_confidence,
    compare_jointly,
    mean_ci,
    quantile,
    rate_ci,
)
from specsplit.client.result import LINK_BYTES, USAGE
from specsplit.errors import UserError
from specsplit.experiment.columns import FAILED, OK, SOURCES, WORKERS, RequestRecord, RoundRecord
from specsplit.settings.axes import CONFIGURATION, PLAIN, SERIES
from specsplit.settings.names import AUTO

TIMES = ("tpot_ms", "itl_ms", "ttft_ms", "total_latency_ms")
METRICS = (*TIMES, "average_acceptance_rate", "mean_accepted_length", "network_idle_fraction")

# Column name -> type of its cells, as the records annotate it.
_REQUEST_TYPES = {field.name: str(field.type) for field in fields(RequestRecord)}
_ROUND_TYPES = {field.name: str(field.type) for field in fields(RoundRecord)}
_MERGED_TYPES = {**_REQUEST_TYPES, "matches_gamma0": "bool | None", SERIES: "int | None"}
_MERGED_ROUND_TYPES = {**_ROUND_TYPES, **{name: _MERGED_TYPES[name] for name in (*CONFIGURATION[1:], SERIES)}}


def merge_runs(run_dirs: Sequence[Path], *, keep_apart: bool = False) -> tuple[DataFrame, DataFrame]:
    """The requests and the rounds of all runs, each sorted by configuration, then in the order of the files.

    run_dirs: one folder a configuration, in any order, each with `requests.csv` and `per_round.csv`. Columns that the
    records of `specsplit.experiment.columns` do not have are left out. Configurations are sorted by how tokens are
    chosen, network, draft, mode, tree and gamma (`auto` last), so that each curve stands together.

    The requests get one more column, `matches_gamma0`: whether the text is the one that gamma 0, the target alone,
    gave for the same request and the same way to choose tokens. Empty without such a gamma 0, where one of the two
    failed, and for rejection sampling at a temperature above 0, which is right in distribution and not token for token.
    Requests that failed are rows like all others; `comparable` takes them out. The rounds get the
    configuration of their request, all CONFIGURATION but gamma, which they have.

    Runs must agree on prompts, models, settings, machine and code, as their run.json tell. keep_apart: those that do
    not are series of their own, told by a column `series`; rows of two series are never compared.

    Raises UserError when runs do not agree, a file is missing or malformed, a folder mixes configurations, a request of
    a configuration occurs twice, a configuration lacks a request that another has or has none that did not fail, or a
    round belongs to no request.
    """
    if not run_dirs:
        raise UserError("no run folder given: name one folder for each gamma, e.g. results/runs/gamma_0")
    made_by = "`specsplit bench` or the workflow's benchmark rule writes it"
    requests = read_files([Path(run) / "requests.csv" for run in run_dirs], _REQUEST_TYPES, made_by)
    rounds = read_files([Path(run) / "per_round.csv" for run in run_dirs], _ROUND_TYPES, made_by)
    for run in run_dirs:
        _check_one_configuration(requests, Path(run) / "requests.csv", made_by)
    series = series_of(run_dirs, keep_apart)
    if series:
        files = {str(Path(run) / "requests.csv"): number for run, number in series.items()}
        requests[SERIES] = requests.index.get_level_values("file").map(files)
    settings = requests.droplevel("row")[list(keys_of(requests)[1:])]
    settings = settings[~settings.index.duplicated()].rename(lambda file: str(Path(file).with_name("per_round.csv")))
    for name in settings:
        rounds[name] = settings[name].reindex(rounds.index.get_level_values("file")).array
    requests, rounds = _checked(requests, rounds)
    alone = texts_alone(requests, merge_references(run_dirs, series))
    return requests.assign(matches_gamma0=matches_alone(requests, alone)), rounds


def read_tables(results_dir: Path) -> tuple[DataFrame, DataFrame]:
    """The merged `requests.csv` and `per_round.csv` of a results folder, as `merge_runs` returned them.

    Where there is a `reference.csv` as well, the requests are as `with_references` makes them.

    Raises UserError when one is missing, empty or malformed, and for the same contradictions as `merge_runs`.
    """
    made_by = f"`specsplit bench` or the workflow (`snakemake --cores 2 {results_dir}/summary.csv`) makes it"
    requests = read_files([Path(results_dir) / "requests.csv"], _MERGED_TYPES, made_by)
    rounds = read_files([Path(results_dir) / "per_round.csv"], _MERGED_ROUND_TYPES, made_by)
    if requests.empty:
        raise UserError(f"{Path(results_dir) / 'requests.csv'}: has no request, only the header; {made_by}")
    if requests[SERIES].isna().all():
        requests, rounds = requests.drop(columns=SERIES), rounds.drop(columns=SERIES)
    check_joined(Path(results_dir), requests)
    requests, rounds = _checked(requests, rounds)
    reference = read_references(Path(results_dir))
    return requests if reference.empty else sort_rows(with_references(requests, reference)), rounds


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
    requests: DataFrame, base: str = GAMMA0, *, confidence: float, samples: int, seed: int
) -> tuple[list[Any], Comparison | None]:
    """The configurations of one choice of tokens and network, and how they compare end to end with one of BASES.

    requests: of `comparable`. Returns their tuples of `row_of`, first that of the base (None when it is no row), and
    the comparison of all with what was measured of the base beside them. A configuration of which fewer than two texts
    have tokens, or without that base, is left out. None as comparison where there is no base, or too few requests.
    """
    requests = with_references(requests)
    every = dict(list(requests.groupby(configuration_of(requests, row_of(requests)), sort=False)))
    columns = f"{base}_ms", f"{base}_tokens"
    first = next((key for key in every if is_base(key, base)), None)

    def usable(rows: DataFrame) -> bool:
        counts = [int((rows[name] > 0).sum()) for name in ("generated_tokens", columns[1])]
        return min(counts) > 1 and bool(rows[columns[0]].notna().all())

    own = {key: rows.sort_values("request_id") for key, rows in every.items() if key[-1] == WORKERS and usable(rows)}
    if not own:
        return [], None
    order = [first, *(key for key in own if key != first)]
    example = next(iter(own.values()))
    times, tokens, base_times, base_tokens = (
        [example[beside].to_numpy(float), *(own[key][name].to_numpy(float) for key in order[1:])]
        for name, beside in (
            ("total_latency_ms", columns[0]),
            ("generated_tokens", columns[1]),
            (columns[0], columns[0]),
            (columns[1], columns[1]),
        )
    )
    settings: dict[str, Any] = {"confidence": confidence, "samples": samples, "seed": seed}
    return order, compare_jointly(times, tokens, base=(base_times, base_tokens), **settings)


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
        the interval that holds for all `workers` rows with this choice and network at once (`compare_jointly`): to
        judge a row that was picked by its speedup. Empty for baselines.
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
    draft_share_session, _global, _model, _none
        of the rounds in which a draft that learns was asked: share whose draft began with what was found in the text
        itself, in earlier texts, with what another model said, and that had none. Empty for other drafts.
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
    reference_ms_per_token, reference_drift
        milliseconds per token of the gamma 0 that this row's run measured; that over the median of the runs with the
        same choice and network, minus 1. Empty where a run measured none, and for baselines.
    baselines_lossless, baselines_compared, baselines_failed
        of the texts that were measured beside this configuration: share that is the text of gamma 0, of so many that
        can be compared; how many failed.
    failed_requests, worker_failures
        rows with status failed; rounds in which a worker failed, got over or not, of all rows.

    Raises UserError for impossible confidence or bootstrap_samples.
    """
    check_confidence(confidence)
    requests = with_references(requests)
    every = dict(list(requests.groupby(configuration_of(requests, row_of(requests)), sort=False)))
    shared, rounds = comparable(requests, rounds)
    numbers = [gamma for gamma in requests["gamma"] if gamma != AUTO]
    deepest = max([*numbers, *rounds.loc[rounds["gamma"] == AUTO, "drafted"]], default=0)
    own_of = dict(list(shared.groupby(configuration_of(shared, row_of(shared)), sort=False)))
    rounds_of = dict(list(rounds.groupby(configuration_of(rounds), sort=False)))
    conditions = conditions_of(requests, *NETWORK)
    joint: dict[Any, dict[str, tuple[float, float]]] = {}
    for _, panel in shared.groupby(conditions[shared.index], sort=False):
        for base in BASES:
            order, found = compare_panel(panel, base, confidence=confidence, samples=bootstrap_samples, seed=seed)
            if found is not None:
                for place, key in enumerate(order):
                    joint.setdefault(key, {})[base] = found.against_first(place)
    rows = []
    for configuration, all_own in every.items():
        own, own_rounds = own_of.get(configuration, shared[:0]), rounds_of.get(configuration[:-1], rounds[:0])
        ended = all_own[all_own["status"] == OK]
        tokens = own["generated_tokens"].sum()
        row: dict[str, Any] = {name: all_own[name].iloc[0] for name in row_of(all_own)}
        row |= {"requests": ended["request_id"].nunique(), "compared": len(own)}
        row |= {"repeats": all_own["repeat"].nunique(), "generated_tokens": int(tokens)}
        for base in BASES:
            joints = joint.get(configuration, {})
            row |= speedup_columns(own, base, confidence, joints, is_base(configuration, base))
        for metric in METRICS:
            upper = {"average_acceptance_rate": 1.0, "mean_accepted_length": _depth(own_rounds, configuration) + 1}
            bound = upper.get(metric) if configuration[0] != 0 else None
            row |= metric_columns(own[metric], metric, confidence, bound)
        depth = _depth(own_rounds, configuration)
        own_rounds = own_rounds if configuration[-1] == WORKERS else rounds[:0]
        gaps = own_rounds.groupby(["request_id", "repeat"], sort=False)["arrived_ms"].diff()
        row |= quantiles(gaps, "inter_chunk_ms", (50, 90, 99))
        row["tokens_per_second"] = ratio(1000 * tokens, own["total_latency_ms"].sum())
        row |= _used(own)
        row |= _speculation(own, confidence)
        row |= _acceptance(own, own_rounds, depth, confidence)
        row |= _draft_sources(own)
        row |= _positions(own_rounds, int(deepest))
        whole = (*row_of(ended), "request_id")
        texts = median_over_repeats(ended, whole, "matches_gamma0")["matches_gamma0"].dropna()
        row |= {"lossless": ratio(texts.sum(), len(texts)), "lossless_compared": len(texts)}
        row |= reference_columns(all_own, own)
        row["failed_requests"] = int((all_own["status"] == FAILED).sum())
        row["worker_failures"] = int(all_own[["draft_failures", "target_failures"]].to_numpy().sum())
        rows.append(row)
    return with_drift(sort_rows(DataFrame(rows)))


def draft_position(rounds: DataFrame, position: int) -> tuple[Series, Series]:
    """Whether each round reached the draft's token number `position` (from 1), and whether it was kept there.

    A round reaches a position when it drafted that far and every token before it was accepted.
    """
    reached = (rounds["drafted"] >= position) & (rounds["accepted"] >= position - 1)
    return reached, reached & (rounds["accepted"] >= position)


def verifies_draft(rounds: DataFrame) -> Series:
    """Whether each round verified a draft, whatever of it counts as drafted."""
    return (rounds["tree_nodes"] > 0) | (rounds["drafted"] > 0)


def quantiles(values: Series, name: str, percents: Sequence[int]) -> dict[str, float]:
    """{NAME_median, NAME_p90, ...} of the values that are there; NaN when there are too few (`quantile`)."""
    known = values.dropna().to_numpy()
    return {
        f"{name}_{'median' if percent == 50 else f'p{percent}'}": (
            float(np.median(known)) if percent == 50 and known.size else quantile(known, percent / 100)
        )
        for percent in percents
    }


def metric_columns(values: Series, name: str, confidence: float, upper: float | None = None) -> dict[str, float]:
    """NAME_mean, its interval and the median of the values that are there; of times p90 and p99 as well.

    upper: the most that a value can be, where the mean may be near it.
    """
    values = values.dropna()
    known = values.to_numpy()
    interval = (
        mean_ci(known, confidence=confidence) if upper is None else bounded_mean_ci(known, upper, confidence=confidence)
    )
    row = {f"{name}_mean": float(values.mean()), f"{name}_ci_low": interval[0], f"{name}_ci_high": interval[1]}
    return row | quantiles(values, name, (50, 90, 99) if name in TIMES else (50,))


def _speculation(own: DataFrame, confidence: float) -> dict[str, float]:
    hits, misses = own["speculation_hits"], own["speculation_misses"]
    low, high = rate_ci(hits, hits + misses, confidence=confidence)
    row = {"speculation_hits": hits.sum(), "speculation_misses": misses.sum()}
    return row | {"hit_rate": ratio(hits.sum(), sum(row.values())), "hit_rate_ci_low": low, "hit_rate_ci_high": high}


def _used(own: DataFrame) -> dict[str, float]:
    tokens, rounds = own["generated_tokens"].sum(), own["num_rounds"].sum()
    sums = {name: own[name].to_numpy(float, na_value=np.nan).sum() for name in LINK_BYTES}
    return {
        f"{name}_per_{unit}": ratio(count, number)
        for name, count in sums.items()
        for unit, number in (("token", tokens), ("round", rounds))
    } | {f"{name}_per_token": ratio(own[name].astype(float).sum(skipna=False), tokens) for name in USAGE}


def _acceptance(own: DataFrame, rounds: DataFrame, depth: float, confidence: float) -> dict[str, float]:
    drafted, accepted = own["drafted_tokens"].to_numpy(float), own["accepted_tokens"].to_numpy(float)
    counted = rounds[verifies_draft(rounds) & (rounds["repeat"] == rounds["repeat"].min())].groupby("request_id").size()
    verified = own["verifications"].fillna(own["request_id"].map(counted)).fillna(0).to_numpy(float)
    low, high = rate_ci(accepted * (verified > 0) / max(depth, 1), verified, confidence=confidence)
    rate_low, rate_high = rate_ci(accepted, drafted, confidence=confidence)
    return {
        "acceptance_length": 1 + ratio(accepted.sum(), verified.sum()),
        "acceptance_length_ci_low": 1 + depth * low,
        "acceptance_length_ci_high": 1 + depth * high,
        "acceptance_length_mean": float(own["acceptance_length"].mean()),
        "draft_acceptance_rate": ratio(accepted.sum(), drafted.sum()),
        "draft_acceptance_rate_ci_low": rate_low,
        "draft_acceptance_rate_ci_high": rate_high,
    }


def _draft_sources(own: DataFrame) -> dict[str, float]:
    counts = {source: float(own[name].sum()) for source, name in SOURCES}
    return {f"draft_share_{source}": ratio(count, sum(counts.values())) for source, count in counts.items()}


def _depth(rounds: DataFrame, configuration: tuple[Any, ...]) -> float:
    """The most tokens that a draft of this configuration has."""
    if configuration[0] == AUTO:
        return float(rounds["drafted"].max()) if len(rounds) else 0.0
    return float(configuration[0])


def _positions(rounds: DataFrame, deepest: int) -> dict[str, Any]:
    verified = rounds[verifies_draft(rounds)]
    at, jointly = {}, {}
    for position in range(1, deepest + 1):
        reached, kept = draft_position(rounds, position)
        at[f"acceptance_at_{position}"] = ratio(kept.sum(), reached.sum())
        jointly[f"joint_acceptance_at_{position}"] = ratio(kept.sum(), len(verified))
    counts = {
        f"rounds_accepting_{number}": int((verified["accepted"] == number).sum()) for number in range(deepest + 1)
    }
    return {**at, **jointly, **counts}


# Reading and checking.


def _named(row: Series) -> str:
    """A configuration in words, with what is not plain: "gamma 5, mode overlap"."""
    others = [name for name, plain in {**PLAIN, SERIES: 1}.items() if row.get(name, plain) != plain]
    return ", ".join(f"{name} {row[name]}" for name in ("gamma", *others))


def _checked(requests: DataFrame, rounds: DataFrame) -> tuple[DataFrame, DataFrame]:
    """The tables in order, after every contradiction in them was looked for."""
    _check_unique(requests, ["request_id", "repeat"])
    _check_unique(rounds, ["request_id", "repeat", "round"])
    _check_same_requests(requests)
    _check_finished(requests)
    _check_rounds(requests, rounds)
    if requests["verifications"].isna().any():
        requests, rounds = _counted_again(requests, rounds)
    return sort_rows(requests), sort_rows(rounds)


def _counted_again(requests: DataFrame, rounds: DataFrame) -> tuple[DataFrame, DataFrame]:
    """Tables of an earlier version with acceptance counted as now: nothing from the end of the text on.

    What changes: `drafted` and `accepted` of a last round whose draft held the end of the text, and of each request the
    sums, rates and lengths of its rounds. A request without rounds keeps what it has.
    """
    names = [*keys_of(requests), "request_id", "repeat"]
    requests, rounds = requests.copy(), rounds.copy()
    own = dict(list(rounds.groupby(tuples(rounds[names]), sort=False)))
    key: Any
    index: Any
    for index, key in tuples(requests[names]).items():
        request, mine = requests.loc[index], own.get(key)
        if mine is None or not isna(request["verifications"]):
            continue
        mine = mine.sort_values("round")
        if request["finish_reason"] == "eos":
            given = int(request["generated_tokens"] - (mine["accepted"].iloc[:-1] + 1).sum())
            if 0 <= given < mine["accepted"].iloc[-1]:
                rounds.loc[mine.index[-1], ["drafted", "accepted"]] = given
                mine = rounds.loc[mine.index]
        drafted, accepted = int(mine["drafted"].sum()), int(mine["accepted"].sum())
        verified = int(verifies_draft(mine).sum())
        rates = (mine["accepted"] / mine["drafted"])[mine["drafted"] > 0]
        requests.loc[index, ["drafted_tokens", "accepted_tokens", "verifications"]] = drafted, accepted, verified
        if request["status"] == OK:
            requests.loc[index, "average_acceptance_rate"] = rates.mean()
            requests.loc[index, "mean_accepted_length"] = request["generated_tokens"] / len(mine)
            requests.loc[index, "acceptance_length"] = 1 + ratio(accepted, verified)
            requests.loc[index, "draft_acceptance_rate"] = ratio(accepted, drafted)
    return requests, rounds


def _check_one_configuration(requests: DataFrame, path: Path, made_by: str) -> None:
    if str(path) not in requests.index.get_level_values("file"):
        raise UserError(f"{path}: has no request, only the header; {made_by}")
    own = requests.loc[str(path)]
    for name in CONFIGURATION:
        if len(values := own[name].unique()) > 1:
            raise UserError(
                f"{path}: mixes requests with {name} {listed(sorted(map(str, values)))}: "
                "a run folder holds one configuration; make it again"
            )


def _check_unique(table: DataFrame, key: list[str]) -> None:
    whole = [*keys_of(table), *key]
    twice = table[table.duplicated(whole, keep=False)]
    if twice.empty:
        return
    first = twice.iloc[0]
    same = twice[(twice[whole] == first[whole]).all(axis=1)]
    told = [name for name in key if name != "repeat" or first[name] > 1]
    what = ", ".join([_named(first), *(f"{name} {first[name]}" for name in told)])
    raise UserError(
        f"{what} occurs {len(same)} times, in {listed(same.index.unique('file'))}: "
        "a run folder holds one configuration, each request once; take out the run that does not belong"
    )


def _check_same_requests(requests: DataFrame) -> None:
    if SERIES in requests:
        for _, own in requests.groupby(SERIES):
            _check_same_requests(own.drop(columns=SERIES))
        return
    _check_same_prompts(requests)
    names = requests["request_id"].str.cat(requests["repeat"].map(lambda n: f" (repeat {n})" if n > 1 else ""))
    everyone = set(names)
    for _, own in requests.groupby(configuration_of(requests), sort=False):
        if missing := sorted(everyone - set(names[own.index])):
            raise UserError(
                f"{listed(own.index.unique('file'))}: {_named(own.iloc[0])} lacks {len(missing)} of {len(everyone)} "
                f"requests that other runs have: {listed(missing)}; run it again on the same dataset"
            )


def _check_same_prompts(requests: DataFrame) -> None:
    """What is said of a request in every table: other tokens or another seed are another request of the same name."""
    for name in ("prompt_length", "seed", "category"):
        first = requests.drop_duplicates("request_id").set_index("request_id")[name]
        other = requests[requests[name].to_numpy() != first.loc[requests["request_id"]].to_numpy()]
        if not other.empty:
            row, request = other.iloc[0], other.iloc[0]["request_id"]
            files = requests.index.get_level_values("file")
            raise UserError(
                f"these runs do not belong together: request {request} has {name} {first[request]} in "
                f"{files[(requests['request_id'] == request).to_numpy()][0]} and {row[name]} in {other.index[0][0]}. "
                f"{KEEP_APART}"
            )


def _check_finished(requests: DataFrame) -> None:
    for _, own in requests.groupby(configuration_of(requests), sort=False):
        if (own["status"] == FAILED).all():
            raise UserError(
                f"{listed(own.index.unique('file'))}: every request of {_named(own.iloc[0])} failed, the first one "
                f"with: {own['error_message'].iloc[0]}; run it again"
            )


def _check_rounds(requests: DataFrame, rounds: DataFrame) -> None:
    key = [*keys_of(requests), "request_id", "repeat"]
    stray = rounds[~tuples(rounds[key]).isin(set(tuples(requests[key])))]
    if not stray.empty:
        (file, _), row = stray.index[0], stray.iloc[0]
        raise UserError(
            f"{file}: has a round of request {row['request_id']} at {_named(row)}, "
            "which requests.csv does not list: the two files are of different runs; make that run again"
        )
