"""What a token costs beside time: bytes on the links, CPU time, energy, and the price of the machines."""

from __future__ import annotations

import math

from pandas import DataFrame

from specsplit.analysis.curves import three_digits
from specsplit.client.result import USAGE
from specsplit.experiment.columns import WORKERS
from specsplit.settings.measure import PriceSettings

PRICE = "price_per_million_tokens"


def with_price(summary: DataFrame, prices: PriceSettings) -> DataFrame:
    """The summary with what a million tokens cost at `tokens_per_second`: hours of the target's machine, and of the
    draft worker's where a draft was made in a worker. Empty where a price is not known.

    summary: of texts one after the other, or of capacity, which has no setups.
    """
    target, draft = (math.nan if price is None else price for price in (prices.target_price, prices.draft_price))
    drafted = summary["gamma"] != 0
    if "setup" in summary:
        drafted &= summary["setup"] == WORKERS
    hour = drafted.map({True: target + draft, False: target})
    speed = summary["tokens_per_second"]
    return summary.assign(**{PRICE: hour * 1e6 / 3600 / speed.where(speed > 0)})


def cost_sentences(summary: DataFrame) -> list[str]:
    """What was measured of bytes, CPU time, energy and price, each with what it rests on."""
    ours = summary[summary["setup"] == WORKERS]
    kinds = [("the target alone", ours[ours["gamma"] == 0]), ("a draft", ours[ours["gamma"] != 0])]
    kinds = [(name, own) for name, own in kinds if len(own)]
    sentences = []
    if parts := [f"with {name} {' and '.join(_links(own))}" for name, own in kinds if _links(own)]:
        sentences.append(
            f"Bytes per token: {'; '.join(parts)} (messages as serialized, prompts included, without the headers of "
            "gRPC and TCP)."
        )
    for columns, what, rests in (
        (
            USAGE[:3],
            "CPU milliseconds per token",
            "process times from before each text until after it, all threads, waiting in a loop included",
        ),
        (
            USAGE[3:],
            "Joules per token",
            "counters of the whole processors and GPUs of the workers' machines, idle power and whatever else ran "
            "included; run.json says which",
        ),
        (
            (PRICE,),
            "Price of a million tokens",
            "hours of the machines, one text after the other; many at once cost less",
        ),
    ):
        parts = [f"with {name} {told}" for name, own in kinds if (told := _ranges(own, columns))]
        if parts:
            sentences.append(f"{what}: {'; '.join(parts)} ({rests}).")
    return sentences


def _links(own: DataFrame) -> list[str]:
    return [
        f"{_range(own, f'{role}_sent_bytes_per_token')} to the {role} worker, "
        f"{_range(own, f'{role}_received_bytes_per_token')} from it"
        for role in ("target", "draft")
        if own[f"{role}_sent_bytes_per_token"].max() > 0
    ]


def _ranges(own: DataFrame, columns: tuple[str, ...]) -> str:
    names = {name: name if name == PRICE else f"{name}_per_token" for name in columns}
    known = {name: column for name, column in names.items() if column in own and own[column].notna().any()}
    if len(columns) == 1:
        return "".join(_range(own, column) for column in known.values())
    return ", ".join(f"{name.partition('_')[0]} {_range(own, column)}" for name, column in known.items())


def _range(table: DataFrame, name: str) -> str:
    return " to ".join(dict.fromkeys(three_digits(end) for end in (table[name].min(), table[name].max())))
