"""Names of drafts and files, and rules of settings, that the workflow reads as well: Snakemake imports this without
pydantic.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from specsplit.errors import counted

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


def swept_drafts(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every draft of the sweep by its name, each with all keys of `draft` and one value of `lookup`; without `drafts`
    that one alone. Where acceptance is forced, `lookup` and `p_min` are 0."""
    drafts = {}
    for name, own in named_drafts(config).items():
        forced = own.get("acceptance")
        for lookup in [0] if forced is not None else own.get("lookup", [0]):
            p_min = 0.0 if forced is not None else own.get("p_min", 0.0)
            drafts[lookup_name(synthetic_name(name, forced), lookup)] = {**own, "lookup": lookup, "p_min": p_min}
    return drafts


def named_drafts(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """As `drafts` has them, each with all keys of `draft`; without `drafts` that one alone."""
    return {name: {**config["draft"], **changes} for name, changes in (config["drafts"] or {DEFAULT_DRAFT: {}}).items()}


def first_draft(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name and the keys of the first draft as it is, its acceptance not forced and without prompt lookup."""
    name, draft = next(iter(named_drafts(config).items()))
    return name, {**draft, "acceptance": None, "lookup": 0}


def fetched_path(dataset: Mapping[str, Any]) -> str | None:
    """Where the workflow puts a set of prompts that it fetches; None when the prompts are a file of the user."""
    hub = dataset["huggingface"]
    if not (dataset["name"] or hub):
        return None
    parts = [dataset["name"]] if dataset["name"] else [hub[key] for key in hub if hub[key]]
    return f"resources/datasets/{re.sub(r'[^A-Za-z0-9._-]', '-', '@'.join(parts))}.jsonl"


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
    if requests >= least:
        return ""
    who = counted(max(clients), "client needs", "clients need")
    return f"requests is {requests}: {who} at least {least}, four each"
