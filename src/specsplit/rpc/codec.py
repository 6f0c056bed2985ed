"""Between protobuf messages and the types of `decoding`."""

from __future__ import annotations

import sys
import zlib
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.message import DecodeError

from specsplit.decoding.sampling import Sampling
from specsplit.decoding.tree import TokenTree, TreeError
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import MAX_TEMPERATURE, MIN_TEMPERATURE

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),  # workers are reached directly, whatever http_proxy says
    ("grpc.initial_reconnect_backoff_ms", 100),  # a restarted worker is found again soon
    ("grpc.max_reconnect_backoff_ms", 2000),
    # A peer that is silent, as behind a connection that is open on one side only, is noticed after 15 s, by both
    # sides. A worker answers pings whatever its Python threads do.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),  # of a client that waits for a long pass: no limit
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # nor does the server mind
]


class _Malformed:
    """A message whose bytes are none of its type. gRPC alone would answer INTERNAL, as for a fault of ours."""

    why = "the bytes of the request are not a message of this method, or a text in it is not UTF-8"


MALFORMED = _Malformed()


def lenient(deserializer: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """The deserializer with MALFORMED for bytes that it cannot read."""

    def read(data: bytes) -> Any:
        try:
            return deserializer(data)
        except DecodeError:
            return MALFORMED

    return read


def tree_to_message(tree: TokenTree) -> pb.TokenTree:
    return pb.TokenTree(
        token_ids=tree.token_ids,
        parents=tree.parents,
        log_probs=tree.log_probs,
        distributions=[
            pb.Distribution(node=node, token_ids=tokens, probabilities=probabilities)
            for node, (tokens, probabilities) in tree.distributions.items()
        ],
        source=tree.source,
    )


def tree_from_message(message: pb.TokenTree) -> TokenTree:
    """The tree as sent; call `validate` before trusting it. Raises TreeError when a node has two distributions."""
    distributions = {d.node: (list(d.token_ids), list(d.probabilities)) for d in message.distributions}
    if len(distributions) < len(message.distributions):
        raise TreeError("a node has two distributions")
    arrays = list(message.token_ids), list(message.parents), list(message.log_probs)
    return TokenTree(*arrays, distributions, message.source)


def sampling_to_message(sampling: Sampling) -> pb.Sampling:
    return pb.Sampling(
        temperature=sampling.temperature,
        top_k=min(sampling.top_k, (1 << 32) - 1),
        top_p=sampling.top_p,
        seed=sampling.seed,
        rejection=sampling.rejection,
    )


def sampling_from_message(message: pb.Sampling) -> Sampling:
    """Raises ValueError for a temperature or top_p out of range."""
    temperature, top_p = message.temperature, message.top_p or 1.0
    if temperature and not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:  # NaN as well
        raise ValueError(f"temperature {temperature} is neither 0 nor from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} is not above 0 and at most 1")
    return Sampling(temperature, message.top_k, top_p, message.seed, message.rejection)


def tokens_crc32(tokens: Sequence[int], crc: int = 0) -> int:
    """CRC-32 of tokens as little-endian 32-bit integers, going on from `crc`: what `prefix_crc32` holds."""
    words = array("I", tokens)
    if sys.byteorder == "big":
        words.byteswap()
    return zlib.crc32(words, crc)
