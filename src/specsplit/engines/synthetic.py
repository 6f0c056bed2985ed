"""A simulated model: chosen time of a pass, chosen agreement between draft and target, no weights.

It stands where a CausalLM stands in a worker, so that everything around the model (protocol, sessions, caches,
pipeline modes, the workflow) can be tested and measured without one, and so that a planned pair of models can be tried
out by their figures alone.

What it means. The text is a deterministic function of the prompt and the seed: each token is a hash of *all* tokens
before it, one 64-bit state a cache slot, so a wrong cache writes a wrong text. A draft with the target's seed ranks the
tokens so that the target's own has rank r with probability alpha (1 - alpha)^(r - 1), independently from context to
context: the i.i.d. acceptance of Leviathan et al. 2023, extended to lower ranks, which trees and lookahead use. Real
models agree in streaks; this one does not. The draft is calibrated: it gives its candidate of rank r that probability.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from specsplit.decoding.tree import ROOT, TokenTree
from specsplit.engines.passes import MakesTogether, Pass, all_or_none
from specsplit.engines.token_cache import MAX_CONTEXT, TokenCache, WeightlessLM, tokens_of_pass

PRINTABLE = range(32, 127)  # the text is made of these bytes, for it is shown on terminals
CERTAIN = 1 - 1e-6  # what a model that is always right gives its first candidate: logits stay finite
SLEEP_LATE_S = 300e-6  # by so much time.sleep may wake up late, the more the longer it slept
SPIN_S = 100e-6  # even a sleep of nothing takes this long
MASK = (1 << 64) - 1


class SyntheticLM(MakesTogether, WeightlessLM):
    """A model whose passes take step_ms + token_ms for each token fed, its own computing included.

    acceptance: alpha, the probability that its first candidate is the text's next token, in (0, 1]. 1 is the target.
    seed: the text; draft and target must have the same.
    vocab_size: at least 256; token ids below 256 are bytes.
    """

    batch_tokens = MAX_CONTEXT

    def __init__(
        self,
        *,
        step_ms: float = 0.0,
        token_ms: float = 0.0,
        acceptance: float = 1.0,
        seed: int = 0,
        vocab_size: int = 256,
    ) -> None:
        super().__init__(vocab_size)
        self.step_ms = step_ms
        self.token_ms = token_ms
        self._start = _mix(seed)
        alpha = min(acceptance, CERTAIN)
        # Divides the logarithm of a uniform number into a rank; -inf gives rank 0 always.
        self._log_miss = math.log1p(-acceptance) if acceptance < 1 else -math.inf
        ranks = torch.arange(vocab_size, dtype=torch.float64)
        by_rank = (math.log(alpha) + ranks * math.log1p(-alpha)).float()
        # Row i of this view has rank 0 at token -i modulo vocab_size, rank 1 at the token after it, and so on.
        self._rows = by_rank.repeat(2).unfold(0, vocab_size, 1)

    def step_many(self, passes: Sequence[Pass]) -> list[torch.Tensor]:
        """The passes of several sessions as one, which takes step_ms once; the logits of each."""
        started = time.perf_counter()
        with all_or_none(p.cache for p in passes):
            logits = [self._logits(p.cache, p.tokens, p.tree, p.cached_nodes) for p in passes]
            _wait_until(started + (self.step_ms + self.token_ms * sum(p.size for p in passes)) / 1e3)
        return logits

    def _logits(self, cache: TokenCache, tokens: Sequence[int], tree: TokenTree, cached_nodes: int) -> torch.Tensor:
        new_tokens = tokens_of_pass(cache, tokens, tree, cached_nodes)
        context = cache.length - cached_nodes
        state = cache.slots[context - 1] if context else self._start
        states = []
        for token in tokens:
            state = _mix(state ^ token)
            states.append(state)
        nodes = cache.slots[context : cache.length].tolist()
        for i in range(cached_nodes, len(tree)):
            parent = tree.parents[i]
            nodes.append(_mix((state if parent == ROOT else nodes[parent]) ^ tree.token_ids[i]))
        rows = [*states[-1:], *nodes[cached_nodes:]]
        logits = self._rows[[self.vocab_size - self._first(row) for row in rows]]
        cache.write([*states, *nodes[cached_nodes:]])
        cache.advance(len(new_tokens))
        return logits

    def _first(self, state: int) -> int:
        """The likeliest token after the text of this state: the text's next token moved down by its rank here."""
        text = PRINTABLE[(state & 0xFFFFFFFF) * len(PRINTABLE) >> 32]
        uniform = (state >> 32) / (1 << 32)
        rank = min(int(math.log1p(-uniform) / self._log_miss), self.vocab_size - 1)
        return (text - rank) % self.vocab_size


def _mix(x: int) -> int:
    """SplitMix64 (Steele et al. 2014): 64 bits in, 64 well-mixed bits out, one to one."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def _wait_until(deadline: float) -> None:
    """Sleep for the most, then wait in a way that lets other threads run, and spin at the very end."""
    while (left := deadline - time.perf_counter()) > 0:
        if left > SPIN_S:
            time.sleep(max(0.0, left - SLEEP_LATE_S))
