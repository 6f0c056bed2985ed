"""The requests of a round, made from the text and the configuration."""

from __future__ import annotations

from typing import Any

from specsplit.client.text import Text
from specsplit.decoding.tree import TokenTree, TreeShape
from specsplit.rpc.codec import sampling_to_message, tree_to_message
from specsplit.rpc.v1 import specsplit_pb2 as pb


def draft_fields(text: Text, gamma: int, shape: TreeShape, ahead: pb.Ahead | None = None) -> dict[str, Any]:
    """Every field of GenerateDraftsRequest but `context`."""
    depth = max(gamma, ahead.max_draft_tokens) if ahead is not None else gamma
    forced = text.forced(gamma + 1 + ahead.max_draft_tokens if ahead else gamma)
    return {
        "max_draft_tokens": gamma,
        "branching": shape.branching[:depth],
        "tree_nodes": shape.nodes,
        "tree_width": shape.width if shape.nodes else 0,
        "stop_token_ids": text.known_stop_ids,
        "sampling": sampling_to_message(text.sampling),
        "vocab_size": text.vocab_size,
        "length_limit": text.length_limit,
        "ahead": ahead,
        "memory": text.config.memory,
        "prompt_tokens": text.prompt_length,
        "forced": pb.Forced(tokens=forced.tokens, right=forced.right) if forced.tokens else None,
    }


def verify_fields(text: Text, tree: TokenTree) -> dict[str, Any]:
    """Every field of VerifyDraftsRequest but `context`."""
    return {"tree": tree_to_message(tree), "sampling": sampling_to_message(text.sampling)}
