"""Threads that each compute a part of a batch alone: on a CPU they do more than by sharing every product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Team:
    """As many threads as PyTorch may use on a CPU; one on a GPU. The same parts come in the same order every time."""

    def __init__(self, device: torch.device) -> None:
        self.size = torch.get_num_threads() if device.type == "cpu" else 1
        self._threads = ThreadPoolExecutor(self.size, initializer=torch.set_num_threads, initargs=(1,))

    def split(self, items: Sequence[Item]) -> list[Sequence[Item]]:
        """As many parts as threads, of about the same length, none of them empty."""
        ends = [len(items) * i // self.size for i in range(self.size + 1)]
        return [items[start:end] for start, end in pairwise(ends) if end > start]

    def map(self, function: Callable[..., Result], *parts: Sequence[object]) -> list[Result]:
        """As `map`, in the threads."""
        return list(self._threads.map(function, *parts))
