"""How often the target accepts what the draft proposes, position by position, on prompts that nothing was trained on.

Drafts and verdicts come from the code that the workers run (worker/draft.py, worker/target.py); there
is no network in between, so nothing here is a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from specsplit.analysis.statistics import bootstrap_ratio_ci
from specsplit.decoding.sampling import GREEDY
from specsplit.engines.loading import LanguageModel
from specsplit.models.vocabulary import Vocabulary
from specsplit.worker.draft import Drafter, DraftSettings
from specsplit.worker.sessions import Session
from specsplit.worker.target import verify_tree

ROUND_COLUMNS = ("request_id", "category", "round", "drafted", "accepted")
ACCEPTANCE_COLUMNS = (
    *("position", "reached", "accepted"),
    *("acceptance_rate", "acceptance_rate_ci_low", "acceptance_rate_ci_high"),
)


@dataclass(frozen=True)
class Round:
    """One draft and its verdict."""

    drafted: int
    accepted: int


def speculate(
    target: LanguageModel,
    draft: LanguageModel,
    vocabulary: Vocabulary,
    prompt: Sequence[int],
    *,
    gamma: int,
    max_tokens: int,
) -> tuple[list[int], list[Round]]:
    """A greedy text of at most `max_tokens` tokens by drafts of `gamma` tokens, and its rounds.

    The text ends with an end-of-text token, which is included, at the latest; it is the target's own, whatever the
    draft. A draft is never longer than what may still be written, less the token that the target adds itself.
    """
    limit = min(len(prompt) + max_tokens, target.max_context)
    room = limit + gamma + 1
    sessions = Session(target.new_cache(room)), Session(draft.new_cache(min(room, draft.max_context)))
    stop = frozenset(target.eos_token_ids)
    settings = DraftSettings(gamma, stop_token_ids=stop, vocab_size=target.vocab_size, length_limit=limit)
    text, held = list(prompt), 0
    rounds: list[Round] = []
    while len(text) < limit:
        tree = Drafter(draft, vocabulary, sessions[1], text, settings).draft()
        verdict = verify_tree(target, sessions[0], text, held, tree, GREEDY)
        accepted = [tree.token_ids[node] for node in verdict.path]
        rounds.append(Round(len(tree), len(accepted)))
        held = len(text) + len(accepted)
        new = [*accepted, verdict.next_token]
        ended = next((i for i, token in enumerate(new) if token in stop), None)
        text += new if ended is None else new[: ended + 1]
        if ended is not None:
            break
    return text[len(prompt) :], rounds


def acceptance(rounds: pd.DataFrame, *, confidence: float, bootstrap_samples: int, seed: int) -> pd.DataFrame:
    """A row for each position in the draft, from 1: `reached` (rounds that drafted so far and had all earlier tokens
    accepted), `accepted` (of these), `acceptance_rate`, `_ci_low` and `_ci_high` (bootstrap over requests).

    rounds: one row a round, with ROUND_COLUMNS. A position that no round reached is left out.
    """
    found = []
    for position in range(1, int(rounds["drafted"].max() if len(rounds) else 0) + 1):
        reached = (rounds["drafted"] >= position) & (rounds["accepted"] >= position - 1)
        kept = reached & (rounds["accepted"] >= position)
        if not reached.any():
            break
        by_request = pd.DataFrame({"id": rounds["request_id"], "reached": reached, "kept": kept}).groupby("id").sum()
        low, high = bootstrap_ratio_ci(
            by_request["kept"], by_request["reached"], confidence=confidence, samples=bootstrap_samples, seed=seed
        )
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
    """One row for every round of every request (id, category, tokens of the prompt), with ROUND_COLUMNS."""
    rows = []
    for request_id, category, prompt in requests:
        _, rounds = speculate(target, draft, vocabulary, prompt, gamma=gamma, max_tokens=max_tokens)
        rows += [(request_id, category, number, r.drafted, r.accepted) for number, r in enumerate(rounds, start=1)]
        on_request(request_id, rounds)
    return pd.DataFrame(rows, columns=list(ROUND_COLUMNS))
