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

from pandas import DataFrame, Series

from specsplit.analysis.reading import listed, read_files
from specsplit.analysis.repeats import median_over_repeats
from specsplit.analysis.statistics import bootstrap_mean_ci, bootstrap_ratio_ci, paired_ratio_ci
from specsplit.errors import UserError
from specsplit.experiment.columns import FAILED, OK, RequestRecord, RoundRecord
from specsplit.experiment.sweep import AUTO, MODES, gamma_order
from specsplit.settings.axes import CONFIGURATION, PLAIN

TIMES = ("tpot_ms", "itl_ms", "ttft_ms", "total_latency_ms")
METRICS = (*TIMES, "average_acceptance_rate", "mean_accepted_length", "network_idle_fraction")

PER_REQUEST = (*CONFIGURATION, "request_id")
_CHOICE = ("sampling", "temperature", "top_k", "top_p")  # what the text depends on
_NETWORK = ("rtt_ms", "jitter_ms")

# Column name -> type of its cells, as the records annotate it.
_REQUEST_TYPES = {field.name: str(field.type) for field in fields(RequestRecord)}
_ROUND_TYPES = {field.name: str(field.type) for field in fields(RoundRecord)}
_MERGED_TYPES = {**_REQUEST_TYPES, "matches_gamma0": "bool | None"}
_MERGED_ROUND_TYPES = {**_ROUND_TYPES, **{name: _REQUEST_TYPES[name] for name in CONFIGURATION[1:]}}


def merge_runs(run_dirs: Sequence[Path]) -> tuple[DataFrame, DataFrame]:
    """The requests and the rounds of all runs, each sorted by configuration, then in the order of the files.

    run_dirs: one folder a configuration, in any order, each with `requests.csv` and `per_round.csv`. Columns that the
    records of `specsplit.experiment.columns` do not have are left out. Configurations are sorted by how tokens are
    chosen, network, draft, mode, tree and gamma (`auto` last), so that each curve stands together.

    The requests get one more column, `matches_gamma0`: whether the text is the one that gamma 0, the target alone,
    gave for the same request and the same way to choose tokens. Empty without such a gamma 0, where one of the two
    failed, and for rejection sampling at a temperature above 0, which is right in distribution and not token for token.
    Requests that failed are rows like all others; `finished` takes them out. The rounds get the
    configuration of their request, all CONFIGURATION but gamma, which they have.

    Raises UserError when a file is missing or malformed, a folder mixes configurations, a request of a configuration
    occurs twice, a configuration lacks a request that another has or has none that did not fail, or a round belongs to
    no request.
    """
    if not run_dirs:
        raise UserError("no run folder given: name one folder for each gamma, e.g. results/runs/gamma_0")
    made_by = "`specsplit bench` or the workflow's benchmark rule writes it"
    requests = read_files([Path(run) / "requests.csv" for run in run_dirs], _REQUEST_TYPES, made_by)
    rounds = read_files([Path(run) / "per_round.csv" for run in run_dirs], _ROUND_TYPES, made_by)
    for run in run_dirs:
        _check_one_configuration(requests, Path(run) / "requests.csv", made_by)
    settings = requests.droplevel("row")[list(CONFIGURATION[1:])]
    settings = settings[~settings.index.duplicated()].rename(lambda file: str(Path(file).with_name("per_round.csv")))
    for name in settings:
        rounds[name] = settings[name].reindex(rounds.index.get_level_values("file")).array
    requests, rounds = _checked(requests, rounds)
    return requests.assign(matches_gamma0=_matches_gamma0(requests)), rounds


def read_tables(results_dir: Path) -> tuple[DataFrame, DataFrame]:
    """The merged `requests.csv` and `per_round.csv` of a results folder, as `merge_runs` returned them.

    Raises UserError when one is missing, empty or malformed, and for the same contradictions as `merge_runs`.
    """
    made_by = f"`specsplit bench` or the workflow (`snakemake --cores 2 {results_dir}/summary.csv`) makes it"
    requests = read_files([Path(results_dir) / "requests.csv"], _MERGED_TYPES, made_by)
    rounds = read_files([Path(results_dir) / "per_round.csv"], _MERGED_ROUND_TYPES, made_by)
    if requests.empty:
        raise UserError(f"{Path(results_dir) / 'requests.csv'}: has no request, only the header; {made_by}")
    return _checked(requests, rounds)


def finished(requests: DataFrame, rounds: DataFrame) -> tuple[DataFrame, DataFrame]:
    """The requests that did not fail, and their rounds: what every mean is over."""
    failed = requests["status"] == FAILED
    if not failed.any():
        return requests, rounds
    key = [*CONFIGURATION, "request_id", "repeat"]
    return requests[~failed], rounds[~_tuples(rounds[key]).isin(set(_tuples(requests.loc[failed, key])))]


def paired(own: DataFrame, other: DataFrame) -> tuple[DataFrame, DataFrame]:
    """The requests that both have, row beside row, in the order of `own`."""
    own = own[own["request_id"].isin(other["request_id"])]
    return own, other.set_index("request_id").loc[own["request_id"]]


def summarize(
    requests: DataFrame,
    rounds: DataFrame,
    *,
    confidence: float = 0.95,
    bootstrap_samples: int = 10_000,
    seed: int = 0,
) -> DataFrame:
    """One row a configuration, in their order, from the tables of `merge_runs` or `read_tables`.

    All but the last two columns is over requests that did not fail. Where requests were repeated, all but
    `inter_chunk_ms` and `acceptance_at` is of the medians over the repeats of each request (`median_over_repeats`), so
    that intervals are over prompts.

    gamma, mode, tree, draft, sampling, temperature, top_k, top_p, rtt_ms, jitter_ms
        the configuration; gamma is a number or `auto`.
    requests, repeats, generated_tokens
        number of requests that did not fail, times that each was run, tokens generated by all of them once.
    speedup, speedup_ci_low, speedup_ci_high
        end to end against gamma 0 with the same way to choose tokens and the same network: its milliseconds per
        generated token (total latency / tokens, over all requests) divided by this configuration's. Paired
        bootstrap: the same requests on both sides, those that failed on neither. 1, [1, 1] for gamma 0 itself. Empty
        without such a gamma 0 or without tokens; the interval also with a single request.
    <m>_mean, <m>_ci_low, <m>_ci_high, <m>_median for each m of METRICS
        over requests that have the value. The median is p50. Milliseconds for TIMES, shares for the rates and
        fractions, tokens a round for mean_accepted_length. Empty when no request has the value: tpot_ms needs
        two generated tokens, ttft_ms one, average_acceptance_rate a draft (never at gamma 0),
        mean_accepted_length a round. The interval is also empty when only one request has it.
    <m>_p90, <m>_p99 for each m of TIMES
        linear interpolation between requests: with fewer than 100 of them p99 is close to the slowest one.
    inter_chunk_ms_median, _p90, _p99
        time from the tokens of a round to those of the next one, over all rounds but the first of each text. Empty
        where no text has two rounds.
    tokens_per_second
        all tokens / total latency of all requests, one after the other.
    speculation_hits, speculation_misses, hit_rate, hit_rate_ci_low, hit_rate_ci_high
        rounds whose draft was made while the round before was verified, rounds for which that did not foresee what
        was accepted, and hits / (hits + misses) with an interval over requests. Empty where nothing was drafted
        ahead, as in mode sync.
    acceptance_at_1 .. acceptance_at_K, K = the largest gamma, or depth drafted at gamma auto
        how often the i-th drafted token was accepted, among rounds that drafted it and accepted the i-1
        before it. Empty where there was no such round.
    lossless
        share of requests with the text of gamma 0. Empty where `matches_gamma0` is: without a gamma 0, and for
        rejection sampling at a temperature above 0.
    failed_requests, worker_failures
        rows with status failed; rounds in which a worker failed, got over or not, of all rows.

    Raises UserError for impossible confidence or bootstrap_samples.
    """
    settings: dict[str, Any] = {"confidence": confidence, "samples": bootstrap_samples, "seed": seed}
    every = dict(list(requests.groupby(configuration_of(requests), sort=False)))
    requests, rounds = finished(requests, rounds)
    repeats = requests["repeat"].nunique()
    requests = median_over_repeats(requests, PER_REQUEST, "matches_gamma0")
    numbers = [gamma for gamma in requests["gamma"] if gamma != AUTO]
    deepest = max([*numbers, *rounds.loc[rounds["gamma"] == AUTO, "drafted"]], default=0)
    conditions = _conditions(requests, *_NETWORK)
    baseline = requests[requests["gamma"] == 0]
    baselines = dict(list(baseline.groupby(conditions[baseline.index], sort=False)))
    rounds_of = dict(list(rounds.groupby(configuration_of(rounds), sort=False)))
    rows = []
    for configuration, own in requests.groupby(configuration_of(requests), sort=False):
        own_rounds = rounds_of.get(configuration, rounds[:0])
        alone = baselines.get(conditions[own.index[0]], baseline[:0])
        tokens, latency = own["generated_tokens"].sum(), own["total_latency_ms"].sum()
        row: dict[str, Any] = {name: own[name].iloc[0] for name in CONFIGURATION}
        row |= {"requests": len(own), "repeats": repeats, "generated_tokens": int(tokens)}
        row |= _speedup(own, alone, settings)
        for metric in METRICS:
            row |= metric_columns(own[metric], metric, settings)
        gaps = own_rounds.groupby(["request_id", "repeat"], sort=False)["arrived_ms"].diff()
        row |= quantiles(gaps, "inter_chunk_ms", (50, 90, 99))
        row["tokens_per_second"] = _ratio(1000 * tokens, latency)
        row |= _speculation(own, settings)
        for position in range(1, int(deepest) + 1):
            reached, kept = draft_position(own_rounds, position)
            row[f"acceptance_at_{position}"] = _ratio(kept.sum(), reached.sum())
        compared = own["matches_gamma0"].dropna()
        row["lossless"] = _ratio(compared.sum(), len(compared))
        row["failed_requests"] = int((every[configuration]["status"] == FAILED).sum())
        row["worker_failures"] = int(every[configuration][["draft_failures", "target_failures"]].to_numpy().sum())
        rows.append(row)
    return _sorted(DataFrame(rows))


def draft_position(rounds: DataFrame, position: int) -> tuple[Series, Series]:
    """Whether each round reached the draft's token number `position` (from 1), and whether it was kept there.

    A round reaches a position when it drafted that far and every token before it was accepted.
    """
    reached = (rounds["drafted"] >= position) & (rounds["accepted"] >= position - 1)
    return reached, reached & (rounds["accepted"] >= position)


def _speedup(own: DataFrame, alone: DataFrame, settings: dict[str, Any]) -> dict[str, float]:
    speedup, low, high = math.nan, math.nan, math.nan
    if not alone.empty and own["gamma"].iloc[0] == 0:
        speedup, low, high = 1.0, 1.0, 1.0
    elif not alone.empty:
        ours, base = paired(own, alone)
        columns = [table[name] for table in (base, ours) for name in ("total_latency_ms", "generated_tokens")]
        base_ms, base_tokens, our_ms, our_tokens = (column.sum() for column in columns)
        speedup = _ratio(_ratio(base_ms, base_tokens), _ratio(our_ms, our_tokens))
        low, high = paired_ratio_ci(*columns, **settings)
    return {"speedup": speedup, "speedup_ci_low": low, "speedup_ci_high": high}


def quantiles(values: Series, name: str, percents: Sequence[int]) -> dict[str, float]:
    """{NAME_median, NAME_p90, ...} of the values that are there; NaN when there are none."""
    return {
        f"{name}_{'median' if percent == 50 else f'p{percent}'}": float(values.dropna().quantile(percent / 100))
        for percent in percents
    }


def metric_columns(values: Series, name: str, settings: dict[str, Any]) -> dict[str, float]:
    """NAME_mean, its interval and the median of the values that are there; of times p90 and p99 as well."""
    values = values.dropna()
    low, high = bootstrap_mean_ci(values.to_numpy(), **settings)
    row = {f"{name}_mean": float(values.mean()), f"{name}_ci_low": low, f"{name}_ci_high": high}
    return row | quantiles(values, name, (50, 90, 99) if name in TIMES else (50,))


def _speculation(own: DataFrame, settings: dict[str, Any]) -> dict[str, float]:
    hits, misses = own["speculation_hits"], own["speculation_misses"]
    low, high = math.nan, math.nan
    if (hits + misses).any():
        low, high = bootstrap_ratio_ci(hits, hits + misses, **settings)
    row = {"speculation_hits": hits.sum(), "speculation_misses": misses.sum()}
    return row | {"hit_rate": _ratio(hits.sum(), sum(row.values())), "hit_rate_ci_low": low, "hit_rate_ci_high": high}


def _ratio(top: float, bottom: float) -> float:
    return float(top / bottom) if bottom else math.nan


# Configurations.


def configuration_of(table: DataFrame, names: Sequence[str] = CONFIGURATION) -> Series:
    """The configuration of each row, or the part of it that `names` says, as one tuple that can be compared."""
    return _tuples(table[list(names)])


def _conditions(requests: DataFrame, *more: str) -> Series:
    """How the tokens of each row are chosen, and `more` columns. To greedy decoding the rest of sampling is nothing."""
    greedy = requests["temperature"] == 0
    chosen = {name: requests[name].mask(greedy, PLAIN[name]) for name in _CHOICE}
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
    others = [name for name, plain in PLAIN.items() if row[name] != plain]
    return ", ".join(f"{name} {row[name]}" for name in ("gamma", *others))


# Reading and checking.


def _checked(requests: DataFrame, rounds: DataFrame) -> tuple[DataFrame, DataFrame]:
    """The tables in order, after every contradiction in them was looked for."""
    _check_unique(requests, ["request_id", "repeat"])
    _check_unique(rounds, ["request_id", "repeat", "round"])
    _check_same_requests(requests)
    _check_finished(requests)
    _check_rounds(requests, rounds)
    return _sorted(requests), _sorted(rounds)


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
    twice = table[table.duplicated([*CONFIGURATION, *key], keep=False)]
    if twice.empty:
        return
    first = twice.iloc[0]
    same = twice[(twice[[*CONFIGURATION, *key]] == first[[*CONFIGURATION, *key]]).all(axis=1)]
    told = [name for name in key if name != "repeat" or first[name] > 1]
    what = ", ".join([_named(first), *(f"{name} {first[name]}" for name in told)])
    raise UserError(
        f"{what} occurs {len(same)} times, in {listed(same.index.unique('file'))}: "
        "a run folder holds one configuration, each request once; take out the run that does not belong"
    )


def _check_same_requests(requests: DataFrame) -> None:
    names = requests["request_id"].str.cat(requests["repeat"].map(lambda n: f" (repeat {n})" if n > 1 else ""))
    everyone = set(names)
    for _, own in requests.groupby(configuration_of(requests), sort=False):
        if missing := sorted(everyone - set(names[own.index])):
            raise UserError(
                f"{listed(own.index.unique('file'))}: {_named(own.iloc[0])} lacks {len(missing)} of {len(everyone)} "
                f"requests that other runs have: {listed(missing)}; run it again on the same dataset"
            )


def _check_finished(requests: DataFrame) -> None:
    for _, own in requests.groupby(configuration_of(requests), sort=False):
        if (own["status"] == FAILED).all():
            raise UserError(
                f"{listed(own.index.unique('file'))}: every request of {_named(own.iloc[0])} failed, the first one "
                f"with: {own['error_message'].iloc[0]}; run it again"
            )


def _check_rounds(requests: DataFrame, rounds: DataFrame) -> None:
    key = [*CONFIGURATION, "request_id", "repeat"]
    stray = rounds[~_tuples(rounds[key]).isin(set(_tuples(requests[key])))]
    if not stray.empty:
        (file, _), row = stray.index[0], stray.iloc[0]
        raise UserError(
            f"{file}: has a round of request {row['request_id']} at {_named(row)}, "
            "which requests.csv does not list: the two files are of different runs; make that run again"
        )
