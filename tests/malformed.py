"""Requests that a worker must refuse, each with its status: the table of docs/security.md, made with random content."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from specsplit.rpc.codec import MAX_MESSAGE_BYTES
from specsplit.rpc.v1 import specsplit_pb2 as pb

Code = grpc.StatusCode
VOCAB, MAX_CONTEXT, MAX_NODES = 128, 64, 20  # of the workers that these requests are for
HELD = [5, 6, 7]  # what session "held" of the workers holds, after round 5
VERIFY, DRAFT = "/specsplit.v1.TargetService/VerifyDrafts", "/specsplit.v1.DraftService/GenerateDrafts"
STREAMS = {VERIFY: "/specsplit.v1.TargetService/StreamVerify", DRAFT: "/specsplit.v1.DraftService/StreamDrafts"}
BAD, LOST, FULL = Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION, Code.RESOURCE_EXHAUSTED


@dataclass(frozen=True)
class Malformed:
    """make(rng): the bytes of the request, or of the messages of a stream."""

    name: str
    method: str
    status: grpc.StatusCode
    make: Callable[[random.Random], bytes | list[bytes]]

    def send(self, channel: grpc.Channel, rng: random.Random, timeout_s: float = 20.0) -> tuple[grpc.StatusCode, str]:
        """The status and details that a worker answers; OK when it does not refuse."""
        data = self.make(rng)
        try:
            if isinstance(data, list):
                for _ in channel.stream_stream(self.method)(iter(data), timeout=timeout_s):
                    pass
            else:
                channel.unary_unary(self.method)(data, timeout=timeout_s)
        except grpc.RpcError as error:
            return error.code(), error.details()
        return Code.OK, ""


def context(rng: random.Random, tokens: Sequence[int] = (9,), **fields: Any) -> pb.Context:
    return pb.Context(**{"session_id": f"bad-{rng.random()}", "round": 1, "new_tokens": tokens, **fields})


def tree(
    *token_ids: int, parents: Sequence[int] | None = None, log_probs: Sequence[float] | None = None, **fields: Any
):
    n = len(token_ids)
    return pb.TokenTree(
        token_ids=token_ids,
        parents=range(-1, n - 1) if parents is None else parents,
        log_probs=[-1.0] * n if log_probs is None else log_probs,
        **fields,
    )


def outside(rng: random.Random) -> int:
    return rng.choice([VOCAB, VOCAB + 1, rng.randrange(VOCAB, 2**32), 2**32 - 1])


# What is wrong with a context, on either worker.
CONTEXTS: list[tuple[str, grpc.StatusCode, Callable[[random.Random], pb.Context]]] = [
    ("token outside the vocabulary", BAD, lambda r: context(r, [5] * r.randrange(9) + [outside(r)])),
    ("empty prompt", BAD, lambda r: context(r, [])),
    ("oversize prompt", FULL, lambda r: context(r, [5] * r.randrange(MAX_CONTEXT + 1, 40_000))),
    ("impossible prefix length", FULL, lambda r: context(r, prefix_length=r.randrange(MAX_CONTEXT, 2**32))),
    ("round 0", BAD, lambda r: context(r, round=0)),
    ("endless round", BAD, lambda r: context(r, round=r.randrange(2**31, 2**32))),
    ("no session id", BAD, lambda r: context(r, session_id="")),
    ("long session id", BAD, lambda r: context(r, session_id="x" * r.randrange(129, 5000))),
    ("unknown session", LOST, lambda r: context(r, prefix_length=r.randrange(1, 9))),
    (
        "wrong prefix",
        LOST,
        lambda r: context(
            r, session_id="held", round=6, prefix_length=r.randrange(1, 9), prefix_crc32=r.randrange(2**32)
        ),
    ),
    ("stale round", Code.ABORTED, lambda r: context(r, session_id="held", round=r.randrange(1, 5))),
    (
        "repeated round with other content",
        Code.ABORTED,
        lambda r: context(r, [r.randrange(60, VOCAB)], session_id="held", round=5),
    ),
]

OF_HELD = {"wrong prefix", "stale round", "repeated round with other content"}  # a stream would end the session

TREES: list[tuple[str, Callable[[random.Random], pb.TokenTree]]] = [
    ("cycle", lambda r: tree(5, 6, 7, parents=[-1, 2, 1])),
    ("own parent", lambda r: tree(5, parents=[0])),
    ("forward parent", lambda r: tree(5, 6, parents=[r.randrange(1, 2**31), -1])),
    ("negative parent", lambda r: tree(5, parents=[-r.randrange(2, 2**31)])),
    ("lengths that differ", lambda r: tree(5, 6, parents=[-1] * r.choice([0, 1, 3, 100_000]))),
    ("too few log-probabilities", lambda r: tree(5, 6, log_probs=[-1.0])),
    ("NaN log-probability", lambda r: tree(5, log_probs=[float("nan")])),
    ("positive log-probability", lambda r: tree(5, log_probs=[r.uniform(1e-30, 1e30)])),
    ("infinite log-probability", lambda r: tree(5, log_probs=[float("-inf")])),
    ("drafted token outside the vocabulary", lambda r: tree(outside(r))),
    ("token twice under a parent", lambda r: tree(5, 5, parents=[-1, -1])),
    ("distribution of no node", lambda r: tree(5, distributions=[distribution(r.choice([-2, 1, 99]), [5])])),
    ("distribution twice", lambda r: tree(5, distributions=[distribution(-1, [5])] * 2)),
    ("distributions without end", lambda r: tree(5, distributions=[distribution(-1, [5])] * 500)),
    ("probability below 0", lambda r: tree(5, distributions=[distribution(-1, [5], [-r.random()])])),
    ("NaN probability", lambda r: tree(5, distributions=[distribution(-1, [5], [float("nan")])])),
    ("distribution outside the vocabulary", lambda r: tree(5, distributions=[distribution(-1, [5, outside(r)])])),
    ("distribution longer than the vocabulary", lambda r: tree(5, distributions=[distribution(-1, range(5000))])),
    ("distribution with a token twice", lambda r: tree(5, distributions=[distribution(-1, [5, 5])])),
    ("distribution without probabilities", lambda r: tree(5, distributions=[distribution(-1, [5], [])])),
]

SAMPLINGS: list[tuple[str, Callable[[random.Random], pb.Sampling]]] = [
    ("negative temperature", lambda r: pb.Sampling(temperature=-r.random() - 1e-9)),
    ("absurd temperature", lambda r: pb.Sampling(temperature=r.choice([float("nan"), float("inf"), 1e9, 5e-324]))),
    ("top_p out of range", lambda r: pb.Sampling(temperature=1, top_p=r.choice([-0.1, 1.1, float("nan")]))),
]

WANTED: list[tuple[str, Callable[[random.Random], pb.WantedStates]]] = [
    ("states of no layer", lambda r: pb.WantedStates(layers=[0, r.randrange(3, 2**32)], form="int8")),
    ("states of too many layers", lambda r: pb.WantedStates(layers=[0] * r.randrange(5, 5000), form="int8")),
    ("states in no form", lambda r: pb.WantedStates(layers=[0], form="x" * r.randrange(5000))),
    ("states of no position", lambda r: pb.WantedStates(layers=[0], form="int8", first=r.randrange(1, 2**32))),
    ("states projected by nobody", lambda r: pb.WantedStates(layers=[0], form="int8", projected=True)),
]

# GenerateDrafts alone.
DRAFTS: list[tuple[str, grpc.StatusCode, Callable[[random.Random], dict[str, Any]]]] = [
    ("gamma 0", BAD, lambda r: {"max_draft_tokens": 0}),
    ("huge gamma", BAD, lambda r: {"max_draft_tokens": r.randrange(65, 2**32)}),
    ("branching out of range", BAD, lambda r: {"branching": [2, r.choice([0, 9, 2**32 - 1])]}),
    ("endless branching", BAD, lambda r: {"branching": [1] * r.randrange(65, 5000)}),
    ("too many nodes", FULL, lambda r: {"max_draft_tokens": 4, "branching": [8] * r.randrange(2, 65)}),
    ("too many tree nodes", BAD, lambda r: {"tree_nodes": r.randrange(257, 2**32), "tree_width": 4}),
    ("width 0", BAD, lambda r: {"tree_nodes": 8, "tree_width": 0}),
    ("tree_nodes and branching", BAD, lambda r: {"tree_nodes": 8, "tree_width": 4, "branching": [2]}),
    ("huge fan-out", BAD, lambda r: {"ahead": pb.Ahead(fan_out=r.randrange(65, 2**32))}),
    ("huge gamma ahead", BAD, lambda r: {"ahead": pb.Ahead(fan_out=2, max_draft_tokens=r.randrange(65, 2**32))}),
    ("stop tokens without end", BAD, lambda r: {"stop_token_ids": range(r.randrange(1025, 5000))}),
    ("hidden states for a draft that reads none", BAD, lambda r: {"states": [pb.HiddenStates(count=r.randrange(9))]}),
    ("p_min out of range", BAD, lambda r: {"p_min": r.choice([-0.1, 1.1, float("nan"), float("inf")])}),
    (
        "p_min with rejection sampling",
        BAD,
        lambda r: {"p_min": r.random(), "sampling": pb.Sampling(temperature=1, rejection=True)},
    ),
    (
        "p_min with forced acceptance",
        BAD,
        lambda r: {"p_min": r.random(), "forced": pb.Forced(tokens=[1], right=[True])},
    ),
    (
        "dynamic tree with rejection sampling",
        BAD,
        lambda r: {"tree_nodes": 8, "tree_width": 4, "sampling": pb.Sampling(temperature=1, rejection=True)},
    ),
]


def distribution(node: int, token_ids: Sequence[int], probabilities: Sequence[float] | None = None) -> pb.Distribution:
    q = [1 / len(token_ids)] * len(token_ids) if probabilities is None else probabilities
    return pb.Distribution(node=node, token_ids=token_ids, probabilities=q)


def garbage(rng: random.Random) -> bytes:
    """Bytes that are no message: a field of a length that is not there."""
    return bytes([10, 0xFF, 0xFF, 0x01]) + rng.randbytes(rng.randrange(50))


def invalid_utf8(rng: random.Random) -> bytes:
    """A request whose session_id is not UTF-8."""
    text = bytes([rng.randrange(0x80, 0xC0)]) * 4
    inside = bytes([10, len(text)]) + text
    return bytes([10, len(inside)]) + inside


def message_for(method: str, **fields: Any) -> bytes:
    if method == VERIFY:
        return pb.VerifyDraftsRequest(**fields).SerializeToString()
    return pb.GenerateDraftsRequest(**{"max_draft_tokens": 3, **fields}).SerializeToString()


def in_stream(method: str, data: bytes) -> bytes:
    """The message of the stream that says the same as a unary request."""
    if method == DRAFT:
        return data
    return pb.StreamVerifyRequest(verify=pb.VerifyDraftsRequest.FromString(data)).SerializeToString()


def good(method: str, rng: random.Random, **fields: Any) -> bytes:
    return message_for(method, context=context(rng, HELD, **fields))


def _pair(
    name: str,
    method: str,
    status: grpc.StatusCode,
    fields: Callable[[random.Random], dict[str, Any]],
    *,
    streamed: bool = True,
) -> list[Malformed]:
    """The request with what `fields` says, alone and as the message of a stream."""

    def make(rng: random.Random) -> bytes:
        return message_for(method, **{"context": context(rng), **fields(rng)})

    cases = [Malformed(name, method, status, make)]
    if streamed:
        cases.append(
            Malformed(f"{name}, streamed", STREAMS[method], status, lambda rng: [in_stream(method, make(rng))])
        )
    return cases


def _table() -> list[Malformed]:
    cases: list[Malformed] = []
    for method in (VERIFY, DRAFT):
        for name, status, make in CONTEXTS:
            cases += _pair(
                name, method, status, lambda r, make=make: {"context": make(r)}, streamed=name not in OF_HELD
            )
        for name, sampling in SAMPLINGS:
            cases += _pair(name, method, BAD, lambda r, sampling=sampling: {"sampling": sampling(r)})
        cases += [
            Malformed("bytes that are no message", method, BAD, garbage),
            Malformed("invalid UTF-8", method, BAD, invalid_utf8),
            Malformed("bytes that are no message, streamed", STREAMS[method], BAD, lambda r: [garbage(r)]),
            Malformed("message over the size limit", method, FULL, lambda r: bytes(MAX_MESSAGE_BYTES + 1)),
            Malformed(
                "wrong protocol version", method.replace(".v1.", ".v2."), Code.UNIMPLEMENTED, lambda r: r.randbytes(9)
            ),
            Malformed("unknown method", f"{method}s", Code.UNIMPLEMENTED, lambda r: r.randbytes(9)),
            Malformed(
                "two sessions in a stream",
                STREAMS[method],
                BAD,
                lambda r, method=method: [in_stream(method, good(method, r)) for _ in range(2)],
            ),
        ]
    add_tree = [
        *TREES,
        ("rejection without a distribution", lambda r: tree(5)),
        ("rejection of what cannot be drawn", lambda r: tree(5, distributions=[distribution(-1, [6])])),
    ]
    for name, make_tree in add_tree:
        sampling = pb.Sampling(temperature=1, rejection=name.startswith("rejection"))
        cases.append(
            Malformed(
                name,
                VERIFY,
                BAD,
                lambda r, make=make_tree, sampling=sampling: message_for(
                    VERIFY, context=context(r), tree=make(r), sampling=sampling
                ),
            )
        )
    cases += [
        Malformed(
            "too many nodes",
            VERIFY,
            FULL,
            lambda r: message_for(VERIFY, context=context(r), tree=tree(*([5] * r.randrange(MAX_NODES + 1, 5000)))),
        ),
        Malformed("neither verify nor prepared", STREAMS[VERIFY], BAD, lambda r: [b""]),
        Malformed(
            "too many outcomes",
            STREAMS[VERIFY],
            BAD,
            lambda r: [
                pb.StreamVerifyRequest(
                    prepared=pb.Prepared(round=1, outcomes=[pb.Outcome()] * r.randrange(65, 5000))
                ).SerializeToString()
            ],
        ),
    ]
    for name, wanted in WANTED:
        cases += _pair(name, VERIFY, BAD, lambda r, wanted=wanted: {"wanted_states": wanted(r)})
    for name, status, fields in DRAFTS:
        cases.append(
            Malformed(name, DRAFT, status, lambda r, fields=fields: message_for(DRAFT, context=context(r), **fields(r)))
        )
    return cases


TABLE = _table()


def hold(channel: grpc.Channel, method: str) -> None:
    """Give the worker session "held": HELD, in round 5."""
    request = pb.Context(session_id="held", round=5, new_tokens=HELD)
    channel.unary_unary(method)(message_for(method, context=request), timeout=20)
