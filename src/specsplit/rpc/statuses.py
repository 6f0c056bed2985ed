"""What a gRPC status means for the text: whether it is tried again, and after how long.

Three speak with one voice: a worker, gRPC itself on either side, and a proxy in between. RULES tells them apart, first
match first; docs/reliability.md shows the same table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from grpc import StatusCode as Code

ALL_TAKEN = "others have all sessions"  # in the details, where a lost session has to be waited for
RETRY_AFTER = "retry-after-ms"  # metadata of a refusal that is for now only
PUSHBACK = "grpc-retry-pushback-ms"  # the same from gRPC's own retries (proposal A6); below 0: do not try again

Remedy = Literal["resend", "wait", "none"]
"""`wait`: it may be back, or have room, later: try again after the time it names, or with exponential backoff, for
`recovery_timeout_s`. `resend`: it lost the session and needs the whole text: at once, a few times in a round.
`none`: it would say the same again."""


@dataclass(frozen=True)
class Rule:
    """codes: any of these; empty = any. said: regular expression that the details begin with. hinted: it comes with a
    time to wait. cut_off: the code is that of a broken connection, whatever gRPC calls it."""

    what: str
    codes: Collection[Code]
    remedy: Remedy
    said: str = ""
    hinted: bool = False
    cut_off: bool = False


RULES = (
    Rule("a worker, or a proxy, names a time to wait", (), "wait", hinted=True),
    Rule(
        "gRPC: the server has all the calls that it takes",
        (Code.RESOURCE_EXHAUSTED,),
        "wait",
        said="Concurrent RPC limit exceeded",
    ),
    Rule(
        "a proxy limits rates or is overloaded",
        (Code.RESOURCE_EXHAUSTED,),
        "wait",
        said=r"(?i).*(rate.?limit|too many requests|overload)",
    ),
    Rule(
        "gRPC: the connection broke in the middle of a message",
        (Code.INTERNAL, Code.UNKNOWN, Code.UNAVAILABLE, Code.CANCELLED),
        "wait",
        said="Internal error from Core|Received RST_STREAM|Stream removed|RST_STREAM",
        cut_off=True,
    ),
    Rule(
        "a proxy answers in HTTP that the worker is not there now",
        (Code.UNKNOWN, Code.INTERNAL, Code.UNAVAILABLE),
        "wait",
        said=r"Received http2 header with status: (408|425|429|5\d\d)",
    ),
    Rule(
        "the worker is gone, hangs, stops, or loads its model",
        (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.CANCELLED),
        "wait",
    ),
    Rule(
        "the worker does not hold the text (any more)",
        (Code.FAILED_PRECONDITION, Code.NOT_FOUND, Code.ABORTED),
        "resend",
    ),
    Rule("the request is refused, or the worker has a fault", (), "none"),
)


@dataclass(frozen=True)
class Meaning:
    """code: of the status, or of what it stands for. after_s: how long it asks to be left alone, 0 if it does not."""

    rule: Rule
    code: Code
    details: str
    after_s: float = 0.0


def meaning(code: Code, details: str | None, metadata: Any = None) -> Meaning:
    """What a status means. metadata: pairs that came with it, or None."""
    details = details or "no details"
    after_s = _hint_s(metadata)
    for rule in RULES:
        if (
            (not rule.codes or code in rule.codes)
            and re.match(rule.said, details, re.DOTALL)
            and (after_s is not None or not rule.hinted)
        ):
            break
    if rule.cut_off:
        return Meaning(rule, Code.UNAVAILABLE, f"the connection broke ({details})")
    return Meaning(rule, code, details, after_s or 0.0)


def _hint_s(metadata: Any) -> float | None:
    """Seconds to wait, as metadata say; None when nothing that can be read does."""
    for key, value in metadata or ():
        if key in (RETRY_AFTER, PUSHBACK):
            try:
                seconds = float(value) / 1e3
            except ValueError:
                continue
            if math.isfinite(seconds) and seconds >= 0:
                return seconds
    return None
