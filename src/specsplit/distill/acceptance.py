"""How often the target accepts what the draft proposes, position by position, on prompts that nothing was trained on.

By the reference loop (decoding/loop.py): there is no network in between, so nothing here is a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch

from specsplit.analysis.measures import draft_position
from specsplit.analysis.statistics import rate_ci
from specsplit.decoding.growth import DraftSettings
from specsplit.decoding.loop import NO_DRAFT, Round, speculate
from specsplit.decoding.tree import TokenTree
from specsplit.engines.loading import LanguageModel
from specsplit.models.head_config import default_layers
from specsplit.models.vocabulary import Vocabulary

ROUND_COLUMNS = ("request_id", "category", "round", "drafted", "accepted")
ACCEPTANCE_COLUMNS = (
    *("position", "reached", "accepted"),
    *("acceptance_rate", "acceptance_rate_ci_low", "acceptance_rate_ci_high"),
)


class InTargetTokens:
    """A draft model that reads and writes the target's token ids, for `speculate`.

    vocabulary: one whose tokens have the target's ids, so the whole one or a reduced head.
    target_layers: how many the target has, of which a draft that reads hidden states may not say which it means.
    """

    def __init__(self, model: Any, vocabulary: Vocabulary, target_layers: int = 0) -> None:
        self._model, self._vocabulary = model, vocabulary
        self.vocab_size, self.max_context, self.new_cache = vocabulary.size, model.max_context, model.new_cache
        if hasattr(model, "project"):
            self.layers, self.project = model.layers or default_layers(target_layers), model.project

    def step(
        self, cache: Any, tokens: Sequence[int], tree: TokenTree = NO_DRAFT, cached_nodes: int = 0, **states: Any
    ) -> torch.Tensor:
        return self._vocabulary.outward(self._model.step(cache, tokens, tree, cached_nodes, **states))


def acceptance(rounds: pd.DataFrame, *, confidence: float) -> pd.DataFrame:
    """A row for each position in the draft, from 1: `reached` (rounds that drafted so far and had all earlier tokens
    accepted), `accepted` (of these), `acceptance_rate`, `_ci_low` and `_ci_high` (Wilson by request, `rate_ci`).

    rounds: one row a round, with ROUND_COLUMNS. A position that no round reached is left out.
    """
    found = []
    for position in range(1, int(rounds["drafted"].max() if len(rounds) else 0) + 1):
        reached, kept = draft_position(rounds, position)
        if not reached.any():
            break
        by_request = pd.DataFrame({"id": rounds["request_id"], "reached": reached, "kept": kept}).groupby("id").sum()
        low, high = rate_ci(by_request["kept"], by_request["reached"], confidence=confidence)
        found.append((position, int(reached.sum()), int(kept.sum()), kept.sum() / reached.sum(), low, high))
    return pd.DataFrame(found, columns=list(ACCEPTANCE_COLUMNS))


def measure(
    target: LanguageModel,
    draft: LanguageModel,
    vocabulary: Vocabulary,
    requests: Sequence[tuple[str, str, Sequence[int]]],
    *,
    gamma: int,
    max_tokens: int,
    on_request: Callable[[str, Sequence[Round]], None] = lambda request_id, rounds: None,
) -> pd.DataFrame:
    """One row for every round of every request (id, category, tokens of the prompt), with ROUND_COLUMNS.

    Texts are greedy and have at most `max_tokens` tokens, the end-of-text token included.
    """
    rows = []
    asked = DraftSettings(gamma, stop_token_ids=frozenset(target.eos_token_ids))
    drafts = InTargetTokens(draft, vocabulary, getattr(target, "num_layers", 0))
    for request_id, category, prompt in requests:
        rounds = list(speculate(target, drafts, prompt, asked, max_new_tokens=max_tokens))
        rows += [(request_id, category, number, len(r.tree), r.accepted) for number, r in enumerate(rounds, start=1)]
        on_request(request_id, rounds)
    return pd.DataFrame(rows, columns=list(ROUND_COLUMNS))
