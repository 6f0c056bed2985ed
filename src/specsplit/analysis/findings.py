"""What a summary says, in words and as a table for a screen: which configuration is best, by how much, how surely.

The best of several means overestimates, and its neighbours are often as good. So its interval is the one that holds for
all configurations at once, and those that cannot be told from it, all pairs judged at once, are named. Every sentence
rests on the requests that all configurations finished, and says first how many these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pandas import DataFrame, Series, isna

from specsplit.analysis.curves import split_panels, three_digits
from specsplit.analysis.statistics import MIN_PROMPTS
from specsplit.analysis.tables import comparable, compare_panel, configuration_of, keys_of
from specsplit.experiment.sweep import plain_number

_WORDS = {"gamma": "γ = {}", "series": "series {}", "rtt_ms": "RTT {} ms", "temperature": "temperature {}"}
_HEADINGS = {"gamma": "γ", "rtt_ms": "RTT, ms", "jitter_ms": "jitter, ms"}
# Column of the summary -> its heading, and how its cells are written. `_mean` has its interval beside it.
_MEASURES = {
    "speedup": ("speedup", ".2f"),
    "itl_ms_mean": ("ITL, ms", "digits"),
    "tpot_ms_mean": ("TPOT, ms", "digits"),
    "ttft_ms_mean": ("TTFT, ms", "digits"),
    "average_acceptance_rate_mean": ("acceptance", ".3f"),
    "acceptance_length": ("acceptance length", ".2f"),
    "mean_accepted_length_mean": ("tokens/round", ".2f"),
    "network_idle_fraction_mean": ("network", "%"),
    "tokens_per_second": ("tokens/s", "digits"),
    "hit_rate": ("ahead, hit", ".2f"),
    "lossless": ("lossless", "share"),
}


@dataclass(frozen=True)
class Finding:
    """The best configuration of those that choose tokens alike on one network.

    where: what tells these from the others, e.g. "RTT 14 ms"; empty when all are alike. best: its row of the summary,
    with the joint interval of the speedup as `speedup_ci_low` and `_high`. drafting: so the best row that drafts, None
    when nothing does. ties: names of those that cannot be told from the best. requests: how many prompts were measured.
    """

    where: str
    best: Series
    drafting: Series | None
    ties: tuple[str, ...]
    name: str
    drafting_name: str
    confidence: float
    requests: int = 0

    def sentences(self) -> list[str]:
        """The finding in plain words, first what it rests on."""
        level = f"{100 * self.confidence:g} % interval"
        if self.drafting is None:
            return ["Only the target alone was run, so there is no speedup to report."]
        compared = int(self.best["compared"])
        lines = [f"Compared on {_counted(compared, self.requests)} that every configuration finished."]
        if isna(self.drafting["speedup"]):
            return [
                *lines,
                "Nothing can be said of a speedup: gamma 0, the target alone, is missing or wrote no tokens.",
            ]
        low, high = self.drafting["speedup_ci_low"], self.drafting["speedup_ci_high"]
        gain = _with_interval(self.drafting, level)
        if self.best["gamma"] == 0:
            first = "The target alone is fastest." if high < 1 else "No draft had a speedup above 1."
            lines.append(f"{first} The best draft, {self.drafting_name}, has a speedup of {gain}.")
            if high >= 1:
                lines.append("The interval includes 1: it may be no slower at all.")
        elif low > 1:
            lines.append(f"{self.name} is fastest: a speedup of {gain} against the target alone.")
        else:
            lines.append(f"{self.name} had the largest speedup against the target alone: {gain}.")
            if low <= 1:
                lines.append("The interval includes 1: it may be no faster at all.")
        if isna(low):
            few = "requests" if compared < MIN_PROMPTS else "texts with tokens"
            lines.append(f"There are too few {few} to say how sure that is: an interval needs {MIN_PROMPTS} requests.")
        if self.ties:
            lines.append(f"Not distinguishable from it on these prompts: {'; '.join(self.ties)}.")
        return lines


def find_best(
    requests: DataFrame, rounds: DataFrame, summary: DataFrame, *, confidence: float, bootstrap_samples: int, seed: int
) -> list[Finding]:
    """One finding for each way to choose tokens and network, in the order of `summary`.

    requests, rounds: the tables of `read_tables`. summary: of `summarize`, as the other arguments. Best is the largest
    speedup end to end, gamma 0 with its 1 among them. Intervals and ties are those of `compare_panel`: with equal
    configurations one is called faster, or one pair told apart, in at most 1 - confidence of experiments.
    """
    settings: dict[str, Any] = {"confidence": confidence, "samples": bootstrap_samples, "seed": seed}
    names = [name for name in varied(summary) if name in ("gamma", "mode", "tree", "draft")]
    findings = []
    every = int(requests["request_id"].nunique())
    for panel in split_panels(*comparable(requests, rounds), summary):
        rows = panel.summary.assign(
            speedup_ci_low=panel.summary["speedup_joint_low"], speedup_ci_high=panel.summary["speedup_joint_high"]
        )
        rated = rows[rows["speedup"].notna()]
        best = rated.iloc[int(rated["speedup"].argmax())] if len(rated) else rows.iloc[0]
        drafts = rows[rows["gamma"] != 0]
        ranked = drafts.sort_values("speedup", ascending=False, kind="stable", na_position="last")
        order, found = compare_panel(panel.requests, **settings)
        places = {configuration: place for place, configuration in enumerate(order)}
        place_of = {index: places[key] for index, key in configuration_of(rows).items() if key in places}
        tied = []
        for index, row in rated.iterrows():
            places_known = best.name in place_of and index in place_of
            apart = found and places_known and found.distinguishable(place_of[best.name], place_of[index])
            if index != best.name and not apart:
                tied.append(row)
        findings.append(
            Finding(
                where=panel.title,
                best=best,
                drafting=ranked.iloc[0] if len(ranked) else None,
                ties=tuple(name_of(row, names) for row in tied),
                name=name_of(best, names),
                drafting_name=name_of(ranked.iloc[0], names) if len(ranked) else "",
                confidence=confidence,
                requests=every,
            )
        )
    return findings


def compared_sentence(summary: DataFrame, every: int) -> str:
    """How many of the `every` prompts measured all numbers of the summary rest on."""
    few, many = int(summary["compared"].min()), int(summary["compared"].max())
    if few == many:
        return f"Compared are {_counted(few, every)} that every configuration finished"
    return f"Compared are {few} to {many} of {every} prompts: those that every configuration on that network finished"


def _counted(some: int, every: int) -> str:
    noun = "prompt" if every == 1 else "prompts"
    return f"the {every} {noun}" if some == every else f"the {some} of {every} {noun}"


def lossless_sentence(summary: DataFrame) -> str:
    """Whether the texts are those of the target alone, as a sentence with the counts."""
    drafting = summary[summary["gamma"] != 0]
    compared = drafting[drafting["lossless_compared"] > 0]
    every = int(compared["lossless_compared"].sum())
    written = int(drafting["requests"].sum())
    same = round(float((compared["lossless"] * compared["lossless_compared"]).sum()))
    if not written:
        return "Nothing was drafted, so there is nothing to compare."
    parts = []
    texts = f"text{'' if every == 1 else 's'}"
    if every and same == every:
        which = "written with a draft" if every == written else f"compared, of {written} written with a draft,"
        parts.append(f"Yes: each of the {every} {texts} {which} is, token for token, that of the target alone.")
    elif every:
        which = "" if every == written else f" compared, of {written} written with a draft,"
        where = "; ".join(name_of(row, varied(summary)) for _, row in compared[compared["lossless"] < 1].iterrows())
        parts.append(f"No: {every - same} of {every} {texts}{which} differ from that of the target alone ({where}).")
    if unknown := written - every:
        parts.append(
            f"Of {unknown} text{'' if unknown == 1 else 's'} nothing can be said token for token: gamma 0 was not run "
            "or failed there, or it is rejection sampling, which has the right distribution and not the same text."
        )
    return " ".join(parts)


def faults_sentence(summary: DataFrame) -> str:
    """What failed while this was measured, as sentences; empty when nothing did."""
    names, parts = varied(summary), []
    failed = summary[summary["failed_requests"] > 0]
    if number := int(failed["failed_requests"].sum()):
        where = "; ".join(f"{name_of(row, names)}: {row['failed_requests']}" for _, row in failed.iterrows())
        parts.append(
            f"{number} request{' failed and is' if number == 1 else 's failed and are'} in no mean ({where}); "
            "requests.csv says why."
        )
    if count := int(summary["worker_failures"].sum()):
        parts.append(
            f"Workers failed in {count} rounds; what that cost the requests that got over it is in their latency "
            "(requests.csv, recovery_ms)."
        )
    return " ".join(parts)


def varied(summary: DataFrame) -> list[str]:
    """The names of the configuration that take several values in this sweep; gamma always."""
    return [name for name in keys_of(summary) if name == "gamma" or summary[name].nunique() > 1]


def name_of(row: Series, names: Sequence[str]) -> str:
    """A configuration in words, with what varies: "γ = 5, overlap". Gamma 0 is "the target alone"."""
    if row["gamma"] == 0:
        names = [name for name in names if name not in ("mode", "tree", "draft")]
    words = []
    for name in names:
        value = plain_number(row[name]) if isinstance(row[name], float) else row[name]
        alone = name == "gamma" and value == 0
        words.append("the target alone" if alone else _WORDS.get(name, "{}").format(value))
    return ", ".join(words)


def summary_table(summary: DataFrame, *, intervals: bool = True) -> tuple[list[str], list[list[str]]]:
    """The headings and the cells of the summary as a person reads it: what varies, then the measures.

    An interval is beside its mean, in brackets. A column without any value is left out; a missing value is "-".
    """
    columns = {_HEADINGS.get(name, name): [_plain(value) for value in summary[name]] for name in varied(summary)}
    for name, (heading, form) in _MEASURES.items():
        if summary[name].notna().any():
            columns[heading] = [_cell(row, name, form, intervals) for _, row in summary.iterrows()]
    return list(columns), [list(cells) for cells in zip(*columns.values(), strict=True)]


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table for a terminal, columns to the right."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (headings, *rows)]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cell(row: Series, name: str, form: str, intervals: bool) -> str:
    if isna(row[name]):
        return "-"
    text, metric = _number(row[name], form), name.removesuffix("_mean")
    if not intervals or metric not in ("itl_ms", "speedup"):
        return text
    low, high = row[f"{metric}_ci_low"], row[f"{metric}_ci_high"]
    # Gamma 0 is its own measure: an interval of [1, 1] says nothing.
    return text if isna(low) or low == high else f"{text} [{_number(low, form)}, {_number(high, form)}]"


def _number(value: float, form: str) -> str:
    if form == "digits":
        return three_digits(value)
    if form == "share":  # of requests: most often all
        return f"{100 * value:.1f} %".replace("100.0", "100")
    return f"{100 * value:.1f} %" if form == "%" else f"{value:{form}}"


def _plain(value: Any) -> str:
    return plain_number(value) if isinstance(value, float) else str(value)


def _with_interval(row: Series, level: str) -> str:
    low, high = row["speedup_ci_low"], row["speedup_ci_high"]
    return f"{row['speedup']:.2f}" + ("" if isna(low) else f" ({level} {low:.2f} to {high:.2f})")
