"""Messages and the types they stand for."""

from __future__ import annotations

import struct
import sys
import zlib

import pytest

from specsplit.decoding.tree import TokenTree
from specsplit.rpc.codec import tokens_crc32, tree_from_message, tree_to_message
from specsplit.rpc.v1 import specsplit_pb2 as pb

TREES = [
    TokenTree(),
    TokenTree.chain([4, 5, 6], [-0.5, -1.0, 0.0]),
    TokenTree([1, 2, 3, 1], [-1, -1, 0, 2], [-0.25, -2.0, -0.125, -8.0]),
]


@pytest.mark.parametrize("tree", TREES)
def test_a_tree_survives_the_wire(tree: TokenTree) -> None:
    received = pb.TokenTree.FromString(tree_to_message(tree).SerializeToString())
    assert tree_from_message(received) == tree


def test_a_malformed_message_is_read_as_it_is() -> None:
    tree = tree_from_message(pb.TokenTree(token_ids=[1, 2], parents=[-1]))
    assert (tree.token_ids, tree.parents, tree.log_probs) == ([1, 2], [-1], [])


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
