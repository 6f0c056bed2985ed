"""Attention mask and position ids of a pass that holds context tokens and a tree of drafted tokens.

A pass feeds `linear` tokens that continue the context, then the tree's nodes from index `cached_nodes` on. In the
cache, the context comes first and the first `cached_nodes` nodes right after it. A node sees the whole context, its
ancestors and itself (SpecInfer, Miao et al. 2024).
"""

from __future__ import annotations

import torch

from specsplit.decoding.tree import ROOT, TokenTree


def positions(context: int, linear: int, tree: TokenTree, cached_nodes: int = 0) -> list[int]:
    """Position id of every token fed: `linear` context tokens, then the nodes from `cached_nodes` on.

    context: tokens of the context already in the cache (cached nodes not counted).
    """
    last = context + linear - 1
    return [*range(context, context + linear), *(last + depth for depth in tree.depths()[cached_nodes:])]


def visible(
    context: int, linear: int, tree: TokenTree, cached_nodes: int = 0, window: int | None = None
) -> torch.Tensor:
    """Boolean mask [fed, context + linear + nodes], True where the row's token may attend to the column's.

    window: sliding attention window in positions (a token sees itself and the window - 1 positions before it).
    """
    n = len(tree)
    if linear and cached_nodes:
        raise ValueError("context tokens cannot follow tree nodes that are in the cache")
    keys = context + linear + n
    mask = torch.zeros(linear + n - cached_nodes, keys, dtype=torch.bool)
    if linear:
        mask[:linear, : context + linear] = torch.ones(linear, context + linear, dtype=torch.bool).tril(context)
    if n > cached_nodes:
        ancestry = torch.zeros(n, n, dtype=torch.bool)
        for i, parent in enumerate(tree.parents):
            if parent != ROOT:
                ancestry[i] = ancestry[parent]
            ancestry[i, i] = True
        mask[linear:, : context + linear] = True
        mask[linear:, context + linear :] = ancestry[cached_nodes:]
    if window is not None:
        last = context + linear - 1
        key_positions = torch.tensor([*range(context + linear), *(last + d for d in tree.depths())])
        query_positions = torch.tensor(positions(context, linear, tree, cached_nodes))
        mask &= query_positions[:, None] - key_positions[None, :] < window
    return mask


def additive(mask: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The mask as [1, 1, queries, keys] of 0 and the type's lowest number, for eager and sdpa attention alike."""
    floats = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    return floats[None, None].to(device)
