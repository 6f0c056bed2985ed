"""The texts written before, in bounded memory: what followed the longest suffix of a text in them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

NOWHERE = -1
MOST_LOOKED_AT = 64  # occurrences of the shortest suffix, the newest; more would take longer than a small model


class TextMemory:
    """The last `capacity` tokens of all texts that were appended, which may grow side by side.

    It answers what a suffix tree of these texts would (SuffixDecoding, Oliaro et al. 2024), in fixed memory: a ring of
    tokens, each linked to the one before and after it in its text and to the last occurrence of the `shortest` tokens
    that end with it, as in the window of a compressor. A new token takes the place of the oldest one. A place is the
    number of a token, which is never used again, so that a link to a token that is gone is known by its number.

    space: texts of another space are not seen. Not for several threads at once.
    """

    def __init__(self, capacity: int, *, shortest: int, longest: int) -> None:
        self.capacity, self.shortest, self.longest = capacity, shortest, longest
        self.written = 0  # tokens so far; the next place
        self._tokens, self._spaces, self._keys = array("q"), array("q"), array("q")
        self._before, self._after, self._same = array("q"), array("q"), array("q")
        self._newest: dict[int, int] = {}  # by key: the last place where such a run of tokens ends

    def __len__(self) -> int:
        return len(self._tokens)

    def append(self, space: int, token: int, before: int) -> int:
        """The place of `token`, which follows the token at the place `before`, or NOWHERE."""
        place, slot = self.written, self.written % self.capacity
        before = before if self._holds(before) and before > place - self.capacity else NOWHERE
        if place < self.capacity:
            for column in (self._tokens, self._spaces, self._keys, self._before, self._after, self._same):
                column.append(NOWHERE)
        elif self._newest.get(self._keys[slot]) == place - self.capacity:
            del self._newest[self._keys[slot]]
        self._tokens[slot], self._spaces[slot] = token, space
        self._before[slot], self._after[slot] = before, NOWHERE
        self.written += 1
        if before != NOWHERE:
            self._after[before % self.capacity] = place
        run = self._run_ending_at(place)
        key = hash((space, *run)) if len(run) == self.shortest else NOWHERE  # which no hash is
        self._keys[slot], self._same[slot] = key, self._newest.get(key, NOWHERE)
        if key != NOWHERE:
            self._newest[key] = place
        return place

    def followers(self, space: int, text: Sequence[int]) -> tuple[int, list[int]]:
        """The length of the longest suffix of `text` that occurs, `shortest` to `longest`, and what followed it, newest
        first; 0 and nothing when none occurs."""
        longest, found = 0, list[int]()
        if len(text) < self.shortest:
            return longest, found
        place = self._newest.get(hash((space, *text[len(text) - self.shortest :])), NOWHERE)
        for _ in range(MOST_LOOKED_AT):
            if not self._holds(place):
                break
            slot = place % self.capacity
            after = self._after[slot]
            if after != NOWHERE and self._spaces[slot] == space:
                length = self._match(place, text)
                if length > longest and length >= self.shortest:
                    longest, found = length, []
                if length == longest and length:
                    found.append(self._tokens[after % self.capacity])
            place = self._same[slot]
        return longest, found

    def _holds(self, place: int) -> bool:
        return place > NOWHERE and place >= self.written - self.capacity

    def _run_ending_at(self, place: int) -> list[int]:
        """The `shortest` tokens up to a place, or fewer."""
        run: list[int] = []
        while self._holds(place) and len(run) < self.shortest:
            run.append(self._tokens[place % self.capacity])
            place = self._before[place % self.capacity]
        return run[::-1]

    def _match(self, place: int, text: Sequence[int]) -> int:
        """How many tokens up to a place are the last ones of `text`."""
        length, most = 0, min(self.longest, len(text))
        while length < most and self._holds(place) and self._tokens[place % self.capacity] == text[-1 - length]:
            length, place = length + 1, self._before[place % self.capacity]
        return length
