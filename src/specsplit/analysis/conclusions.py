"""What a summary says beside the best configuration: of round trips, drafts, machine, cost, texts, faults."""

from __future__ import annotations

from pandas import DataFrame, Series, isna

from specsplit.analysis.configurations import NETWORK, conditions_of, varied
from specsplit.analysis.costs import cost_sentences
from specsplit.analysis.curves import PANEL, in_words, three_digits
from specsplit.analysis.findings import OTHERS, name_of, of_prompts, with_interval
from specsplit.analysis.references import BASES, GAMMA0, MOST_DRIFT, PAIR, STREAM
from specsplit.analysis.statistics import MIN_PROMPTS
from specsplit.errors import counted
from specsplit.experiment.columns import WORKERS
from specsplit.experiment.sweep import plain_number

# Where a draft came from, in words.
_SOURCES = {
    "lookup": "were looked up in the text",
    "session": "began with what the worker found in the text",
    "global": "began with what it found in earlier texts",
    "model": "were the model's",
}


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
                sentences.append(f"{where} {OTHERS[base]}, {_by_round_trip(best, gain, confidence)}")
    return sentences


def _by_round_trip(best: DataFrame, gain: str, confidence: float) -> str:
    """The end of a sentence about the best pair at each round trip, in rising order."""
    verdicts, parts = [], []
    for _, row in best.iterrows():
        low, high = row[f"{gain}_joint_low"], row[f"{gain}_joint_high"]
        verdict = "faster" if low > 1 else "slower" if high < 1 else "not distinguishable"
        verdict = "too few prompts to say" if isna(low) else verdict
        verdicts.append(verdict)
        number = with_interval(row, f"{gain}_joint", f"{100 * confidence:g} % interval")
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
            if (none := own["draft_share_none"]).max() > 0:
                parts.append(f"{_span(none)} were empty, for nothing was found, or nothing probable enough")
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
        verdict = ""
        if apart <= MOST_DRIFT:
            verdict = ": steady"
        elif drifted.isna().all():
            parts.append(f"Warning: the machine may not have been steady; with {MIN_PROMPTS} prompts one could tell.")
        elif drifted.any():
            parts.append("Warning: the machine was not steady.")
        else:
            verdict = ", which texts that vary by chance may be as well"
        parts.append(
            f"Gamma 0, which each of {counted(runs, 'run')} measured in turn with its own requests, took "
            f"{three_digits(low)} to {three_digits(high)} ms per token, {100 * apart:.1f} % apart{verdict}. "
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
        return f"Compared are {of_prompts(few, every)} that every configuration finished"
    of_all = f"{few} to {many} of {counted(every, 'prompt')}"
    return f"Compared are {of_all}: those that every configuration on that network finished"


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
    baselines = f"{counted(beside, 'text')} of baselines (gamma 0 in each run, target_streamed, colocated)"
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
