"""The cache of models without weights against a plain list, and against the key/value cache that it stands in for."""

from __future__ import annotations

from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specsplit.decoding.tree import TokenTree
from specsplit.engines.kv_cache import KVCache
from specsplit.engines.token_cache import TokenCache, tokens_of_pass

CAPACITY = 24
VALUES = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5)


class ListCache:
    """What a cache means, in the plainest words."""

    def __init__(self) -> None:
        self.held: list[int] = []

    def add(self, values: list[int]) -> None:
        self.held = self.held + values

    def rollback(self, length: int) -> None:
        self.held = self.held[:length]

    def keep(self, context: int, path: list[int]) -> None:
        self.held = self.held[:context] + [self.held[context + node] for node in path]


def held(cache: TokenCache) -> list[int]:
    return cache.slots[: cache.length].tolist()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_sequence_of_operations_is_that_of_a_list(data: st.DataObject) -> None:
    cache, model = TokenCache(CAPACITY), ListCache()
    for _ in range(data.draw(st.integers(1, 12), label="operations")):
        kind = data.draw(st.sampled_from(["add", "write", "rollback", "keep"]), label="operation")
        if kind in ("add", "write"):
            values = data.draw(VALUES, label="values")
            if cache.length + len(values) > CAPACITY:
                with pytest.raises(ValueError, match="exceed the cache"):
                    cache.write(values)
            else:
                cache.write(values)
                if kind == "add":  # else the pass failed after its write: nothing may have happened
                    cache.advance(len(values))
                    model.add(values)
        elif kind == "rollback":
            length = data.draw(st.integers(0, cache.length), label="length")
            cache.rollback(length)
            model.rollback(length)
        else:
            context = data.draw(st.integers(0, cache.length), label="context")
            nodes = data.draw(st.sets(st.integers(0, max(cache.length - context - 1, 0))), label="path")
            path = sorted(nodes) if cache.length > context else []
            cache.keep(context, path)
            model.keep(context, path)
        assert held(cache) == model.held
        assert cache.capacity == CAPACITY == len(cache.slots)


def kv_cache(count: int) -> KVCache:
    """A key/value cache that holds `count` tokens."""
    cache = KVCache(num_layers=1, capacity=CAPACITY)
    states = torch.zeros(1, 1, count, 1)
    cache.update(states, states, 0)
    cache.advance(count)
    return cache


def outcome(cache: TokenCache | KVCache, operation: str, arguments: tuple) -> tuple[str, int]:
    """The message of the error, if any, and the length afterwards."""
    message = ""
    try:
        getattr(cache, operation)(*arguments)
    except ValueError as error:
        message = str(error)
    return message, cache.length


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(1, 8),
    operation=st.one_of(
        st.tuples(st.just("rollback"), st.tuples(st.integers(-2, 10))),
        st.tuples(st.just("keep"), st.tuples(st.integers(-1, 9), st.lists(st.integers(-1, 6), max_size=4))),
    ),
)
def test_lengths_and_errors_are_those_of_the_key_value_cache(count: int, operation: tuple[str, tuple]) -> None:
    cache = TokenCache(CAPACITY)
    cache.write(range(count))
    cache.advance(count)
    assert outcome(cache, *operation) == outcome(kv_cache(count), *operation)


def test_a_state_of_64_bits_is_held_exactly() -> None:
    cache = TokenCache(4)
    cache.write([2**64 - 1, 5, 2**63, 2**53 + 1])
    cache.advance(4)
    cache.keep(0, [0, 2, 3])
    assert held(cache) == [2**64 - 1, 2**63, 2**53 + 1]
    assert cache.nbytes() == 32


def test_a_pass_is_checked_before_anything_is_computed() -> None:
    cache = TokenCache(4)
    tree = TokenTree.chain([7, 8])
    assert tokens_of_pass(cache, [1, 2], tree, 0) == [1, 2, 7, 8]
    for tokens, nodes, cached, message in (
        ([], TokenTree(), 0, "at least one token"),
        ([1, 2, 3], tree, 0, "exceed the cache of 4"),
        ([1], tree, 1, "cannot follow tree nodes"),
        ([], tree, 1, "cannot be in a cache that holds 0"),
    ):
        with pytest.raises(ValueError, match=message):
            tokens_of_pass(cache, tokens, nodes, cached)
    assert cache.slots == array("Q", [0] * 4)
