"""What shipping hidden states costs: table, sentences and figure."""

from __future__ import annotations

import math
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from pandas import DataFrame, Series

from specsplit.analysis.drawing import house_style, new_figure, save_figure, series_style, settle_layout
from specsplit.analysis.measures import quantiles
from specsplit.analysis.peers_table import latency_columns
from specsplit.analysis.statistics import MIN_PROMPTS
from specsplit.client.result import LINK_BYTES
from specsplit.errors import counted

KIND = ["draft", "project", "form", "window"]
NETWORK = ["rtt_ms", "bandwidth_mbit"]
DRAFT = "draft"  # the one that reads no states
LOW, HIGH = "latency_vs_draft_joint_low", "latency_vs_draft_joint_high"
WIDTH_IN, HEIGHT_IN = 6.8, 2.9
STYLES = 6  # of `series_style` that differ


def summarize_states_cost(texts: DataFrame, *, confidence: float = 0.95) -> DataFrame:
    """One row a kind and network, from the rows of `experiment.states_cost.measure_states_cost`.

    draft, project, form, window (positions; 0: the whole prompt), rtt_ms, bandwidth_mbit (0: no limit); texts,
    generated_tokens, rounds: sums. ROLE_sent_bytes_per_token and _per_round, likewise received: serialized messages
    from and to the client. ttft_ms_median, itl_ms_median, tpot_ms_median: over texts. ms_per_token: latency of all
    texts over their tokens. acceptance_length: 1 + accepted tokens / verifications. lossless: share of texts.
    latency_vs_draft, _ci_low, _ci_high, _joint_low, _joint_high: ms_per_token divided by that of the other draft at the
    same network, paired by prompt; below 1 the head is faster. The joint interval holds for all rows at once.
    """
    rows: list[dict[str, Any]] = []
    base: dict[Hashable, DataFrame] = {}
    heads = int(texts.loc[texts["draft"] != DRAFT, [*KIND, *NETWORK]].drop_duplicates().shape[0])
    for (*kind, rtt_ms, mbit), own in texts.groupby([*KIND, *NETWORK], sort=False, dropna=False):
        network = (rtt_ms, mbit)
        own = own.set_index("request_id")
        tokens, rounds = own["generated_tokens"].sum(), own["num_rounds"].sum()
        row = dict(zip(KIND, kind, strict=True)) | dict(zip(NETWORK, network, strict=True))
        row |= {"texts": len(own), "generated_tokens": tokens, "rounds": rounds}
        for name in LINK_BYTES:
            row |= {f"{name}_per_token": own[name].sum() / tokens, f"{name}_per_round": own[name].sum() / rounds}
        for name in ("ttft_ms", "itl_ms", "tpot_ms"):
            row |= quantiles(own[name], name, (50,))
        row["ms_per_token"] = own["total_latency_ms"].sum() / tokens
        row["acceptance_length"] = 1 + own["accepted_tokens"].sum() / max(1, own["verifications"].sum())
        row["lossless"] = own["lossless"].mean()
        base.setdefault(network, own)  # the draft is the first kind of each
        row |= latency_columns("latency_vs_draft", own, base[network].loc[own.index], confidence, heads or 1)
        rows.append(row)
    return DataFrame(rows).astype({"window": "Int64"})


def states_sentences(table: DataFrame) -> list[str]:
    """What the table says in words: what crosses, and from which bandwidth on the head is the faster draft."""
    head, draft = table[table["draft"] != DRAFT], table[table["draft"] == DRAFT]
    if head.empty or draft.empty or HIGH not in table:
        return []
    known = head[head[HIGH].notna()]
    wins, losses = int((known[HIGH] < 1).sum()), int((known[LOW] > 1).sum())
    texts = int(table["texts"].min())
    bytes_per_token = "target_received_bytes_per_token"
    said = [
        f"A token takes {draft[bytes_per_token].mean():,.0f} bytes from the target with the draft that reads no hidden "
        f"states, and {head[bytes_per_token].min():,.0f} to {head[bytes_per_token].max():,.0f} with the head. Its "
        f"acceptance length is {_range(head['acceptance_length'])}, the other draft's "
        f"{_range(draft['acceptance_length'])}."
    ]
    if known.empty:
        return [*said, f"No ratio has an interval (prompts: {texts}; it takes {MIN_PROMPTS}), so no winner is named."]
    said.append(
        f"In {wins} of {len(known)} cases (a way to ship the states at one network, {counted(texts, 'prompt')} each) "
        f"the head is faster than the other draft, in {losses} slower, in {len(known) - wins - losses} the interval "
        "holds both; the intervals hold for all cases at once."
    )
    for rtt_ms, own in known.groupby("rtt_ms"):
        outcomes: dict[str, list[str]] = {}
        for kind, rows in own.groupby(KIND[1:], sort=False, dropna=False):
            outcomes.setdefault(_crossing(rows), []).append(_name(*tuple(kind)))
        for outcome, names in outcomes.items():
            who = "in every way to ship them" if len(outcomes) == 1 else f"with {', '.join(names)}"
            said.append(f"At a round trip of {rtt_ms:g} ms the head {outcome}, {who}.")
    return said


def _crossing(rows: DataFrame) -> str:
    """Where one kind of head is beyond doubt faster than the draft: `wins from 100 Mbit/s on`."""
    order = rows.assign(order=rows["bandwidth_mbit"].replace(0, math.inf)).sort_values("order")
    wins = (order[HIGH] < 1).tolist()
    names = [_bandwidth(mbit) for mbit in order["bandwidth_mbit"]]
    if not any(wins):
        return f"never wins ({counted(len(wins), 'bandwidth')})"
    if all(wins):
        return f"wins at every bandwidth ({len(wins)})"
    first = wins.index(True)
    if all(wins[first:]) and first < len(wins) - 1:
        return f"wins from {names[first]} on ({len(wins) - first} of {counted(len(wins), 'bandwidth')})"
    return f"wins at {', '.join(name for name, won in zip(names, wins, strict=True) if won)} alone"


def _bandwidth(mbit: float) -> str:
    return f"{mbit:g} Mbit/s" if mbit else "unlimited bandwidth"


def _name(project: Any, form: Any, window: Any) -> str:
    vectors = "one vector" if project == "target" else "three vectors"
    return f"{vectors} in {form}" + (f" of the last {window:.0f}" if window else "")


def _range(values: Series) -> str:
    low, high = f"{values.min():.2f}", f"{values.max():.2f}"
    return low if low == high else f"{low} to {high}"


def _style(place: int) -> dict[str, Any]:
    """Of more lines than there are colours the later ones are dashed."""
    return {**series_style(place), "linestyle": "--" if place >= STYLES else "-"}


def draw_states_cost(table: DataFrame, path: Path) -> list[Path]:
    """Draw ms_per_token against bandwidth, a panel a round trip and a line a kind: `path` .png and .svg."""
    ticks = sorted(table["bandwidth_mbit"].unique(), key=lambda mbit: mbit or math.inf)
    trips = sorted(table["rtt_ms"].unique())
    with house_style():
        figure = new_figure(WIDTH_IN, HEIGHT_IN)
        panels = figure.subplots(1, len(trips), squeeze=False, sharey=True)[0]
        for axes, rtt_ms in zip(panels, trips, strict=True):
            at = table[table["rtt_ms"] == rtt_ms]
            for place, (kind, own) in enumerate(at.groupby(KIND, sort=False, dropna=False)):
                name = "reads no states" if kind[0] == DRAFT else _name(*kind[1:])
                places = [ticks.index(mbit) for mbit in own["bandwidth_mbit"]]
                line = sorted(zip(places, own["ms_per_token"], strict=True))
                axes.plot(*zip(*line, strict=True), label=name, **_style(place))
            axes.set(title=f"RTT {rtt_ms:g} ms", xlabel="Mbit/s each way", ylim=(0, 1.1 * table["ms_per_token"].max()))
            axes.set_xticks(range(len(ticks)), [f"{mbit:g}" if mbit else "no limit" for mbit in ticks])
        panels[0].set_ylabel("ms per token")
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3 if len(names) <= STYLES else 2)
        settle_layout(figure)
        return save_figure(figure, path, {"Title": "Time per token with hidden states on the network"})
