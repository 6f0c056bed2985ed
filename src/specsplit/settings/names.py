"""Names and rules of settings that the workflow reads as well. Snakemake imports this without pydantic."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

AUTO = "auto"
DEFAULT_DRAFT = "draft"  # name of a draft that has no other
SYNTHETIC = "-synthetic-"  # in the name of one whose acceptance is forced
MARKED = re.compile(r"-(lookup|synthetic-)[0-9][0-9.e+-]*$")  # what is added to the name of a draft
REQUESTS_A_CLIENT = 4  # at least, or there is no time in which all clients are at work and none starts or ends


def synthetic_name(draft: str, acceptance: float | None) -> str:
    """The name of a draft whose acceptance is forced; its own when it is not."""
    mark = "" if acceptance is None else f"{SYNTHETIC}{acceptance:g}"
    return draft if draft.endswith(mark) else draft + mark


def lookup_name(draft: str, lookup: int) -> str:
    """The name of a draft that prompt lookup is tried before; its own without."""
    mark = f"-lookup{lookup}" if lookup else ""
    return draft if draft.endswith(mark) else draft + mark


def gamma_order(gamma: int | str) -> float:
    """Sorts draft lengths: numbers first, then `auto`."""
    return float("inf") if gamma == AUTO else float(gamma)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` with the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def too_few_requests(clients: Sequence[int], requests: int) -> str:
    """What is wrong with so many requests for the most clients, in words; empty when nothing is."""
    least = REQUESTS_A_CLIENT * max(clients)
    return (
        "" if requests >= least else f"requests is {requests}: {max(clients)} clients need at least {least}, four each"
    )
