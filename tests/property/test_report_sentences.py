"""Reports from arbitrary tables: every sentence and every number in it is what the table says."""

from __future__ import annotations

import math
import re
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pandas import DataFrame

from specsplit.analysis.conclusions import (
    compared_sentence,
    drift_sentence,
    faults_sentence,
    lossless_sentence,
    round_trip_sentences,
)
from specsplit.analysis.findings import Finding, find_best
from specsplit.analysis.references import with_references
from specsplit.analysis.statistics import MIN_PROMPTS
from specsplit.analysis.summary_text import summary_table
from specsplit.analysis.tables import summarize
from specsplit.experiment.columns import COLOCATED, FAILED, OK, ROUND_COLUMNS, STREAMED, WORKERS, RequestRecord
from specsplit.settings.axes import CONFIGURATION

SETTINGS: dict[str, Any] = {"confidence": 0.95, "bootstrap_samples": 50, "seed": 0}
TYPES = dict.fromkeys(("ttft_ms", "tpot_ms", "itl_ms", "average_acceptance_rate", "mean_accepted_length"), float)


@st.composite
def experiments(draw: st.DrawFn) -> DataFrame:
    """Tables as `merge_runs` gives them: some gammas, drafts, networks and repeats; ties, losses, failures, empty
    times, texts without a token."""
    prompts = draw(st.integers(1, 9))
    repeats = draw(st.integers(1, 2))
    networks = draw(st.sampled_from([[0.0], [0.0, 14.0]]))
    drafting = draw(
        st.lists(
            st.tuples(st.sampled_from([1, 3, "auto"]), st.sampled_from(["draft", "int8"])), max_size=4, unique=True
        )
    )
    points = [*([(0, "draft")] if not drafting or draw(st.booleans()) else []), *drafting]
    rows = []
    for rtt in networks:
        for gamma, name in points:
            pace = draw(st.sampled_from([50.0, 60.0, 100.0]))
            for prompt in range(prompts):
                for repeat in range(1, repeats + 1):
                    tokens = draw(st.sampled_from([0, 1, 10, 10, 10]))
                    # One request of each configuration finishes: a run in which all failed is refused before.
                    lost = prompt + repeat > 1 and draw(st.integers(0, 5)) == 0
                    latency = pace * (1 + prompt) + draw(st.sampled_from([0.0, 0.0, 7.0]))
                    rows.append(a_row(gamma, name, rtt, f"p{prompt}", repeat, tokens, latency, lost, draw))
    table = DataFrame([vars(row) for row in rows]).astype(TYPES)
    return table.assign(matches_gamma0=matches(table, draw))


def a_row(
    gamma: int | str, draft: str, rtt: float, name: str, repeat: int, tokens: int, latency: float, lost: bool, draw: Any
) -> RequestRecord:
    drafted = 0 if gamma == 0 else 6
    return RequestRecord(
        request_id=name,
        gamma=gamma,
        prompt_length=5,
        generated_tokens=tokens,
        ttft_ms=None if lost or not tokens else latency / 4,
        tpot_ms=None if lost or tokens < 2 else latency / 12,
        average_acceptance_rate=None if lost or not drafted else draw(st.sampled_from([0.0, 0.5, 1.0])),
        total_network_idle_ms=1.0,
        total_latency_ms=latency,
        num_rounds=2,
        category="chat",
        finish_reason="error" if lost else "length",
        drafted_tokens=drafted,
        accepted_tokens=draw(st.integers(0, drafted)),
        mean_accepted_length=None if lost else tokens / 2,
        network_idle_fraction=1 / latency,
        draft_compute_ms=1.0,
        target_compute_ms=1.0,
        mode="sync",
        tree="chain",
        draft=draft,
        sampling="coupled",
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        rtt_ms=rtt,
        jitter_ms=0.0,
        seed=0,
        speculation_hits=0,
        speculation_misses=0,
        output_sha256="x",
        itl_ms=None if lost or tokens < 4 else latency / 10,
        repeat=repeat,
        status=FAILED if lost else OK,
        target_failures=int(lost),
        verifications=2 if drafted else 0,
        acceptance_length=None if lost or not drafted else 1.5,
        draft_acceptance_rate=None if lost or not drafted else 0.5,
    )


def matches(table: DataFrame, draw: Any) -> Any:
    """Known where gamma 0 and the request finished; now and then a text differs."""
    alone = table[(table["gamma"] == 0) & (table["status"] == OK)]
    known = table["request_id"].isin(alone["request_id"]) & (table["status"] == OK)
    values = [
        (draw(st.integers(0, 7)) != 0) or gamma == 0 if ok else None
        for ok, gamma in zip(known, table["gamma"], strict=True)
    ]
    return pd.array(values, dtype="boolean")


def no_rounds() -> DataFrame:
    return DataFrame([], columns=[*ROUND_COLUMNS, *CONFIGURATION[1:]])


def of(table: DataFrame, row: Any) -> DataFrame:
    """The rows of one configuration."""
    same = (table["gamma"] == row["gamma"]) & (table["draft"] == row["draft"]) & (table["rtt_ms"] == row["rtt_ms"])
    return table[same]


def shared(table: DataFrame, rtt: float) -> DataFrame:
    """One row a configuration and prompt of a network, the median of the repeats that nothing failed in."""
    own = table[table["rtt_ms"] == rtt]
    failed = set(own.loc[own["status"] == FAILED, ["request_id", "repeat"]].itertuples(index=False, name=None))
    kept = [key not in failed for key in own[["request_id", "repeat"]].itertuples(index=False, name=None)]
    keys = ["gamma", "draft", "request_id"]
    return own[kept].groupby(keys, sort=False)[["total_latency_ms", "generated_tokens"]].median().reset_index()


def check_finding(finding: Finding, table: DataFrame, summary: DataFrame) -> None:
    text = " ".join(finding.sentences())
    if finding.drafting is None:
        assert not (summary["gamma"] != 0).any()
        assert text == "Only the target alone was run, so there is no speedup to report."
        return
    rtt = finding.best["rtt_ms"]
    own = shared(table, rtt)
    prompts = own["request_id"].nunique()
    every = table["request_id"].nunique()
    counted = re.match(r"Compared on the (\d+)(?: of (\d+))? prompts? that every configuration finished\.", text)
    if not prompts:
        assert text == f"No prompt of {every} was finished by every configuration, so nothing can be compared."
        return
    assert counted
    assert (int(counted[1]), int(counted[2] or counted[1])) == (prompts, every)
    paces = {
        key: rows["total_latency_ms"].sum() / rows["generated_tokens"].sum()
        if rows["generated_tokens"].sum()
        else math.inf
        for key, rows in own.groupby(["gamma", "draft"], sort=False)
    }
    base = paces.get((0, "draft"), math.inf)
    finite = {key: base / pace for key, pace in paces.items() if math.isfinite(pace) and math.isfinite(base)}
    if "Nothing can be said" in text:
        assert not [key for key in finite if key[0] != 0]
        return
    assert finding.best["speedup"] == max(finite.values())
    drafted = max(speedup for (gamma, _), speedup in finite.items() if gamma != 0)
    said = re.search(r"(?:speedup of|target alone:) (\d+\.\d\d)", text)
    assert said
    assert said[1] == f"{drafted:.2f}"
    interval = re.search(r"95 % interval (\S+) to ([\w.]+)\)", text)
    written = {
        key: int((rows["generated_tokens"] > 0).sum()) for key, rows in own.groupby(["gamma", "draft"], sort=False)
    }
    best_draft = (finding.drafting["gamma"], finding.drafting["draft"])
    sure = prompts >= MIN_PROMPTS and min(written[0, "draft"], written[best_draft]) > 1
    assert bool(interval) == sure == ("too few" not in text)
    assert ("too few requests" in text) == (prompts < MIN_PROMPTS)
    low, high = finding.drafting["speedup_ci_low"], finding.drafting["speedup_ci_high"]
    if interval:
        assert (interval[1], interval[2]) == (f"{low:.2f}", f"{high:.2f}")
        assert low <= drafted * (1 + 1e-9)
        assert drafted <= high * (1 + 1e-9)
        assert ("includes 1" in text) == (low <= 1 <= high)
    # Fastest is who can be told from all others.
    sole = not finding.ties and not finding.best["failed_requests"]
    assert ("The target alone is fastest" in text) == (finding.best["gamma"] == 0 and high < 1 and sole)
    if finding.best["gamma"] != 0:
        assert (f"{finding.name} is fastest" in text) == (low > 1 and sole)
    assert (f"Failed requests of {finding.name}: " in text) == (finding.best["failed_requests"] > 0)
    # A tie with the best is named, whatever else is.
    equal = [key for key, speedup in finite.items() if speedup == finding.best["speedup"]]
    assert len(finding.ties) >= len(equal) - 1
    if prompts < MIN_PROMPTS:
        assert len(finding.ties) == len(finite) - 1


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(experiments())
def test_every_sentence_is_what_the_table_says(table: DataFrame) -> None:
    summary = summarize(table, no_rounds(), **SETTINGS)
    assert len(summary) == len(table[["gamma", "draft", "rtt_ms"]].drop_duplicates())
    for _, row in summary.iterrows():
        own = of(table, row)
        assert row["requests"] == own.loc[own["status"] == OK, "request_id"].nunique()
        assert row["failed_requests"] == (own["status"] == FAILED).sum()
        assert row["compared"] == shared(table, row["rtt_ms"])["request_id"].nunique() <= row["requests"]
        if row["compared"] < MIN_PROMPTS:
            ends = [name for name in summary if name.endswith(("_ci_low", "_ci_high", "_joint_low", "_joint_high"))]
            assert row[[name for name in ends if row["gamma"] != 0 or "speedup" not in name]].isna().all()
        assert row.filter(like="_p99").isna().all()
    for finding in find_best(table, no_rounds(), summary, **SETTINGS):
        check_finding(finding, table, summary)

    failed = int((table["status"] == FAILED).sum())
    said = faults_sentence(summary)
    assert (f"{failed} request" in said) == (failed > 0)

    drafting = table[(table["gamma"] != 0) & (table["status"] == OK)]
    texts = drafting.groupby(["gamma", "draft", "rtt_ms", "request_id"], sort=False)["matches_gamma0"]
    verdicts = [own.all(skipna=False) if len(own) > 1 else own.iloc[0] for _, own in texts]
    known = [bool(verdict) for verdict in verdicts if not pd.isna(verdict)]
    sentence = lossless_sentence(summary)
    if known:
        assert sentence.startswith("Yes" if all(known) else f"No: {known.count(False)} of {len(known)} ")
        assert f"{len(known)} text" in sentence
    else:
        assert not sentence.startswith(("Yes", "No:"))
    if len(known) < len(verdicts):
        assert f"Of {len(verdicts) - len(known)} text" in sentence
        assert not known or f"of {len(verdicts)} written" in sentence

    every = table["request_id"].nunique()
    counts = set(summary["compared"])
    assert all(str(number) in compared_sentence(summary, every) for number in (min(counts), max(counts)))
    assert "nan" not in str(summary_table(summary))


@st.composite
def references(draw: st.DrawFn) -> tuple[DataFrame, DataFrame]:
    """A table of requests, and what was measured beside them: at other paces, here and there failed or another text."""
    requests = draw(experiments())
    paces = {setup: draw(st.sampled_from([0.5, 0.9, 1.0, 1.1, 2.0])) for setup in (WORKERS, STREAMED, COLOCATED)}
    rows = []
    for _, own in requests.groupby(["gamma", "draft", "rtt_ms"], sort=False):
        drift = draw(st.sampled_from([1.0, 1.0, 1.05, 1.5]))
        for setup, pace in paces.items():
            if setup == WORKERS and own["gamma"].iloc[0] == 0:
                continue
            alone = {} if setup == COLOCATED else {"gamma": 0, "draft": "draft"}
            some = own.assign(**alone, setup=setup, run_gamma=own["gamma"], run_draft=own["draft"])
            some = some.assign(run_mode="sync", run_tree="chain", status=OK, matches_gamma0=True)
            some["total_latency_ms"] = pace * drift * some["total_latency_ms"]
            if draw(st.integers(0, 3)) == 0:
                some.loc[some.index[draw(st.integers(0, len(some) - 1)) :][:1], "status"] = FAILED
            if draw(st.integers(0, 3)) == 0:
                some.loc[some.index[:1], "matches_gamma0"] = False
            if (some["status"] == FAILED).all():  # a run that is refused
                some["status"] = OK
            rows.append(some)
    reference = pd.concat(rows, ignore_index=True)
    known = (reference["status"] == OK).to_numpy()
    matches = [value if ok else None for value, ok in zip(reference["matches_gamma0"], known, strict=True)]
    return requests, reference.assign(matches_gamma0=pd.array(matches, dtype="boolean"))


def paired(requests: DataFrame, reference: DataFrame, rtt: float) -> DataFrame:
    """One row a run, setup beside it (and its own) and prompt of a network: medians of milliseconds and tokens over the
    repeats in which nothing of any run failed."""
    turn = ["request_id", "repeat"]
    own, beside = requests[requests["rtt_ms"] == rtt], reference[reference["rtt_ms"] == rtt]
    lost = {
        key
        for table in (own, beside)
        for key in table.loc[table["status"] == FAILED, turn].itertuples(index=False, name=None)
    }
    parts = [own.assign(run_gamma=own["gamma"], run_draft=own["draft"], setup="own"), beside]
    table = pd.concat(parts)
    table = table[[key not in lost for key in table[turn].itertuples(index=False, name=None)]]
    keys = ["run_gamma", "run_draft", "setup", "request_id"]
    return table.groupby(keys, sort=False)[["total_latency_ms", "generated_tokens"]].median().reset_index()


def gain(own: DataFrame, setup: str) -> float:
    """How many times as fast as `setup` the configuration of one run is; NaN where neither wrote a token."""
    sums = own.groupby("setup")[["total_latency_ms", "generated_tokens"]].sum()
    if setup not in sums.index or not sums["generated_tokens"].all():
        return math.nan
    pace = sums["total_latency_ms"] / sums["generated_tokens"]
    return float(pace[setup] / pace["own"])


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(references())
def test_every_sentence_about_baselines_is_what_the_tables_say(tables: tuple[DataFrame, DataFrame]) -> None:
    requests, reference = tables
    table = with_references(requests, reference)
    summary = summarize(table, no_rounds(), **SETTINGS)
    ours = summary[summary["setup"] == WORKERS]
    for _, row in ours.iterrows():
        own = paired(requests, reference, row["rtt_ms"])
        assert row["compared"] == own["request_id"].nunique()
        own = own[(own["run_gamma"] == row["gamma"]) & (own["run_draft"] == row["draft"])]
        for name, setup in {"speedup_over_streamed": STREAMED, "speedup_over_colocated": COLOCATED}.items():
            assert row[name] == pytest.approx(gain(own, setup), nan_ok=True)
        if row["gamma"] != 0:
            assert row["speedup"] == pytest.approx(gain(own, WORKERS), nan_ok=True)
    for finding in find_best(table, no_rounds(), summary, **SETTINGS):
        if finding.drafting is None or finding.base != "streamed":
            continue
        rows = ours[(ours["rtt_ms"] == finding.best["rtt_ms"]) & (ours["gamma"] != 0)]
        gains = rows["speedup_over_streamed"].dropna()
        first, text = finding.sentences()[0], " ".join(finding.sentences())
        if not finding.best["compared"]:
            continue
        loop = ours[(ours["rtt_ms"] == finding.best["rtt_ms"]) & (ours["gamma"] == 0)]["speedup_over_streamed"]
        alone = max([1.0, *loop.dropna()])
        every, prompts = requests["request_id"].nunique(), int(rows["compared"].iloc[0])
        counted = re.match(r"Compared on the (\d+)(?: of (\d+))? prompts? that every configuration finished, ", first)
        assert counted
        assert (int(counted[1]), int(counted[2] or counted[1])) == (prompts, every)
        assert "(target_streamed)" in first
        assert f"{gains.max():.2f}" in first
        low, high = (
            finding.drafting["speedup_over_streamed_joint_low"],
            finding.drafting["speedup_over_streamed_joint_high"],
        )
        sole = not finding.ties and not finding.best["failed_requests"]
        assert ("is fastest" in first) == (gains.max() > alone and low > 1 and sole)
        assert (", no draft " in first) == (gains.max() <= alone)
        assert ("(95 % interval" in first) == (not math.isnan(low))
        assert ("includes 1" in text) == (low <= 1 <= high)
        for column, words in {
            "speedup": "gamma 0 through the same loop",
            "speedup_over_colocated": "(colocated)",
        }.items():
            value = finding.drafting[column]
            said = re.search(rf"Over [^.]*{re.escape(words)} its speedup is (\d+\.\d\d)", text)
            assert (said is None) == math.isnan(value)
            assert said is None or said[1] == f"{value:.2f}"
    for sentence in round_trip_sentences(summary, 0.95):
        assert "target_streamed" in sentence or "colocated" in sentence
        for place in re.findall(r"(\d+) ms: ([a-z ]+), \d", sentence):
            name = f"speedup_over_{'streamed' if 'target_streamed' in sentence else 'colocated'}_joint"
            rows = ours[(ours["rtt_ms"] == float(place[0])) & (ours["gamma"] != 0)]
            best = rows.loc[rows["speedup_over_streamed"].idxmax()]
            verdict = "faster" if best[f"{name}_low"] > 1 else "slower" if best[f"{name}_high"] < 1 else "not distin"
            assert place[1].startswith("too few" if math.isnan(best[f"{name}_low"]) else verdict)
    said = drift_sentence(summary)
    apart = [
        own["reference_ms_per_token"].max() / own["reference_ms_per_token"].min() - 1
        for _, own in ours[ours["reference_ms_per_token"].notna()].groupby("rtt_ms")
        if len(own) > 1
    ]
    chance = ours["reference_drifted"].notna().any() and not ours["reference_drifted"].fillna(False).any()
    assert said.startswith("Warning") or chance or not any(value > 0.1 for value in apart)
    assert not said.startswith("Warning") or any(value > 0.1 for value in apart)
    assert not apart or f"{100 * max(apart):.1f} % apart" in said
    known = reference["matches_gamma0"].dropna()
    if len(known):
        differing = int((~known.astype(bool)).sum())
        assert f"{differing or 'None'} of the {len(known)} texts of baselines" in lossless_sentence(summary)
    failed = int((reference["status"] == FAILED).sum())
    assert (f"{failed} text" in faults_sentence(summary)) == (failed > 0)
    assert "nan" not in str(summary_table(summary))
