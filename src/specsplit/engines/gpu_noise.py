"""The noise of decoding/sampling.py as torch operations, so that a GPU makes it where the logits are.

Philox 4x64 with ten rounds (Salmon et al. 2011, as in NumPy). torch has no unsigned 64-bit multiplication, so numbers are
int64 that wrap around, and the high half of a product is put together from products of 32-bit halves. The random bits
are those of `decoding.sampling` on every device; the two logarithms after them are the device's, which may differ in
the last bit.
"""

from __future__ import annotations

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
    counter = [first, positions[:, None].expand_as(first), torch.zeros_like(first), torch.zeros_like(first)]
    key0, key1 = seeds[:, None], purpose
    for _ in range(ROUNDS):
        high0, low0 = _product(counter[0], MULTIPLIERS[0])
        high1, low1 = _product(counter[2], MULTIPLIERS[1])
        counter = [high1 ^ counter[1] ^ key0, low1, high0 ^ counter[3] ^ signed(key1), low0]
        key0, key1 = key0 + signed(KEY_STEPS[0]), key1 + KEY_STEPS[1]
    return torch.stack(counter, -1).reshape(len(positions), 4 * blocks)[:, :size]


def _product(numbers: torch.Tensor, constant: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The high and the low 64 bits of unsigned products."""
    low, high = constant & LOW, constant >> 32
    own_low, own_high = numbers & LOW, _shifted(numbers)
    # Each sum is below 2^64: (2^32 - 1)^2 + 2^32 - 1.
    first = own_high * low + _shifted(own_low * low)
    second = own_low * high + (first & LOW)
    return own_high * high + _shifted(first) + _shifted(second), numbers * signed(constant)


def _shifted(numbers: torch.Tensor) -> torch.Tensor:
    """The upper 32 bits, as a number that is not negative."""
    return (numbers >> 32) & LOW
