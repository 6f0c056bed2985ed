"""The runs of a sweep put together: one table of requests, one of rounds.

`merge_runs` reads the folder of each run, `read_tables` what was merged. What is wrong in a file is refused with its
name and line: a table that lost rows on the way would still give plausible means.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pandas import DataFrame, Series

from specsplit.analysis.configurations import configuration_of, keys_of, sort_rows, tuples
from specsplit.analysis.measures import ratio, verifies_draft
from specsplit.analysis.reading import read_files
from specsplit.analysis.references import (
    REFERENCE,
    matches_alone,
    merge_references,
    merged_references,
    read_references,
    texts_alone,
    with_references,
)
from specsplit.analysis.series import KEEP_APART, check_joined, series_of
from specsplit.errors import UserError, counted, listed
from specsplit.experiment.columns import FAILED, OK, RequestRecord, RoundRecord
from specsplit.io import write_csv
from specsplit.settings.axes import CONFIGURATION, PLAIN, SERIES

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


def write_merged(results_dir: Path, run_dirs: Sequence[Path], *, keep_apart: bool = False) -> Iterator[str]:
    """Write the tables of `merge_runs`, and `reference.csv` where runs have one; a line to print for each."""
    requests, rounds = merge_runs(run_dirs, keep_apart=keep_apart)
    reference = merged_references(run_dirs, requests)
    (results_dir / REFERENCE).unlink(missing_ok=True)  # of an earlier sweep
    for name, frame in (("requests.csv", requests), ("per_round.csv", rounds), (REFERENCE, reference)):
        if frame is not None:
            write_csv(frame, results_dir / name)
            yield f"{results_dir / name}: {counted(len(frame), 'row')}"


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
    own = dict(list(rounds.sort_values("round").groupby(tuples(rounds[names]), sort=False)))
    index: Any
    for index, key in tuples(requests[requests["verifications"].isna()][names]).items():
        request, mine = requests.loc[index], own.get(key)
        if mine is None:
            continue
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
                f"{listed(own.index.unique('file'))}: {_named(own.iloc[0])} lacks {len(missing)} of "
                f"{counted(len(everyone), 'request')} that other runs have: {listed(missing)}; "
                "run it again on the same dataset"
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
