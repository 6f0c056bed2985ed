"""Hidden states of the target in its worker, which sends them, and in the draft worker, which collects them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from specsplit.engines.state_slots import MOST_TAPS
from specsplit.models.head_config import default_layers
from specsplit.rpc.hidden_states import FORMS, StatesError, check_states, pack_states, row_bytes, unpack_states
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.worker.refusals import InvalidRequest, LimitReached

if TYPE_CHECKING:
    from specsplit.engines.gpu_head import GpuHead
    from specsplit.engines.hidden_states import HiddenStatesHead
    from specsplit.engines.numba_head import FusedHead
    from specsplit.engines.projection import Projection

    Head = HiddenStatesHead | FusedHead | GpuHead

log = logging.getLogger(__name__)
MOST_PARTS = 32  # messages that the states of one reply are sent in: all of them may wait to be read


def row_size(head: Head, *, projected: bool) -> int:
    """Numbers of a position that a head is sent."""
    return head.state_size if projected else head.hidden_size * len(head.layers or default_layers(0))


@dataclass(frozen=True)
class Wanted:
    """The states that a request asks a target worker for, checked. layers: whose inputs."""

    first: int
    layers: tuple[int, ...]
    form: str
    projection: Projection | None
    message_bytes: int

    @classmethod
    def of(cls, message: pb.WantedStates, num_layers: int, projection: Projection | None, context: int) -> Wanted:
        """context: tokens of the request's context. Raises InvalidRequest."""
        layers = tuple(message.layers) or default_layers(num_layers)
        if len(layers) > MOST_TAPS or not all(0 <= layer < num_layers for layer in layers):
            raise InvalidRequest(
                f"wanted_states: layers {list(layers)[:8]} are not at most {MOST_TAPS} of 0 to {num_layers - 1}"
            )
        if message.form not in FORMS:
            raise InvalidRequest(f"wanted_states: form {message.form[:20]!r} is none of {', '.join(FORMS)}")
        if message.first >= context:
            raise InvalidRequest(f"wanted_states: position {message.first} is not in a context of {context} tokens")
        if message.projected and (projection is None or (projection.layers or default_layers(num_layers)) != layers):
            raise InvalidRequest(
                "wanted_states: this worker has no fc of that draft (start it with --hidden-states-draft FOLDER)"
            )
        return cls(
            message.first, layers, message.form, projection if message.projected else None, message.message_bytes
        )

    def packed(self, states: torch.Tensor, *, parts: bool) -> list[pb.HiddenStates]:
        """The messages with states[first:], where `states` has a row for each position of the text so far.

        parts: whether there may be several. Raises LimitReached for what does not fit into them.
        """
        rows = states[self.first :]
        if self.projection is not None:
            rows = self.projection.project(rows)
        row, most = row_bytes(self.form, rows.shape[1]), (MOST_PARTS if parts else 1)
        each = self.message_bytes // row if self.message_bytes else len(rows)
        if len(rows) > each * most:
            raise LimitReached(
                f"the hidden states of {len(rows)} positions take {len(rows) * row} bytes, and those of {each * most} "
                f"fit into {most} messages of {self.message_bytes}: set hidden_states_window, or have them projected "
                "by the target or sent as int8"
            )
        projected, each = self.projection is not None, max(each, 1)
        return [
            pack_states(rows[at : at + each], self.first + at, self.form, projected=projected)
            for at in range(0, max(len(rows), 1), each)
        ]


class ReceivedStates:
    """The states of one text that a draft worker has, projected: a row for each position from `first` to `end` - 1.

    true_length: entries of the draft's cache that were made from them; those after it have the draft's own outputs.
    """

    def __init__(self, first: int, capacity: int, width: int) -> None:
        self.first = self.end = first
        self.true_length = 0
        self._rows = torch.empty(capacity, width)

    def add(self, first: int, rows: torch.Tensor) -> None:
        """Take rows [n, width] of the positions from `first` on, as far as they are new, follow what is here and are
        finite. What is left out is missing from then on, so drafts end there."""
        at, rows = self.end - self.first, rows[max(self.end - first, 0) :]
        if first > self.end:
            log.warning("hidden states begin at position %d, and those before end at %d", first, self.end)
            return
        bad = (~rows.isfinite().all(1)).nonzero()
        if len(bad):
            log.warning("hidden states of position %d are not finite: drafts end there", self.end + int(bad[0]))
            rows = rows[: int(bad[0])]
        rows = rows[: len(self._rows) - at]
        self._rows[at : at + len(rows)] = rows
        self.end += len(rows)

    def covers(self, context: int) -> bool:
        """Whether a text of so many tokens can be read: the first token has no state, the last one's is not needed."""
        return self.first < context - 1 <= self.end

    def of_entries(self, start: int, stop: int) -> torch.Tensor:
        """The states that entries of the draft's cache are made from."""
        return self._rows[start:stop]


def checked_states(messages: Iterable[pb.HiddenStates], head: Head, limit: int) -> list[pb.HiddenStates]:
    """The messages, if they are of states that the head reads, of at most `limit` positions. Raises InvalidRequest."""
    messages = list(messages)
    try:
        for message in messages:
            if message.first + message.count > limit:
                raise StatesError(f"positions {message.first} + {message.count} are beyond a text of {limit} tokens")
            check_states(message, row_size(head, projected=message.projected))
    except StatesError as error:
        raise InvalidRequest(f"states: {error}") from error
    return messages


def collect(
    held: ReceivedStates | None, messages: Iterable[pb.HiddenStates], head: Head, capacity: int
) -> ReceivedStates | None:
    """What a session has after these messages, which were checked; None as long as nothing came."""
    for message in messages:
        held = held or ReceivedStates(message.first, capacity, head.state_size)
        rows = unpack_states(message, row_size(head, projected=message.projected))
        held.add(message.first, rows if message.projected else head.project(rows).cpu())
    return held
