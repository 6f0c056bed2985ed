"""The noise of decoding/sampling.py as torch operations, so that a GPU makes it where the logits are.

Philox 4x64 with ten rounds (Salmon et al. 2011, as in NumPy). torch has no unsigned 64-bit multiplication, so numbers
are int64 that wrap around, and the high half of a product is put together from products of 32-bit halves. The random
bits are those of `decoding.sampling` on every device; the two logarithms after them are the device's, which may differ
in the last bit. Not for torch.compile: on the CPU its code for numbers that wrap around has given other bits.
"""

from __future__ import annotations

from functools import lru_cache

import torch

MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
ROUNDS = 10
LOW = 0xFFFFFFFF


def signed(number: int) -> int:
    """An unsigned 64-bit number as the int64 of the same bits."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number


def gumbel(seeds: torch.Tensor, purpose: int, positions: torch.Tensor, size: int) -> torch.Tensor:
    """As sampling.gumbel, of many rows. seeds, positions: int64 [rows]. Returns float64 [rows, size]."""
    return -torch.log(-torch.log(uniform(seeds, purpose, positions, size)))


def uniform(seeds: torch.Tensor, purpose: int, positions: torch.Tensor, size: int) -> torch.Tensor:
    """The uniform numbers in (0, 1) of the first `size` token ids, bit for bit those of NumPy; float64 [rows, size]."""
    cells = (random_bits(seeds, purpose, positions, size) >> 12) & ((1 << 52) - 1)
    return (cells.double() + 0.5) * 2.0**-52


def random_bits(seeds: torch.Tensor, purpose: int, positions: torch.Tensor, size: int) -> torch.Tensor:
    """np.random.Philox(key=[seed, purpose], counter=[0, position, 0, 0]).random_raw(size) of each row, as int64."""
    blocks = -(-size // 4)
    # NumPy counts up before it makes the first block.
    first = torch.arange(1, blocks + 1, device=positions.device).expand(len(positions), blocks)
    even = torch.stack([first, torch.zeros_like(first)])  # words 0 and 2 of the counter
    odd = torch.stack([positions[:, None].expand_as(first), torch.zeros_like(first)])  # 1 and 3
    keys, multipliers = _constants(purpose, positions.device)
    keys = keys + torch.stack([seeds, torch.zeros_like(seeds)])[:, :, None]
    for key in keys:
        high, low = _product(even, multipliers)
        even, odd = high.flip(0) ^ odd ^ key, low.flip(0)
    return torch.stack([even[0], odd[0], even[1], odd[1]], -1).reshape(len(positions), 4 * blocks)[:, :size]


@lru_cache
def _constants(purpose: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys of each round but for the seed, [ROUNDS, 2, 1, 1], and the multipliers, [2, 1, 1]. Made once, as a
    recorded pass must not copy from the host."""
    keys = [[signed(n * KEY_STEPS[0]), signed(purpose + n * KEY_STEPS[1])] for n in range(ROUNDS)]
    multipliers = [signed(multiplier) for multiplier in MULTIPLIERS]
    return (
        torch.tensor(keys, device=device)[:, :, None, None],
        torch.tensor(multipliers, device=device)[:, None, None],
    )


def _product(numbers: torch.Tensor, constants: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The high and the low 64 bits of unsigned products."""
    low, high = constants & LOW, _shifted(constants)
    own_low, own_high = numbers & LOW, _shifted(numbers)
    # Each sum is below 2^64: (2^32 - 1)^2 + 2^32 - 1.
    first = own_high * low + _shifted(own_low * low)
    second = own_low * high + (first & LOW)
    return own_high * high + _shifted(first) + _shifted(second), numbers * constants


def _shifted(numbers: torch.Tensor) -> torch.Tensor:
    """The upper 32 bits, as a number that is not negative."""
    return (numbers >> 32) & LOW
