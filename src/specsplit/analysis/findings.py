"""What a summary says, in words and as a table for a screen: which configuration is best, by how much, how surely.

The best of several means overestimates, and its neighbours are often as good. So its interval is the one that holds for
all configurations at once, and those that cannot be told from it, all pairs judged at once, are named. Every sentence
rests on the requests that all configurations finished, and says first how many these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pandas import DataFrame, Series, concat, isna

from specsplit.analysis.configurations import NETWORK, conditions_of, configuration_of, row_of, varied
from specsplit.analysis.costs import cost_sentences
from specsplit.analysis.curves import PANEL, in_words, split_panels, three_digits
from specsplit.analysis.references import BASES, GAMMA0, MOST_DRIFT, PAIR, STREAM
from specsplit.analysis.statistics import MIN_PROMPTS
from specsplit.analysis.tables import comparable, compare_panel, level_of_panels
from specsplit.errors import counted
from specsplit.experiment.columns import COLOCATED, STREAMED, WORKERS
from specsplit.experiment.sweep import plain_number

_OTHERS = {
    GAMMA0: "the target alone",
    STREAM: "the target that streams by itself (target_streamed)",
    PAIR: "the same pair in one process (colocated)",
}
_HEADINGS = {"gamma": "γ", "rtt_ms": "RTT, ms", "jitter_ms": "jitter, ms", "bandwidth_mbit": "Mbit/s"}
# Column of the summary -> its heading, and how its cells are written. `_mean` has its interval beside it.
_MEASURES = {
    "speedup": ("speedup", ".2f"),
    "speedup_over_streamed": ("over streamed", ".2f"),
    "speedup_over_colocated": ("over colocated", ".2f"),
    "itl_ms_mean": ("ITL, ms", "digits"),
    "tpot_ms_mean": ("TPOT, ms", "digits"),
    "ttft_ms_mean": ("TTFT, ms", "digits"),
    "average_acceptance_rate_mean": ("acceptance", ".3f"),
    "acceptance_length": ("acceptance length", ".2f"),
    "draft_share_lookup": ("looked up", "%"),
    "mean_accepted_length_mean": ("tokens/round", ".2f"),
    "network_idle_fraction_mean": ("network", "%"),
    "tokens_per_second": ("tokens/s", "digits"),
    "hit_rate": ("ahead, hit", ".2f"),
    "lossless": ("lossless", "share"),
    "reference_drift": ("drift", "%"),
}


# Where a draft came from, in words.
_SOURCES = {
    "lookup": "were looked up in the text",
    "session": "began with what the worker found in the text",
    "global": "began with what it found in earlier texts",
    "model": "were the model's",
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
        lines = [f"Compared on {_counted(compared, self.requests)} that every configuration finished."]
        name = BASES[self.base]
        if isna(self.drafting[name]):
            why = "gamma 0, the target alone, was not measured, or there are no tokens or times to divide"
            return [*lines, f"Nothing can be said of a speedup: {why}."]
        low, high = self.drafting[f"{name}_ci_low"], self.drafting[f"{name}_ci_high"]
        gain = _with_interval(self.drafting, f"{name}_ci", level)
        sole = not self.ties  # told from all others
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
        if self.unrated:
            lines.append(f"Not among these, for nothing to compare with was measured: {'; '.join(self.unrated)}.")
        return lines

    def _over_streamed(self, gain: str, *, fastest: bool) -> str:
        """The end of a sentence that says what the requests were compared on."""
        other = _OTHERS[STREAM]
        if self.best["setup"] == STREAMED:
            return f"no draft was faster than {other}: the best, {self.drafting_name}, has a speedup of {gain} over it."
        if self.best["gamma"] == 0:
            through = "no draft was faster than the target alone through the same loop"
            return f"{through}: over {other} the best, {self.drafting_name}, has a speedup of {gain}."
        if fastest:
            return f"{self.name} is fastest: a speedup of {gain} over {other}."
        return f"{self.name} had the largest speedup over {other}: {gain}."

    def _over_others(self, level: str) -> list[str]:
        """Where the best draft stands beside the other two baselines."""
        words = {GAMMA0: "gamma 0 through the same loop", PAIR: _OTHERS[PAIR]}
        return [
            f"Over {other} its speedup is {_with_interval(self.drafting, BASES[base] + '_joint', level)}."
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


def conclusions(summary: DataFrame, confidence: float) -> dict[str, list[str]]:
    """What the summary says beside the best configuration: topic -> sentences; topics with nothing to say are empty."""
    topics = {
        "Round trips": round_trip_sentences(summary, confidence),
        "Drafts": source_sentences(summary),
        "Machine": [drift_sentence(summary)],
        "Cost": cost_sentences(summary),
        "Lossless": [lossless_sentence(summary)],
        "Faults": [faults_sentence(summary)],
    }
    return {topic: [sentence for sentence in sentences if sentence] for topic, sentences in topics.items()}


def round_trip_sentences(summary: DataFrame, confidence: float) -> list[str]:
    """From which simulated round trip on the best pair in workers loses to a baseline; none for a single network.

    One sentence for each of target_streamed and colocated, and for each way to choose tokens. The pair at a round trip
    is the one with the largest speedup there; its intervals hold for all of that network at once.
    """
    sentences = []
    told_by = [name for name in PANEL if name in summary and name != "rtt_ms"]
    for base in (STREAM, PAIR):
        gain = BASES[base]
        rows = summary[(summary["setup"] == WORKERS) & (summary["gamma"] != 0) & summary[gain].notna()]
        several = [name for name in told_by if rows[name].nunique() > 1]
        for _, own in rows.groupby(conditions_of(rows, "jitter_ms", "bandwidth_mbit"), sort=False):
            by = BASES[STREAM] if own[BASES[STREAM]].notna().all() else BASES[GAMMA0]
            by = by if own[by].notna().all() else gain
            best = own.loc[own.groupby("rtt_ms")[by].idxmax()].sort_values("rtt_ms")
            if len(best) > 1:
                told = ", ".join(in_words(name, own[name].iloc[0]) for name in several)
                where = f"At {told}, against" if several else "Against"
                sentences.append(f"{where} {_OTHERS[base]}, {_by_round_trip(best, gain, confidence)}")
    return sentences


def _by_round_trip(best: DataFrame, gain: str, confidence: float) -> str:
    """The end of a sentence about the best pair at each round trip, in rising order."""
    verdicts, parts = [], []
    for _, row in best.iterrows():
        low, high = row[f"{gain}_joint_low"], row[f"{gain}_joint_high"]
        verdict = "faster" if low > 1 else "slower" if high < 1 else "not distinguishable"
        verdict = "too few prompts to say" if isna(low) else verdict
        verdicts.append(verdict)
        number = _with_interval(row, f"{gain}_joint", f"{100 * confidence:g} % interval")
        parts.append(f"{plain_number(row['rtt_ms'])} ms: {verdict}, {number}")
    slower = [verdict == "slower" for verdict in verdicts]
    times = [plain_number(rtt) for rtt in best["rtt_ms"]]
    if slower[-1]:
        first = max((place + 1 for place, lost in enumerate(slower) if not lost), default=0)
        lead = f"loses from a round trip of {times[first]} ms on"
    elif any(slower):
        lead = f"loses at {', '.join(t for t, lost in zip(times, slower, strict=True) if lost)} ms"
    else:
        lead = "loses for certain at no round trip that was measured"
    few, many = int(best["compared"].min()), int(best["compared"].max())
    prompts = f"{few}" if few == many else f"{few} to {many}"
    return f"the best pair in workers {lead} ({'; '.join(parts)}; prompts compared: {prompts})."


def source_sentences(summary: DataFrame) -> list[str]:
    """Of each draft that has several sources, what came from which and how much of it was accepted; from the lowest to
    the highest of its rows."""
    rows = summary[(summary["setup"] == WORKERS) & (summary["gamma"] != 0)]
    sentences = []
    for draft, own in rows.groupby("draft", sort=False):
        parts = []
        for source, words in _SOURCES.items():
            if own[f"draft_share_{source}"].max() > 0:
                share, rate = (_span(own[f"draft_{name}_{source}"]) for name in ("share", "acceptance_rate"))
                parts.append(f"{share} {words} (accepted / drafted tokens: {rate})")
        if len(parts) > 1:
            sentences.append(
                f"Of the drafts of {draft} {'; '.join(parts)}. Its other rates and lengths are of all together."
            )
    return sentences


def _span(values: Series) -> str:
    if values.isna().all():
        return "not known"
    low, high = (f"{100 * end:.1f}" for end in (values.min(), values.max()))
    return f"{low if low == high else f'{low} to {high}'} %"


def drift_sentence(summary: DataFrame) -> str:
    """How steady the machine was: the target alone, as each run measured it in turn with its own requests."""
    ours = summary[(summary["setup"] == WORKERS) & (summary["compared"] > 0)]
    known = ours[ours["reference_ms_per_token"].notna()]
    parts = []
    spans = [
        (pace.max() / pace.min() - 1, len(own), pace.min(), pace.max(), own["reference_drifted"])
        for _, own in known.groupby(conditions_of(known, *NETWORK), sort=False)
        if len(own) > 1 and (pace := own["reference_ms_per_token"]).min() > 0
    ]
    if spans:
        apart, runs, low, high, drifted = max(reversed(spans), key=lambda span: span[:2])
        verdict = ": steady" if apart <= MOST_DRIFT else ""
        if verdict:
            pass
        elif drifted.isna().all():
            parts.append(f"Warning: the machine may not have been steady; with {MIN_PROMPTS} prompts one could tell.")
        elif drifted.any():
            parts.append("Warning: the machine was not steady.")
        else:
            verdict = ", which texts that vary by chance may be as well"
        parts.append(
            f"Gamma 0, which each of {runs} runs measured in turn with its own requests, took {three_digits(low)} to "
            f"{three_digits(high)} ms per token, {100 * apart:.1f} % apart{verdict}. "
            "Speedups are against the gamma 0 of the same run; other times of different runs have that drift in them."
        )
    else:
        parts.append("Not known: no network had two runs whose gamma 0 can be compared.")
    if unpaired := int((ours["reference_ms_per_token"].isna() & ours[BASES[GAMMA0]].notna()).sum()):
        have, their = ("has", "its") if unpaired == 1 else ("have", "their")
        parts.append(
            f"{unpaired} of {counted(len(ours), 'configuration')} {have} no gamma 0 of {their} own run: {their} "
            "speedup is against that of another run, and a drift of the machine in between is in it."
        )
    return " ".join(parts)


def compared_sentence(summary: DataFrame, every: int) -> str:
    """How many of the `every` prompts measured all numbers of the summary rest on."""
    few, many = int(summary["compared"].min()), int(summary["compared"].max())
    if few == many:
        return f"Compared are {_counted(few, every)} that every configuration finished"
    return f"Compared are {few} to {many} of {every} prompts: those that every configuration on that network finished"


def _counted(some: int, every: int) -> str:
    return f"the {'' if some == every else f'{some} of '}{counted(every, 'prompt')}"


def lossless_sentence(summary: DataFrame) -> str:
    """Whether the texts are those of the target alone, as a sentence with the counts."""
    ours = summary[summary["setup"] == WORKERS]
    drafting = ours[ours["gamma"] != 0]
    compared = drafting[drafting["lossless_compared"] > 0]
    every = int(compared["lossless_compared"].sum())
    written = int(drafting["requests"].sum())
    same = round(float((compared["lossless"] * compared["lossless_compared"]).sum()))
    beside = int(ours["baselines_compared"].sum())
    differing = beside - round(float((ours["baselines_lossless"] * ours["baselines_compared"]).sum()))
    baselines = f"{beside} texts of baselines (gamma 0 in each run, target_streamed, colocated)"
    more = [f"{differing or 'None'} of the {baselines} {'differ' if differing > 1 else 'differs'}."] if beside else []
    if not written:
        return " ".join(["No text was written with a draft, so there is nothing to compare.", *more])
    parts = []
    texts = counted(every, "text")
    if every and same == every:
        which = "written with a draft" if every == written else f"compared, of {written} written with a draft,"
        each = "the" if every == 1 else "each of the"
        parts.append(f"Yes: {each} {texts} {which} is, token for token, that of the target alone.")
    elif every:
        which = "" if every == written else f" compared, of {written} written with a draft,"
        where = "; ".join(name_of(row, varied(summary)) for _, row in compared[compared["lossless"] < 1].iterrows())
        differ = "differs" if every - same == 1 else "differ"
        parts.append(f"No: {every - same} of {texts}{which} {differ} from that of the target alone ({where}).")
    if unknown := written - every:
        parts.append(
            f"Of {counted(unknown, 'text')} nothing can be said token for token: gamma 0 was not run "
            "or failed there, or it is rejection sampling, which has the right distribution and not the same text."
        )
    return " ".join([*parts, *more])


def faults_sentence(summary: DataFrame) -> str:
    """What failed while this was measured, as sentences; empty when nothing did."""
    names, parts = varied(summary), []
    ours = summary[summary["setup"] == WORKERS]
    failed = ours[ours["failed_requests"] > 0]
    if number := int(failed["failed_requests"].sum()):
        where = "; ".join(f"{name_of(row, names)}: {row['failed_requests']}" for _, row in failed.iterrows())
        parts.append(
            f"{counted(number, 'request')} failed and {'is' if number == 1 else 'are'} in no mean ({where}); "
            "requests.csv says why."
        )
    if number := int(ours["baselines_failed"].sum()):
        parts.append(
            f"{counted(number, 'text')} of baselines failed; reference.csv says why, and their requests are in no mean."
        )
    if count := int(summary["worker_failures"].sum()):
        parts.append(
            f"Workers failed in {counted(count, 'round')}; what that cost the requests that got over it is in their "
            "latency (requests.csv, recovery_ms)."
        )
    return " ".join(parts)


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


def summary_table(summary: DataFrame, *, intervals: bool = True) -> tuple[list[str], list[list[str]]]:
    """The headings and the cells of the summary as a person reads it: what varies, then the measures.

    An interval is beside its mean, in brackets. A column without any value is left out; a missing value is "-".
    """
    names = [*varied(summary), *(["setup"] if summary["setup"].nunique() > 1 else [])]
    columns = {_HEADINGS.get(name, name): [_plain(value) for value in summary[name]] for name in names}
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
    if not intervals or metric not in ("itl_ms", *BASES.values()):
        return text
    low, high = row[f"{metric}_ci_low"], row[f"{metric}_ci_high"]
    # Gamma 0 is its own measure: an interval of [1, 1] says nothing.
    return text if isna(low) or low == high else f"{text} [{_number(low, form)}, {_number(high, form)}]"


def _number(value: float, form: str) -> str:
    if form == "digits":
        return three_digits(value)
    if form == "share":  # of requests: most often all, and never all when one is not
        return "100 %" if value == 1 else f"{min(99.9, 100 * value):.1f} %"
    return f"{100 * value:z.1f} %" if form == "%" else f"{value:{form}}"


def _plain(value: Any) -> str:
    return plain_number(value) if isinstance(value, float) else str(value)


def _with_interval(row: Series, name: str, level: str) -> str:
    """A number with its interval. name: X_ci or X_joint, of the number X."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name.rpartition('_')[0]]:.2f}" + ("" if isna(low) else f" ({level} {low:.2f} to {high:.2f})")
