"""Which decoder layers a model can draft without: self-speculative decoding (Zhang et al. 2024, "Draft & Verify").

They search with Bayesian optimisation; a greedy forward search needs no tuning, is the same every time, and gives the
best set for every number of layers up to the wanted one on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from specsplit.engines.transformers import CausalLM, without_layers
from specsplit.errors import UserError


@dataclass(frozen=True)
class Step:
    """One more layer left out.

    layer: which one. agreement: share of positions at which the most likely token is still the full model's.
    kl: mean Kullback-Leibler divergence from the full model, nats. skipped: all layers left out so far, sorted.
    """

    layer: int
    agreement: float
    kl: float
    skipped: list[int]


@dataclass(frozen=True)
class Text:
    """A prompt with the full model's greedy continuation. log_probs: [len(continuation), vocab_size], the full model's
    for every token of it; top: [len(continuation)], their most likely tokens."""

    tokens: list[int]
    log_probs: torch.Tensor
    top: torch.Tensor


def search_layers(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    count: int,
    max_tokens: int = 64,
    on_candidate: Callable[[int, int], None] = lambda done, total: None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> list[Step]:
    """Leave out `count` layers one by one, each time the one without which the model changes least.

    A candidate is measured on the greedy continuations (at most `max_tokens` each) of `prompts`, teacher-forced: one
    pass a prompt. More agreement wins, then less divergence, then the lower number. The log-probabilities of all
    continuations are held in memory: 4 bytes x tokens x vocabulary.

    The first and the last layer always stay: they can hardly ever be left out. on_candidate(done, total): after every
    candidate. The model is unchanged afterwards. Raises UserError when there are not that many layers.
    """
    candidates = list(range(1, model.num_layers - 1))
    if not 1 <= count <= len(candidates):
        raise UserError(
            f"cannot leave out {count} of {model.num_layers} layers: the first and the last stay, "
            f"1 to {len(candidates)} can go"
        )
    total = sum(len(candidates) - taken for taken in range(count))
    texts = [_continue(model, prompt, max_tokens) for prompt in prompts]
    steps: list[Step] = []
    skipped: list[int] = []
    done = 0
    while len(steps) < count:
        tried: list[tuple[float, float, int]] = []
        for layer in candidates:
            agreement, kl = _compare(model, [*skipped, layer], texts)
            tried.append((-agreement, kl, layer))
            done += 1
            on_candidate(done, total)
        tried.sort()
        loss, kl, best = tried[0]
        skipped.append(best)
        steps.append(Step(best, -loss, kl, sorted(skipped)))
        on_step(steps[-1])
        candidates.remove(best)
    return steps


@torch.inference_mode()
def _continue(model: CausalLM, prompt: Sequence[int], max_tokens: int) -> Text:
    """The greedy continuation of a prompt, at least one token; it ends with an end-of-text token at the latest."""
    max_tokens = min(max_tokens, model.max_context - len(prompt))
    if max_tokens < 1:
        raise UserError(f"a prompt of {len(prompt)} tokens leaves no room in a context of {model.max_context}")
    cache = model.new_cache(len(prompt) + max_tokens)
    tokens = list(prompt)
    rows = []
    feed: Sequence[int] = prompt
    for _ in range(max_tokens):
        rows.append(model.step(cache, feed)[-1].float().log_softmax(-1))
        token = int(rows[-1].argmax())
        tokens.append(token)
        feed = [token]
        if token in model.eos_token_ids:
            break
    log_probs = torch.stack(rows)
    return Text(tokens, log_probs, log_probs.argmax(-1))


@torch.inference_mode()
def _compare(model: CausalLM, skipped: Sequence[int], texts: Sequence[Text]) -> tuple[float, float]:
    """Agreement and mean divergence of the model without `skipped` from the full one."""
    same, divergence, positions = 0, 0.0, 0
    with without_layers(model.model, skipped):
        for text in texts:
            ids = torch.tensor([text.tokens[:-1]], device=model.device)
            output = model.model(input_ids=ids, use_cache=False, logits_to_keep=len(text.top))
            log_probs = output.logits[0].float().log_softmax(-1)
            same += int((log_probs.argmax(-1) == text.top).sum())
            # Not from infinite logits: 0 x inf is no number.
            terms = text.log_probs.exp() * (text.log_probs - log_probs)
            divergence += float(terms.double().nan_to_num(0.0).sum())
            positions += len(text.top)
    return same / positions, divergence / positions
