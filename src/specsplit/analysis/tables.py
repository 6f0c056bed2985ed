"""The tables of an experiment: the runs of a sweep put together, and their summary.

`merge_runs` reads the folder of each run, `read_tables` reads them
again, and `summarize` makes one row a configuration. What is wrong in a file is refused with its name and line: a
table that lost rows on the way would still give plausible means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from pandas import DataFrame, Series, isna

from specsplit.analysis.reading import listed, read_files
from specsplit.analysis.repeats import median_over_repeats
from specsplit.analysis.statistics import (
    Comparison,
    bounded_mean_ci,
    check_confidence,
    compare_jointly,
    mean_ci,
    paired_ratio_ci,
    quantile,
    rate_ci,
)
from specsplit.errors import UserError
from specsplit.experiment.columns import FAILED, OK, RequestRecord, RoundRecord
from specsplit.io import read_json_object
from specsplit.provenance.facts import read_facts, refuse_differences, told_apart
from specsplit.settings.axes import CONFIGURATION, PLAIN, SERIES, SWEPT
from specsplit.settings.run import AUTO, MODES, gamma_order

TIMES = ("tpot_ms", "itl_ms", "ttft_ms", "total_latency_ms")
METRICS = (*TIMES, "average_acceptance_rate", "mean_accepted_length", "network_idle_fraction")

_CHOICE = ("sampling", "temperature", "top_k", "top_p")  # what the text depends on
_NETWORK = ("rtt_ms", "jitter_ms")

# Column name -> type of its cells, as the records annotate it.
_REQUEST_TYPES = {field.name: str(field.type) for field in fields(RequestRecord)}
_ROUND_TYPES = {field.name: str(field.type) for field in fields(RoundRecord)}
_MERGED_TYPES = {**_REQUEST_TYPES, "matches_gamma0": "bool | None", SERIES: "int | None"}
_MERGED_ROUND_TYPES = {**_ROUND_TYPES, **{name: _MERGED_TYPES[name] for name in (*CONFIGURATION[1:], SERIES)}}
KEEP_APART = (
    "Run again what does not belong, or take its folder out; to have them in one table as series that are never "
    "compared: specsplit merge --keep-apart, or statistics.keep_apart in the configuration"
)


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
    series = _series(run_dirs, keep_apart)
    if len(set(series.values())) > 1:
        requests[SERIES] = requests.index.get_level_values("file").map(series)
    settings = requests.droplevel("row")[list(keys_of(requests)[1:])]
    settings = settings[~settings.index.duplicated()].rename(lambda file: str(Path(file).with_name("per_round.csv")))
    for name in settings:
        rounds[name] = settings[name].reindex(rounds.index.get_level_values("file")).array
    requests, rounds = _checked(requests, rounds)
    return requests.assign(matches_gamma0=_matches_gamma0(requests)), rounds


def _series(run_dirs: Sequence[Path], keep_apart: bool) -> dict[str, int]:
    """The series of each run, by the name of its requests.csv."""
    facts = {str(run): read_facts(Path(run)) for run in run_dirs}
    if not keep_apart:
        refuse_differences(facts, KEEP_APART)
    return {str(Path(run) / "requests.csv"): number for run, number in told_apart(facts).items()}


def check_joined(results_dir: Path, requests: DataFrame) -> None:
    """Refuse merged tables whose runs, in `results_dir`/runs, do not agree and were not kept apart.

    Folders of configurations that the tables do not have are not of this sweep.
    """
    if SERIES in requests:
        return
    wanted = set(configuration_of(requests))
    facts = {}
    for run in sorted((results_dir / "runs").glob("*/run.json")):
        settings = read_json_object(run).get("orchestrator") or {}
        if tuple(settings.get(field) for field in SWEPT) in wanted:
            facts[str(run.parent)] = read_facts(run.parent)
    refuse_differences(facts, KEEP_APART)


def read_tables(results_dir: Path) -> tuple[DataFrame, DataFrame]:
    """The merged `requests.csv` and `per_round.csv` of a results folder, as `merge_runs` returned them.

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
    return _checked(requests, rounds)


def comparable(requests: DataFrame, rounds: DataFrame) -> tuple[DataFrame, DataFrame]:
    """What may be compared: requests that every configuration with the same choice of tokens and network finished.

    Returns one row for each configuration and request, the medians over its repeats, and the rounds of all repeats. A
    repeat counts when every configuration finished it. A time that a configuration lacks for a request (one round has
    no time between rounds) is empty in all of them; a configuration that has it for no request does not count.
    """
    turn = ["request_id", "repeat"]
    conditions = _conditions(requests, *_NETWORK)
    keys = _tuples(requests[turn].assign(conditions=conditions))
    shared = ~keys.isin(set(keys[requests["status"] == FAILED]))
    names = [*keys_of(requests), *turn]
    if not shared.all():
        rounds = rounds[_tuples(rounds[names]).isin(set(_tuples(requests.loc[shared, names])))]
    requests, conditions = requests[shared], conditions[shared]
    if requests.empty:
        return requests, rounds
    requests = median_over_repeats(requests, (*keys_of(requests), "request_id"), "matches_gamma0").copy()
    conditions, configurations = conditions[requests.index], configuration_of(requests)
    prompts = _tuples(requests[["request_id"]].assign(conditions=conditions))
    for name in TIMES:
        has = requests[name].notna()
        lacking = ~has & has.groupby(configurations, sort=False).transform("any")
        if lacking.any():
            requests[name] = requests[name].mask(prompts.isin(set(prompts[lacking])))
    return requests, rounds


def compare_panel(
    requests: DataFrame, *, confidence: float, samples: int, seed: int
) -> tuple[list[tuple[Any, ...]], Comparison | None]:
    """The configurations of one choice of tokens and network, gamma 0 first, and how they compare end to end.

    requests: of `comparable`. A configuration of which fewer than two texts have tokens is left out. None as comparison
    without gamma 0, or where too few requests can be compared.
    """
    every = requests.groupby(configuration_of(requests), sort=False)
    own = {key: rows for key, rows in every if (rows["generated_tokens"] > 0).sum() > 1}
    order = sorted(own, key=lambda configuration: configuration[0] != 0)
    if not order or order[0][0] != 0:
        return order, None
    columns = [own[configuration].sort_values("request_id") for configuration in order]
    times, tokens = (
        [own[name].to_numpy(float) for own in columns] for name in ("total_latency_ms", "generated_tokens")
    )
    return order, compare_jointly(times, tokens, confidence=confidence, samples=samples, seed=seed)


def summarize(
    requests: DataFrame,
    rounds: DataFrame,
    *,
    confidence: float = 0.95,
    bootstrap_samples: int = 10_000,
    seed: int = 0,
) -> DataFrame:
    """One row a configuration, in their order, from the tables of `merge_runs` or `read_tables`.

    Rows are compared on the same requests: all columns but `requests`, the `lossless` and the failures are over those
    that every configuration with the same choice of tokens and network finished (`comparable`). Where requests were
    repeated, all but `inter_chunk_ms` and what is over rounds is of the medians over the repeats of each request, so
    that intervals are over prompts. No interval is given below `MIN_PROMPTS` (6) requests.

    gamma, mode, tree, draft, sampling, temperature, top_k, top_p, rtt_ms, jitter_ms
        the configuration; gamma is a number or `auto`.
    requests, compared, repeats, generated_tokens
        number of requests that did not fail; of those that every configuration finished, which the rest is over; times
        that each was run; tokens generated by the compared ones once.
    speedup, speedup_ci_low, speedup_ci_high
        end to end against gamma 0 with the same way to choose tokens and the same network: its milliseconds per
        generated token (total latency / tokens, over all requests) divided by this configuration's; an interval for
        this row alone (`paired_ratio_ci`). 1, [1, 1] for gamma 0 itself. Empty without such a gamma 0 or tokens.
    speedup_joint_low, speedup_joint_high
        the interval that holds for all rows with this choice and network at once (`compare_jointly`): to judge a row
        that was picked by its speedup.
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
    speculation_hits, speculation_misses, hit_rate, hit_rate_ci_low, hit_rate_ci_high
        rounds whose draft was made while the round before was verified, rounds for which that did not foresee what
        was accepted, and hits / (hits + misses) with an interval over requests. Empty where nothing was drafted
        ahead, as in mode sync.
    acceptance_length, _ci_low, _ci_high, acceptance_length_mean
        1 + accepted / verifications over all requests together, and the mean of that of each request. Empty where
        nothing was drafted, as at gamma 0.
    draft_acceptance_rate, _ci_low, _ci_high
        accepted / drafted tokens over all requests together.
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
    failed_requests, worker_failures
        rows with status failed; rounds in which a worker failed, got over or not, of all rows.

    Raises UserError for impossible confidence or bootstrap_samples.
    """
    check_confidence(confidence)
    every = dict(list(requests.groupby(configuration_of(requests), sort=False)))
    shared, rounds = comparable(requests, rounds)
    numbers = [gamma for gamma in requests["gamma"] if gamma != AUTO]
    deepest = max([*numbers, *rounds.loc[rounds["gamma"] == AUTO, "drafted"]], default=0)
    own_of = dict(list(shared.groupby(configuration_of(shared), sort=False)))
    rounds_of = dict(list(rounds.groupby(configuration_of(rounds), sort=False)))
    conditions = _conditions(requests, *_NETWORK)
    alone_of: dict[Any, DataFrame] = {}
    joint: dict[Any, tuple[float, float]] = {}
    for condition, panel in shared.groupby(conditions[shared.index], sort=False):
        alone_of[condition] = panel[panel["gamma"] == 0]
        order, found = compare_panel(panel, confidence=confidence, samples=bootstrap_samples, seed=seed)
        joint |= {key: found.against_first(place) for place, key in enumerate(order)} if found else {}
    rows = []
    for configuration, all_own in every.items():
        own, own_rounds = own_of.get(configuration, shared[:0]), rounds_of.get(configuration, rounds[:0])
        alone = alone_of.get(conditions[all_own.index[0]], shared[:0])
        low, high = joint.get(configuration, (math.nan, math.nan))
        ended = all_own[all_own["status"] == OK]
        tokens = own["generated_tokens"].sum()
        row: dict[str, Any] = {name: all_own[name].iloc[0] for name in keys_of(all_own)}
        row |= {"requests": ended["request_id"].nunique(), "compared": len(own)}
        row |= {"repeats": all_own["repeat"].nunique(), "generated_tokens": int(tokens)}
        row |= _speedup(own, alone, confidence)
        row |= {"speedup_joint_low": low, "speedup_joint_high": high}
        for metric in METRICS:
            upper = {"average_acceptance_rate": 1.0, "mean_accepted_length": _depth(own_rounds, configuration) + 1}
            bound = upper.get(metric) if configuration[0] != 0 else None
            row |= metric_columns(own[metric], metric, confidence, bound)
        gaps = own_rounds.groupby(["request_id", "repeat"], sort=False)["arrived_ms"].diff()
        row |= quantiles(gaps, "inter_chunk_ms", (50, 90, 99))
        row["tokens_per_second"] = _ratio(1000 * tokens, own["total_latency_ms"].sum())
        row |= _speculation(own, confidence)
        row |= _acceptance(own, own_rounds, configuration, confidence)
        row |= _positions(own_rounds, int(deepest))
        texts = median_over_repeats(ended, (*keys_of(ended), "request_id"), "matches_gamma0")["matches_gamma0"].dropna()
        row |= {"lossless": _ratio(texts.sum(), len(texts)), "lossless_compared": len(texts)}
        row["failed_requests"] = int((all_own["status"] == FAILED).sum())
        row["worker_failures"] = int(all_own[["draft_failures", "target_failures"]].to_numpy().sum())
        rows.append(row)
    return _sorted(DataFrame(rows))


def draft_position(rounds: DataFrame, position: int) -> tuple[Series, Series]:
    """Whether each round reached the draft's token number `position` (from 1), and whether it was kept there.

    A round reaches a position when it drafted that far and every token before it was accepted.
    """
    reached = (rounds["drafted"] >= position) & (rounds["accepted"] >= position - 1)
    return reached, reached & (rounds["accepted"] >= position)


def verifies_draft(rounds: DataFrame) -> Series:
    """Whether each round verified a draft, whatever of it counts as drafted."""
    return (rounds["tree_nodes"] > 0) | (rounds["drafted"] > 0)


def _speedup(own: DataFrame, alone: DataFrame, confidence: float) -> dict[str, float]:
    speedup, low, high = math.nan, math.nan, math.nan
    if not alone.empty and own["gamma"].iloc[0] == 0:
        speedup, low, high = 1.0, 1.0, 1.0
    elif not alone.empty:
        base = alone.set_index("request_id").loc[own["request_id"]]
        columns = [table[name] for table in (base, own) for name in ("total_latency_ms", "generated_tokens")]
        base_ms, base_tokens, our_ms, our_tokens = (column.sum() for column in columns)
        speedup = _ratio(_ratio(base_ms, base_tokens), _ratio(our_ms, our_tokens))
        low, high = paired_ratio_ci(*columns, confidence=confidence)
    return {"speedup": speedup, "speedup_ci_low": low, "speedup_ci_high": high}


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
    return row | {"hit_rate": _ratio(hits.sum(), sum(row.values())), "hit_rate_ci_low": low, "hit_rate_ci_high": high}


def _acceptance(
    own: DataFrame, rounds: DataFrame, configuration: tuple[Any, ...], confidence: float
) -> dict[str, float]:
    drafted, accepted = own["drafted_tokens"].to_numpy(float), own["accepted_tokens"].to_numpy(float)
    counted = rounds[verifies_draft(rounds) & (rounds["repeat"] == rounds["repeat"].min())].groupby("request_id").size()
    verified = own["verifications"].fillna(own["request_id"].map(counted)).fillna(0).to_numpy(float)
    depth = _depth(rounds, configuration)
    low, high = rate_ci(accepted * (verified > 0) / max(depth, 1), verified, confidence=confidence)
    rate_low, rate_high = rate_ci(accepted, drafted, confidence=confidence)
    return {
        "acceptance_length": 1 + _ratio(accepted.sum(), verified.sum()),
        "acceptance_length_ci_low": 1 + depth * low,
        "acceptance_length_ci_high": 1 + depth * high,
        "acceptance_length_mean": float(own["acceptance_length"].mean()),
        "draft_acceptance_rate": _ratio(accepted.sum(), drafted.sum()),
        "draft_acceptance_rate_ci_low": rate_low,
        "draft_acceptance_rate_ci_high": rate_high,
    }


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
        at[f"acceptance_at_{position}"] = _ratio(kept.sum(), reached.sum())
        jointly[f"joint_acceptance_at_{position}"] = _ratio(kept.sum(), len(verified))
    counts = {
        f"rounds_accepting_{number}": int((verified["accepted"] == number).sum()) for number in range(deepest + 1)
    }
    return {**at, **jointly, **counts}


def _ratio(top: float, bottom: float) -> float:
    return float(top / bottom) if bottom else math.nan


# Configurations.


def keys_of(table: DataFrame) -> tuple[str, ...]:
    """The columns of a configuration: that of the series is among them where runs were kept apart."""
    return (*CONFIGURATION, SERIES) if SERIES in table else CONFIGURATION


def configuration_of(table: DataFrame, names: Sequence[str] = ()) -> Series:
    """The configuration of each row, or the part of it that `names` says, as one tuple that can be compared."""
    return _tuples(table[list(names or keys_of(table))])


def _conditions(requests: DataFrame, *more: str) -> Series:
    """How the tokens of each row are chosen, and `more` columns. To greedy decoding the rest of sampling is nothing."""
    greedy = requests["temperature"] == 0
    chosen = {name: requests[name].mask(greedy, PLAIN[name]) for name in _CHOICE}
    more = (*more, SERIES) if SERIES in requests else more
    return _tuples(DataFrame({**chosen, **{name: requests[name] for name in more}}))


def _tuples(table: DataFrame) -> Series:
    return Series(list(table.itertuples(index=False, name=None)), index=table.index, dtype=object)


def _matches_gamma0(requests: DataFrame) -> Series:
    # The network does not change a text: where several networks have a gamma 0, the first one is compared with.
    texts = _tuples(requests[["request_id"]].assign(conditions=_conditions(requests)))
    ok = requests["status"] == OK
    base = (requests["gamma"] == 0) & ok
    alone: dict[Any, str] = {}
    for text, found in zip(texts[base], requests.loc[base, "output_sha256"], strict=True):
        alone.setdefault(text, found)
    expected = texts.map(lambda text: alone.get(text))
    matches = (requests["output_sha256"] == expected).astype("boolean")
    random = (requests["sampling"] == "rejection") & (requests["temperature"] > 0)
    return matches.mask(expected.isna() | random | ~ok)


def _sorted(table: DataFrame) -> DataFrame:
    """By configuration, each curve together; rows of one configuration stay in their order."""
    ranks = {
        **({SERIES: table[SERIES]} if SERIES in table else {}),
        **{name: table[name] for name in ("temperature", "top_k", "top_p", "sampling", *_NETWORK)},
        "other_draft": table["draft"] != PLAIN["draft"],
        "draft": table["draft"],
        "mode": table["mode"].map({mode: rank for rank, mode in enumerate(MODES)}),
        "other_tree": table["tree"] != PLAIN["tree"],
        "tree": table["tree"],
        "gamma": table["gamma"].map(gamma_order),
    }
    order = DataFrame(ranks).reset_index(drop=True).sort_values(list(ranks), kind="stable").index
    return table.iloc[order].reset_index(drop=True)


def _named(row: Series) -> str:
    """A configuration in words, with what is not plain: "gamma 5, mode overlap"."""
    others = [name for name, plain in {**PLAIN, SERIES: 1}.items() if row.get(name, plain) != plain]
    return ", ".join(f"{name} {row[name]}" for name in ("gamma", *others))


# Reading and checking.


def _checked(requests: DataFrame, rounds: DataFrame) -> tuple[DataFrame, DataFrame]:
    """The tables in order, after every contradiction in them was looked for."""
    _check_unique(requests, ["request_id", "repeat"])
    _check_unique(rounds, ["request_id", "repeat", "round"])
    _check_same_requests(requests)
    _check_finished(requests)
    _check_rounds(requests, rounds)
    if requests["verifications"].isna().any():
        requests, rounds = _counted_again(requests, rounds)
    return _sorted(requests), _sorted(rounds)


def _counted_again(requests: DataFrame, rounds: DataFrame) -> tuple[DataFrame, DataFrame]:
    """Tables of an earlier version with acceptance counted as now: nothing from the end of the text on.

    What changes: `drafted` and `accepted` of a last round whose draft held the end of the text, and of each request the
    sums, rates and lengths of its rounds. A request without rounds keeps what it has.
    """
    names = [*keys_of(requests), "request_id", "repeat"]
    requests, rounds = requests.copy(), rounds.copy()
    own = dict(list(rounds.groupby(_tuples(rounds[names]), sort=False)))
    key: Any
    index: Any
    for index, key in _tuples(requests[names]).items():
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
            requests.loc[index, "acceptance_length"] = 1 + _ratio(accepted, verified)
            requests.loc[index, "draft_acceptance_rate"] = _ratio(accepted, drafted)
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
    stray = rounds[~_tuples(rounds[key]).isin(set(_tuples(requests[key])))]
    if not stray.empty:
        (file, _), row = stray.index[0], stray.iloc[0]
        raise UserError(
            f"{file}: has a round of request {row['request_id']} at {_named(row)}, "
            "which requests.csv does not list: the two files are of different runs; make that run again"
        )
