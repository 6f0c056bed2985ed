"""Messages and the types they stand for."""

from __future__ import annotations

import math
import re
import struct
import sys
import zlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specsplit.decoding.sampling import GREEDY, Sampling, candidates
from specsplit.decoding.tree import ROOT, TokenTree
from specsplit.rpc.codec import (
    sampling_from_message,
    sampling_to_message,
    tokens_crc32,
    tree_from_message,
    tree_to_message,
)
from specsplit.rpc.hidden_states import FORMS, StatesError, pack_states, row_bytes, unpack_states
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.worker.refusals import LimitReached
from specsplit.worker.states import Wanted

TREES = [
    TokenTree(),
    TokenTree.chain([4, 5, 6], [-0.5, -1.0, 0.0]),
    TokenTree([1, 2, 3, 1], [-1, -1, 0, 2], [-0.25, -2.0, -0.125, -8.0]),
    TokenTree([1, 2], [-1, 0], [-0.25, -2.0], {ROOT: ([7, 1], [0.75, 0.25]), 0: ([2], [1.0])}),
]


@pytest.mark.parametrize("tree", TREES)
def test_a_tree_survives_the_wire(tree: TokenTree) -> None:
    received = pb.TokenTree.FromString(tree_to_message(tree).SerializeToString())
    assert tree_from_message(received) == tree


@given(st.integers(0, 1000), st.integers(1, 400), st.floats(0.1, 4.0))
def test_a_distribution_that_was_drawn_from_survives_the_wire(seed: int, vocab: int, temperature: float) -> None:
    """To the last bit: what is verified against must be what was sampled from."""
    logits = 4 * torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed))
    best = candidates(logits, [0], Sampling(temperature, seed=seed, rejection=True), 1)[0]
    tree = TokenTree([], [], [], {ROOT: (best.support, best.probabilities)})
    received = pb.TokenTree.FromString(tree_to_message(tree).SerializeToString())
    assert tree_from_message(received).distributions == tree.distributions


def test_a_malformed_message_is_read_as_it_is() -> None:
    tree = tree_from_message(pb.TokenTree(token_ids=[1, 2], parents=[-1]))
    assert (tree.token_ids, tree.parents, tree.log_probs) == ([1, 2], [-1], [])


samplings = st.builds(
    Sampling,
    temperature=st.just(0.0) | st.floats(1e-6, 100),
    top_k=st.integers(0, 2**32 - 1),
    top_p=st.floats(0, 1, exclude_min=True),
    seed=st.integers(0, 2**64 - 1),
    rejection=st.booleans(),
)


@given(samplings)
def test_sampling_survives_the_wire(sampling: Sampling) -> None:
    """Temperature and top_p to the last bit, for both workers must cut alike."""
    received = pb.Sampling.FromString(sampling_to_message(sampling).SerializeToString())
    assert sampling_from_message(received) == sampling


def test_a_request_that_says_nothing_is_greedy() -> None:
    assert sampling_from_message(pb.Sampling()) == GREEDY


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (pb.Sampling(temperature=-0.1), "temperature -0.1 is neither 0 nor from 1e-06 to 100"),
        (pb.Sampling(temperature=math.nan), "temperature nan is neither"),
        (pb.Sampling(temperature=math.inf), "temperature inf is neither"),
        (pb.Sampling(temperature=1e-300), "temperature 1e-300 is neither"),
        (pb.Sampling(temperature=101), "temperature 101.0 is neither"),
        (pb.Sampling(top_p=-0.5), "top_p -0.5 is not above 0 and at most 1"),
        (pb.Sampling(top_p=1.5), "top_p 1.5 is not"),
        (pb.Sampling(top_p=math.nan), "top_p nan is not"),
    ],
)
def test_sampling_out_of_range_is_refused(message: pb.Sampling, complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        sampling_from_message(message)


@pytest.mark.parametrize("tokens", [[], [0], [1, 2, 3], [2**32 - 1, 0, 151_936]])
def test_the_checksum_is_that_of_little_endian_words(tokens: list[int]) -> None:
    assert tokens_crc32(tokens) == zlib.crc32(struct.pack(f"<{len(tokens)}I", *tokens))


def test_the_checksum_does_not_depend_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [1, 70_000]
    monkeypatch.setattr(sys, "byteorder", "big" if sys.byteorder == "little" else "little")
    assert tokens_crc32(tokens) == zlib.crc32(struct.pack(">2I", *tokens))  # swapped on the machine pretended


@pytest.mark.parametrize("cut", range(5))
def test_the_checksum_goes_on_from_a_prefix(cut: int) -> None:
    tokens = [9, 8, 7, 6]
    assert tokens_crc32(tokens[cut:], tokens_crc32(tokens[:cut])) == tokens_crc32(tokens)


def test_order_and_length_change_the_checksum() -> None:
    assert len({tokens_crc32(tokens) for tokens in ([], [0], [0, 0], [1, 2], [2, 1])}) == 5


# ---- hidden states

LARGEST_ERROR = {"float32": 0.0, "bfloat16": 2**-8, "int8": 1 / 254}  # of the number itself; int8: of its row's largest
floats = st.floats(-(2.0**99), 2.0**99, width=32)


@pytest.mark.parametrize("form", FORMS)
@given(rows=st.lists(st.tuples(floats, floats, floats), max_size=5), first=st.integers(0, 2**32 - 1))
def test_hidden_states_survive_the_wire(form: str, rows: list[tuple[float, ...]], first: int) -> None:
    sent = torch.tensor(rows).view(-1, 3)
    message = pb.HiddenStates.FromString(pack_states(sent, first, form, projected=True).SerializeToString())
    assert (message.first, message.count, message.form, message.projected) == (first, len(rows), form, True)
    assert len(message.data) + len(message.scales) == len(rows) * row_bytes(form, 3)
    read = unpack_states(message, 3)
    largest = sent.abs() if form == "bfloat16" else sent.abs().amax(1, keepdim=True)
    smallest = 0.0 if form == "float32" else 1e-37  # numbers near the least that a float can be are rounded to others
    assert ((read - sent).abs() <= LARGEST_ERROR[form] * largest * (1 + 1e-6) + smallest).all()
    if form == "bfloat16":  # what is narrower already stays as it is
        assert torch.equal(unpack_states(pack_states(read.bfloat16(), first, form), 3), read)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_still_so_at_the_other_end(form: str, bad: float) -> None:
    rows = torch.ones(3, 4)
    rows[1, 2] = bad
    assert unpack_states(pack_states(rows, 0, form), 4).isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("form", FORMS)
def test_hidden_states_are_sent_in_parts_that_fit(form: str) -> None:
    rows = torch.randn(12, 4)  # of a whole text, of which the last 7 are wanted
    wanted = Wanted(5, (0,), form, None, message_bytes=3 * row_bytes(form, 4) + 1)
    parts = wanted.packed(rows, parts=True)
    assert [(part.first, part.count) for part in parts] == [(5, 3), (8, 3), (11, 1)]
    whole = unpack_states(pack_states(rows[5:], 5, form), 4)
    assert torch.equal(torch.cat([unpack_states(part, 4) for part in parts]), whole)
    with pytest.raises(LimitReached, match="of 7 positions"):
        wanted.packed(rows, parts=False)
    assert [part.count for part in replace(wanted, message_bytes=0).packed(rows, parts=False)] == [7]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"form": "float64"}, "form 'float64' is none of bfloat16, float32, int8"),
        ({"count": 3}, "data has 32 bytes, and 3 positions of 4 numbers as float32 take 48"),
        ({"count": 1 << 31}, "data has 32 bytes, and"),
        ({"data": bytes(31)}, "data has 31 bytes, and 2 positions of 4 numbers as float32 take 32"),
        ({"scales": bytes(8)}, "scales has 8 bytes, and 2 positions of 4 numbers as float32 take 0"),
        ({"form": "int8", "data": bytes(8)}, "scales has 0 bytes, and 2 positions of 4 numbers as int8 take 8"),
    ],
)
def test_hidden_states_of_another_shape_are_refused(fields: dict[str, object], reason: str) -> None:
    message = pack_states(torch.ones(2, 4), 0, "float32")
    message.MergeFrom(pb.HiddenStates(**fields))  # type: ignore[arg-type]
    with pytest.raises(StatesError, match=reason):
        unpack_states(message, 4)
