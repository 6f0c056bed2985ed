"""Which configuration of a summary is best, by how much, how surely.

The best of several means overestimates, and its neighbours are often as good. So its interval is the one that holds for
all configurations at once, and those that cannot be told from it, all pairs judged at once, are named. Every sentence
rests on the requests that all configurations finished, and says first how many these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pandas import DataFrame, Series, concat, isna

from specsplit.analysis.configurations import configuration_of, row_of, varied
from specsplit.analysis.curves import in_words, split_panels
from specsplit.analysis.references import BASES, GAMMA0, PAIR, STREAM
from specsplit.analysis.statistics import MIN_PROMPTS
from specsplit.analysis.tables import comparable, compare_panel, level_of_panels
from specsplit.errors import counted
from specsplit.experiment.columns import COLOCATED, STREAMED, WORKERS

OTHERS = {
    GAMMA0: "the target alone",
    STREAM: "the target that streams by itself (target_streamed)",
    PAIR: "the same pair in one process (colocated)",
}


@dataclass(frozen=True)
class Finding:
    """The best configuration of those that choose tokens alike on one network.

    where: what tells these from the others, e.g. "RTT 14 ms"; empty when all are alike. base: what the gains are
    against, one of BASES. best: its row of the summary, with the joint interval of the speedup over the base in
    place of its own. drafting: so the best row that drafts, None when nothing does. ties: names of those that cannot be
    told from the best. unrated: of those without a gain. requests: how many prompts were measured.
    """

    where: str
    best: Series
    drafting: Series | None
    ties: tuple[str, ...]
    name: str
    drafting_name: str
    confidence: float
    requests: int = 0
    base: str = GAMMA0
    unrated: tuple[str, ...] = ()

    def sentences(self) -> list[str]:
        """The finding in plain words, first what it rests on."""
        level = f"{100 * self.confidence:g} % interval"
        if self.drafting is None:
            return ["Only the target alone was run, so there is no speedup to report."]
        compared = int(self.best["compared"])
        if not compared:
            return [f"No prompt of {self.requests} was finished by every configuration, so nothing can be compared."]
        lines = [f"Compared on {of_prompts(compared, self.requests)} that every configuration finished."]
        name = BASES[self.base]
        if isna(self.drafting[name]):
            why = "gamma 0, the target alone, was not measured, or there are no tokens or times to divide"
            return [*lines, f"Nothing can be said of a speedup: {why}."]
        low, high = self.drafting[f"{name}_ci_low"], self.drafting[f"{name}_ci_high"]
        gain = with_interval(self.drafting, f"{name}_ci", level)
        failed = int(self.best["failed_requests"])
        sole = not (self.ties or failed)  # told from all others, and not by what is missing
        if self.base == STREAM:
            lines = [f"{lines[0][:-1]}, {self._over_streamed(gain, fastest=sole and low > 1)}"]
        elif self.best["gamma"] == 0:
            first = "The target alone is fastest." if sole and high < 1 else "No draft had a speedup above 1."
            lines.append(f"{first} The best draft, {self.drafting_name}, has a speedup of {gain}.")
        elif sole and low > 1:
            lines.append(f"{self.name} is fastest: a speedup of {gain} against the target alone.")
        else:
            lines.append(f"{self.name} had the largest speedup against the target alone: {gain}.")
        if low <= 1 <= high:
            than = "slower" if self.drafting[name] <= 1 else "faster"
            lines.append(f"The interval includes 1: it may be no {than} at all.")
        if isna(low):
            few = "requests" if compared < MIN_PROMPTS else "texts with tokens"
            lines.append(f"There are too few {few} to say how sure that is: an interval needs {MIN_PROMPTS} requests.")
        if self.base == STREAM:
            lines += self._over_others(level)
        if self.ties:
            lines.append(f"Not distinguishable from {self.name} on these prompts: {'; '.join(self.ties)}.")
        if failed:
            lines.append(
                f"Failed requests of {self.name}: {failed}. No number here has them in it, and where slow ones fail, "
                "as at a time limit, what is left looks faster than it is."
            )
        if self.unrated:
            lines.append(f"Not among these, for nothing to compare with was measured: {'; '.join(self.unrated)}.")
        return lines

    def _over_streamed(self, gain: str, *, fastest: bool) -> str:
        """The end of a sentence that says what the requests were compared on."""
        other = OTHERS[STREAM]
        if self.best["setup"] == STREAMED:
            return f"no draft was faster than {other}: the best, {self.drafting_name}, has a speedup of {gain} over it."
        if self.best["gamma"] == 0:
            alone = f"no draft had a larger speedup over {other} than the target alone through the loop"
            return f"{alone}: the best, {self.drafting_name}, has {gain}."
        if fastest:
            return f"{self.name} is fastest: a speedup of {gain} over {other}."
        return f"{self.name} had the largest speedup over {other}: {gain}."

    def _over_others(self, level: str) -> list[str]:
        """Where the best draft stands beside the other two baselines."""
        words = {GAMMA0: "gamma 0 through the same loop", PAIR: OTHERS[PAIR]}
        return [
            f"Over {other} its speedup is {with_interval(self.drafting, BASES[base] + '_joint', level)}."
            for base, other in words.items()
            if self.drafting is not None and not isna(self.drafting[BASES[base]])
        ]


def find_best(
    requests: DataFrame, rounds: DataFrame, summary: DataFrame, *, confidence: float, **settings: Any
) -> list[Finding]:
    """One finding for each way to choose tokens and network, in the order of `summary`.

    requests, rounds: the tables of `read_tables`. summary: of `summarize`, as the other arguments. Best is the largest
    speedup end to end over the target that streams by itself, or where that was not measured over gamma 0; the target
    alone, streamed or through the loop, is among them. Intervals and ties are those of `compare_panel`, at the level
    of `level_of_panels`: with equal configurations one of them is called faster, or a pair told apart, in any of the
    findings in at most 1 - confidence of experiments.
    """
    names = [name for name in varied(summary) if name in ("gamma", "mode", "tree", "draft")]
    findings = []
    every = int(requests["request_id"].nunique())
    level = level_of_panels(requests, confidence)
    for panel in split_panels(*comparable(requests, rounds), summary):
        ours = panel.summary["setup"] == WORKERS
        drafting = ours & (panel.summary["gamma"] != 0)
        streamed = drafting & panel.summary[BASES[STREAM]].notna()
        base = STREAM if streamed.any() else GAMMA0
        streams = panel.summary["setup"].eq(STREAMED) if base == STREAM else ours & False
        # Of equals the first one is best.
        rows = concat([panel.summary[chosen] for chosen in (streams, ours & ~drafting, drafting)])
        gain = BASES[base]
        rows = rows.assign(**{f"{gain}_ci_{end}": rows[f"{gain}_joint_{end}"] for end in ("low", "high")})
        rated = rows[rows[gain].notna()]
        best = rated.iloc[int(rated[gain].argmax())] if len(rated) else rows.iloc[0]
        ranked = rows[drafting[rows.index]].sort_values(gain, ascending=False, kind="stable", na_position="last")
        order, found = compare_panel(panel.requests, base, confidence=level, **settings)
        places = {configuration: place for place, configuration in enumerate(order)}
        place_of = {index: places[key] for index, key in configuration_of(rows, row_of(rows)).items() if key in places}
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
                base=base,
                unrated=tuple(name_of(row, names) for _, row in rows[rows[gain].isna()].iterrows()),
            )
        )
    return findings


def name_of(row: Series, names: Sequence[str]) -> str:
    """A configuration in words, with what varies: "γ = 5, overlap". Gamma 0 is "the target alone"."""
    if row["gamma"] == 0:
        names = [name for name in names if name not in ("mode", "tree", "draft")]
    setup = row.get("setup", WORKERS)
    if setup == STREAMED:
        names = [name for name in names if name != "gamma"]
    words = ["the target that streams by itself"] if setup == STREAMED else []
    for name in names:
        alone = name == "gamma" and row[name] == 0
        words.append("the target alone" if alone else in_words(name, row[name]))
    return ", ".join([*words, "in one process"] if setup == COLOCATED else words)


def of_prompts(some: int, every: int) -> str:
    """`the 8 prompts`, `the 6 of 8 prompts`"""
    return f"the {'' if some == every else f'{some} of '}{counted(every, 'prompt')}"


def with_interval(row: Series, name: str, level: str) -> str:
    """A number with its interval. name: X_ci or X_joint, of the number X."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name.rpartition('_')[0]]:.2f}" + ("" if isna(low) else f" ({level} {low:.2f} to {high:.2f})")
