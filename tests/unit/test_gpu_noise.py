"""The counter-based noise in torch operations: the bits of NumPy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from specsplit.decoding import sampling
from specsplit.engines import gpu_noise

words = st.integers(0, (1 << 64) - 1)


@settings(max_examples=60, deadline=None)
@given(seed=words, purpose=st.integers(0, 3), position=st.integers(0, 1 << 40), size=st.integers(1, 70))
@example(seed=(1 << 64) - 1, purpose=3, position=(1 << 63) - 1, size=9)
@example(seed=1 << 63, purpose=0, position=0, size=4)
def test_bits_are_those_of_numpy(seed: int, purpose: int, position: int, size: int) -> None:
    seeds, positions = torch.tensor([gpu_noise.signed(seed)] * 2), torch.tensor([position, 5])
    found = gpu_noise.random_bits(seeds, purpose, positions, size).numpy().view(np.uint64)
    for row, at in zip(found, positions.tolist(), strict=True):
        key = np.array([seed, purpose], dtype=np.uint64)
        assert (row == np.random.Philox(key=key, counter=[0, at, 0, 0]).random_raw(size)).all()
    numbers = gpu_noise.uniform(seeds, purpose, positions, size)
    assert (numbers[0].numpy() == sampling._uniform(seed, purpose, position, size)).all()
    noise = gpu_noise.gumbel(seeds, purpose, positions, size)
    torch.testing.assert_close(noise[0], sampling.gumbel(seed, purpose, position, size), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("number", [0, 1, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_products_of_unsigned_numbers(number: int) -> None:
    for constant in gpu_noise.MULTIPLIERS:
        high, low = gpu_noise._product(*(torch.tensor([gpu_noise.signed(each)]) for each in (number, constant)))
        assert [gpu_noise.signed(part) for part in divmod(number * constant, 1 << 64)] == [high.item(), low.item()]
