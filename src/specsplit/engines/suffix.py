"""A draft that learns while it serves: what followed the last tokens in this text and in those written before.

SuffixDecoding (Oliaro et al. 2024, arXiv 2411.04975; `suffix` in vLLM): the longest suffix of the text that occurred
before, in the session's own text or in any other, says by its counts what comes next. A tree of shape `dynamic` grows
by the product of these shares, as the paper's does. Where no suffix is found another model may be asked (hybrid).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from specsplit.engines.ngram import NGramLM, texts_of_rows, write_counts
from specsplit.engines.passes import MakesTogether, Pass, all_or_none
from specsplit.engines.text_memory import NOWHERE, TextMemory
from specsplit.engines.token_cache import TokenCache, tokens_of_pass

SOURCES = ("", "none", "session", "global", "model")
NONE, SESSION, GLOBAL, MODEL = 1, 2, 3, 4
TOKEN_BITS = 32
LIKELY = 0.5  # Where there is a model, a share of the most frequent token below this is left to it.
MOST_BEHIND = 16  # tokens that the model has not read, before it reads them without being asked


class SuffixCache(TokenCache):
    """The tokens of a session and, in the high bits of each slot, where the candidates after it come from.

    model: the cache of the other model; it holds what the first of our slots hold, and may lag behind.
    space: the texts that it learns from and teaches. prompt: tokens that are not the model's; None: the first pass's.
    """

    def __init__(self, capacity: int, model: Any) -> None:
        super().__init__(capacity)
        self.model = model
        self.space = 0
        self.prompt: int | None = None
        self.learnt, self.place = 0, NOWHERE  # tokens in the memory, or before the answer; place of the last one

    def learn_in(self, memory: str, prompt: int) -> None:
        """Name the memory, and say how many tokens of the text are its prompt; 0: those of the first pass."""
        self.space = int.from_bytes(blake2b(memory.encode(), digest_size=7).digest(), "big")
        self.prompt = prompt or self.prompt

    def source_after(self, length: int) -> str:
        """One of SOURCES."""
        return SOURCES[self.slots[length - 1] >> TOKEN_BITS] if length else ""

    def rollback(self, length: int) -> None:
        """As TokenCache.rollback."""
        super().rollback(length)
        if self.model is not None and self.model.length > length:
            self.model.rollback(length)
        if length < self.learnt:
            self.learnt, self.place = length, NOWHERE

    def keep(self, context: int, path: Sequence[int]) -> None:
        """As TokenCache.keep."""
        super().keep(context, path)
        if self.model is not None and self.model.length > context:
            nodes = self.model.length - context
            self.model.keep(context, [node for node in path if node < nodes])

    def clean(self) -> None:
        """As Slots.clean."""
        if self.model is not None:
            self.model.clean()

    def nbytes(self) -> int:
        """Bytes reserved by this cache."""
        return super().nbytes() + (self.model.nbytes() if self.model is not None else 0)


class SuffixLM(MakesTogether, NGramLM):
    """The tokens that followed the longest suffix, of `max_match` down to `min_match` tokens, in this text or others.

    memory_tokens: of other texts, the newest are kept. model: asked where nothing was found, or nothing likely; reads
    every token of this vocabulary. outward: its logits [rows, its own] -> [rows, vocab_size].
    Answers only are learnt, with the end of their prompt, and as they are written.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        max_match: int = 24,
        min_match: int = 2,
        memory_tokens: int = 1 << 18,
        model: Any = None,
        outward: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits,
    ) -> None:
        super().__init__(vocab_size, max_ngram=max_match, min_ngram=min_match)
        self.memory = TextMemory(memory_tokens, shortest=min_match, longest=max_match)
        self.model = model
        self.outward = outward
        if model is not None:
            self.device, self.parameters, self.max_context = model.device, model.parameters, model.max_context
            self.batch_tokens, self.prefill_tokens = model.batch_tokens, model.prefill_tokens
            self.uses_torch_threads = model.uses_torch_threads

    def cache_bytes(self, capacity: int, taps: int = 0) -> int:
        return super().cache_bytes(capacity) + (self.model.cache_bytes(capacity) if self.model is not None else 0)

    def new_cache(self, capacity: int) -> SuffixCache:
        """An empty cache for one sequence of at most `capacity` tokens, tree nodes included."""
        return SuffixCache(capacity, self.model.new_cache(capacity) if self.model is not None else None)

    def step_many(self, passes: Sequence[Pass]) -> list[torch.Tensor]:
        """As CausalLM.step_many."""
        with all_or_none(p.cache for p in passes):
            fed = [tokens_of_pass(p.cache, p.tokens, p.tree, p.cached_nodes) for p in passes]
            found = [self._look_up(p) for p in passes]
            if self.model is not None:
                self._ask_model(passes, found)
            for p, ids, (_, sources) in zip(passes, fed, found, strict=True):
                unknown = [0] * (len(ids) - len(sources))
                p.cache.write([t | s << TOKEN_BITS for t, s in zip(ids, [*unknown, *sources], strict=True)])
                p.cache.advance(len(ids))
        for p in passes:
            self._learn(p.cache, p.cache.length - len(p.tree))
        return [logits for logits, _ in found]

    def _look_up(self, p: Pass) -> tuple[torch.Tensor, list[int]]:
        """The logits of a pass as far as they are found, and their sources."""
        logits = torch.full((bool(p.tokens) + len(p.tree) - p.cached_nodes, self.vocab_size), -torch.inf)
        texts = texts_of_rows(p.cache, p.tokens, p.tree, p.cached_nodes)
        return logits, [self._found(row, text, p.cache.space) for row, text in zip(logits, texts, strict=True)]

    def _found(self, row: torch.Tensor, text: NDArray[np.int64], space: int) -> int:
        """Write the logits after `text`; returns where they come from. The longer suffix counts, of equal ones that
        whose most frequent token is the surer."""
        own_length, own = self._followers(text)
        length, others = self.memory.followers(space, text[-self.max_ngram :].tolist())
        options = [
            (own_length, _surety(own), SESSION, own),
            (length, _surety(np.array(others)), GLOBAL, np.array(others, np.int64)),
        ]
        _, surety, source, followers = max(options, key=lambda option: option[:2])
        if not len(followers) or (self.model is not None and surety < LIKELY):
            return NONE
        write_counts(row, followers)
        return source

    def _ask_model(self, passes: Sequence[Pass], found: Sequence[tuple[torch.Tensor, list[int]]]) -> None:
        """Fill the rows that were not found from one pass of the model, which first reads what it lacks."""
        asked = [
            (p, logits, sources, _catching_up(p))
            for p, (logits, sources) in zip(passes, found, strict=True)
            if NONE in sources or p.cache.length + p.size - p.cache.model.length > MOST_BEHIND
        ]
        answers = self.model.step_many([own for *_, own in asked]) if asked else []
        for (p, logits, sources, own), answer in zip(asked, answers, strict=True):
            rows = [row for row, source in enumerate(sources) if source == NONE]
            # Both begin with a row for the last token, if there are tokens; then come the nodes.
            shift = p.cached_nodes - own.cached_nodes + bool(own.tokens) - bool(p.tokens)
            known = self.outward(answer[[row + shift for row in rows]])[:, : self.vocab_size]
            logits[rows, : known.shape[1]] = known.float().cpu()
            for row in rows:
                sources[row] = MODEL

    def _learn(self, cache: SuffixCache, confirmed: int) -> None:
        """Put what is new of the first `confirmed` tokens into the memory; these are no draft."""
        if cache.prompt is None:
            cache.prompt = confirmed
        for i in range(max(cache.learnt, cache.prompt - self.max_ngram), confirmed):
            cache.place = self.memory.append(cache.space, cache.slots[i] & ((1 << TOKEN_BITS) - 1), cache.place)
        cache.learnt = max(cache.learnt, confirmed)


def _surety(followers: NDArray[np.int64]) -> float:
    """The share of the most frequent one, as if another one had been seen once."""
    return int(np.unique(followers, return_counts=True)[1].max()) / (len(followers) + 1) if len(followers) else 0.0


def _catching_up(p: Pass) -> Pass:
    """The pass of the model that makes its cache hold what ours will hold after `p`."""
    cache, context = p.cache, p.cache.length - p.cached_nodes
    held = cache.model.length
    if held >= context + len(p.tokens):
        return Pass(cache.model, (), p.tree, held - context)
    unread = [slot & ((1 << TOKEN_BITS) - 1) for slot in cache.slots[held:context]]
    return Pass(cache.model, [*unread, *p.tokens], p.tree)
