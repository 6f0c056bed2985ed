"""The limits of the workers, and the largest draft within them.

A worker says in `Describe` what it takes at most, and refuses what is more. So nothing larger is asked of it: the draft
gets smaller, which changes no text.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

from specsplit.decoding.sampling import SUPPORT
from specsplit.decoding.tree import TreeShape
from specsplit.rpc.codec import MAX_MESSAGE_BYTES
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import OrchestratorConfig

log = logging.getLogger(__name__)
# Of a message, at most: an integer, a number, and what names and small fields take.
INTEGER, NUMBER, REST = 5, 4, 1024


@dataclass(frozen=True)
class DraftLimits:
    """What a draft of one text may be at most.

    shape: that of the settings, or a narrower one. gamma: its depth. outcomes: to draft ahead for.
    stop_tokens: as many are told to the draft worker, so that it drafts nothing after them. context: longest text.
    states_bytes: of hidden states in a message.
    shortened: what had to be smaller than the settings say, a sentence each.
    """

    shape: TreeShape
    gamma: int
    outcomes: int
    stop_tokens: int
    context: int
    states_bytes: int
    shortened: tuple[str, ...]
    _message_nodes: int

    @classmethod
    def of(cls, config: OrchestratorConfig, target: pb.DescribeReply, draft: pb.DescribeReply | None) -> DraftLimits:
        """Within what both workers say of themselves. A worker that says nothing of a limit has none."""
        workers = [worker for worker in (target, draft) if worker is not None]
        shortened: list[str] = []

        def least(name: str, wanted: int, what: str) -> int:
            """`wanted`, or what the worker with the lowest limit of that name takes."""
            for worker in workers:
                limit: int = getattr(worker.limits, name) or wanted
                if limit < wanted:
                    wanted = limit
                    shortened.append(f"the {worker.role} worker takes {limit} {what} at most")
            return wanted

        bytes_left = least("message_bytes", MAX_MESSAGE_BYTES, "bytes a message")
        context = min(config.max_context or target.max_context, target.max_context, bytes_left // (4 * INTEGER))
        distribution = SUPPORT * (INTEGER + NUMBER) if config.sampling == "rejection" and config.temperature else 0
        message_nodes = max(bytes_left - REST - INTEGER * context, 0) // (distribution + 4 * INTEGER + NUMBER)
        shape, gamma = config.shape, config.gamma_limit
        gamma = least("draft_tokens", gamma, "tokens a draft")
        widest = max(shape.branching, default=1)
        children = least("children", widest, "branches of a node")
        width = least("tree_width", shape.width, "nodes of a tree in a pass") if shape.nodes else shape.width
        whole = min(shape.size(gamma), message_nodes)
        if whole < shape.size(gamma):
            shortened.append(f"trees of {whole} nodes at most fit into a message")
        nodes = least("tree_nodes", whole, "nodes a tree")
        shape = shape.within(nodes, children=children, width=width)
        while gamma > 0 and shape.size(gamma) > nodes:
            gamma -= 1
        outcomes = config.fan_out
        if config.mode == "lookahead":
            outcomes = least("fan_out", config.fan_out, "outcomes to draft ahead for")
        stop_tokens = min(worker.limits.stop_tokens or 1 << 31 for worker in workers)
        if (shape, gamma) != (config.shape, config.gamma_limit):
            asked = f"gamma {config.gamma}, tree {config.tree}"
            shortened.append(f"drafts have {gamma} tokens at most, as tree {shape}, instead of {asked}")
        said = tuple(shortened) if draft is not None else ()
        states_bytes = bytes_left - REST - INTEGER * context
        return cls(shape, gamma, outcomes, stop_tokens, context, states_bytes, said, message_nodes)

    def fan_out(self, gamma: int) -> int:
        """Outcomes whose drafts of this depth fit into one message."""
        path = 3 + self.gamma // 4  # the accepted tokens of an outcome, in nodes of a message
        return min(self.outcomes, self._message_nodes // (self.shape.size(gamma) + path))

    def say(self) -> None:
        """Warn of what is smaller than the settings say; once a process."""
        if self.shortened:
            _warn("; ".join(self.shortened))


@cache
def _warn(message: str) -> None:
    log.warning("%s", message)
