"""The loop on one page (decoding/loop.py) writes what the target alone writes, and the streams write what it writes."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specsplit.api.in_process import InProcessStub
from specsplit.client.event_loop import event_loop
from specsplit.client.pipeline import run_speculative_loop_async
from specsplit.client.result import SpeculativeResult
from specsplit.decoding.growth import DraftSettings
from specsplit.decoding.loop import NO_DRAFT, Round, speculate
from specsplit.decoding.sampling import GREEDY, Sampling, choose
from specsplit.decoding.tree import TokenTree, TreeShape
from specsplit.engines.cuda_graphs import GraphLM
from specsplit.engines.gpu import GpuLM
from specsplit.engines.gpu_head import GpuHead
from specsplit.engines.hidden_states import HiddenStatesHead
from specsplit.engines.ngram import NGramLM
from specsplit.engines.numba import FusedLM
from specsplit.engines.numba_head import FusedHead
from specsplit.engines.suffix import SuffixLM
from specsplit.engines.synthetic import SyntheticLM
from specsplit.engines.transformers import CausalLM
from specsplit.settings.run import OrchestratorConfig
from specsplit.settings.worker import DraftWorkerConfig, TargetWorkerConfig
from specsplit.worker.batching import SharedModel
from specsplit.worker.draft_service import DraftServicer
from specsplit.worker.target_service import TargetServicer
from tiny_heads import make_tiny_head

from test_distributions import FITS, REJECTION, WRONG, Table, law, p_value
from tiny_models import VOCAB, make_tiny_model

LENGTH = 14
IDENTITY = {"model": "tiny", "weights_sha256": "0", "tokenizer_sha256": "0", "parameters": 1}
MODES = ("sync", "overlap", "lookahead")


def noisy(model: Any) -> Any:
    """The model with every weight changed a little: right some of the time."""
    errors = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=errors) * parameter.std() * 0.05)
    return model


def tiny(architecture: str) -> tuple[CausalLM, CausalLM]:
    return CausalLM(make_tiny_model(architecture)), CausalLM(noisy(make_tiny_model(architecture)))


def texts_of(model: CausalLM, prompts: Sequence[list[int]], length: int) -> list[list[int]]:
    """The prompts and what the model writes after them."""
    alone = (speculate(model, None, p, DraftSettings(0), max_new_tokens=length - len(p)) for p in prompts)
    return [p + written(list(rounds)) for p, rounds in zip(prompts, alone, strict=True)]


def written(rounds: Sequence[Round]) -> list[int]:
    return [token for r in rounds for token in r.tokens]


LLAMA = tiny("llama")
KNOWN = [[5, 6, 5, 6], [5], [10, 3, 40, 22], [33, 4], [61, 60, 59]]  # prompts whose texts the head has seen
HEAD = make_tiny_head(LLAMA[0].model, texts_of(LLAMA[0], KNOWN, LENGTH + 4))
PAIRS: dict[str, tuple[Any, Any]] = {
    "llama": LLAMA,
    "gpt2": tiny("gpt2"),
    "qwen3-mixed": tiny("qwen3-mixed"),
    "llama, fused": tuple(FusedLM(model, 1) for model in tiny("llama")),  # which takes the weights of the model
    "llama, graphs": tuple(GraphLM(model.model) for model in tiny("llama")),
    "llama, head on gpu": (FusedLM(tiny("llama")[0], 1), GpuHead(HiddenStatesHead(copy.deepcopy(HEAD)))),
    "llama, head": (FusedLM(tiny("llama")[0], 1), FusedHead(HiddenStatesHead(HEAD), 1)),
    "qwen3-mixed, gpu": tuple(GpuLM(model) for model in tiny("qwen3-mixed")),
    "llama, ngram": (LLAMA[0], NGramLM(VOCAB, max_ngram=2, min_ngram=1)),
    "llama, suffix": (LLAMA[0], SuffixLM(VOCAB, min_match=1, memory_tokens=500)),
    "llama, suffix or model": (LLAMA[0], SuffixLM(VOCAB, min_match=1, memory_tokens=500, model=LLAMA[1])),
    "synthetic": (SyntheticLM(seed=1, step_ms=0, acceptance=1.0), SyntheticLM(seed=1, step_ms=0, acceptance=0.7)),
}
PLAIN: dict[str, Any] = {name: pair[0].model for name, pair in PAIRS.items() if isinstance(pair[0], CausalLM)}

shapes = st.sampled_from(["chain", "2", "3x2", "1x3", "2x2x2", "dynamic-4x1", "dynamic-12x3", "dynamic-30x8"])
prompts = st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=6)
samplings = st.one_of(
    st.just(GREEDY),
    st.builds(
        Sampling,
        temperature=st.sampled_from([0.5, 1.0, 1.6]),
        top_k=st.sampled_from([0, 5]),
        top_p=st.sampled_from([1.0, 0.8]),
        seed=st.integers(0, 1 << 32 - 1),
    ),
)
least = st.sampled_from([0.0, 0.03, 0.1, 0.6])  # p_min: tiny models are seldom sure of more than .1, ngram ones are
some = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))


def plain_text(model: Any, prompt: list[int], sampling: Sampling, stop: Sequence[int]) -> list[int]:
    """What a Hugging Face model writes by itself: one pass a token over the whole text, no cache of ours."""
    text = list(prompt)
    while len(text) < len(prompt) + LENGTH and (len(text) == len(prompt) or text[-1] not in stop):
        with torch.inference_mode():
            logits = model(torch.tensor([text]), use_cache=False).logits[0, -1]
        text.append(choose(logits, len(text), sampling))
    return text[len(prompt) :]


@pytest.mark.parametrize("pair", PAIRS)
@some
@given(prompt=prompts, shape=shapes, gamma=st.integers(1, 6), sampling=samplings, data=st.data())
def test_the_loop_writes_what_the_target_alone_writes(pair, prompt, shape, gamma, sampling, data):
    target, draft = PAIRS[pair]
    alone = written(list(speculate(target, None, prompt, DraftSettings(0, sampling=sampling), max_new_tokens=LENGTH)))
    assert len(alone) == LENGTH
    stop = frozenset(data.draw(st.sets(st.sampled_from(alone), max_size=1), label="stop"))
    end = next((i for i, token in enumerate(alone) if token in stop), LENGTH)
    if pair in PLAIN:
        assert alone[: end + 1] == plain_text(PLAIN[pair], prompt, sampling, stop)
    asked = DraftSettings(gamma, TreeShape.parse(shape), sampling, stop, p_min=data.draw(least))
    rounds = list(speculate(target, draft, prompt, asked, max_new_tokens=LENGTH))
    assert written(rounds) == alone[: end + 1]
    assert all(r.accepted <= r.tree.depth() <= gamma for r in rounds)


def test_drafts_are_accepted_and_rejected() -> None:
    """Or the test above would prove little."""
    for target, draft in PAIRS.values():
        prompts = [5, 6, 5, 6], list(range(3, 60)), list(range(60, 120))
        rounds = [r for p in prompts for r in speculate(target, draft, p, DraftSettings(4), max_new_tokens=8)]
        assert 0 < sum(r.accepted for r in rounds) < sum(r.tree.depth() for r in rounds)


# ---- the streams


STUBS: dict[str, tuple[InProcessStub, InProcessStub]] = {}


def streamed(pair: str, prompt: list[int], asked: DraftSettings, mode: str, **states: Any) -> SpeculativeResult:
    """The text over the handlers of both workers and the client's streams. states: settings of hidden states, which
    cross as they are unless these say otherwise."""
    if pair not in STUBS:
        target, draft = PAIRS[pair]
        common = {"max_context": 128, "threads": 1}
        STUBS[pair] = (
            InProcessStub(DraftServicer(SharedModel(draft, 1, 0), DraftWorkerConfig(**common), IDENTITY)),
            InProcessStub(TargetServicer(SharedModel(target, 1, 0), TargetWorkerConfig(**common), IDENTITY)),
        )
    s = asked.sampling
    config = OrchestratorConfig.load(
        {
            **{"mode": mode, "gamma": asked.gamma, "tree": str(asked.shape), "max_output_tokens": LENGTH},
            **{"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p, "seed": s.seed},
            **{"sampling": "rejection" if s.rejection else "coupled", "stop_token_ids": list(asked.stop_token_ids)},
            **{"hidden_states_form": "float32", "p_min": asked.p_min, **states},
        }
    )
    return event_loop().run(run_speculative_loop_async(*STUBS[pair], prompt, config))


@pytest.mark.parametrize("pair", PAIRS)
@settings(some, max_examples=12)
@given(
    mode=st.sampled_from(MODES),
    prompt=prompts,
    shape=shapes,
    gamma=st.integers(1, 6),
    sampling=samplings,
    data=st.data(),
)
def test_the_streams_write_what_the_loop_writes(pair, mode, prompt, shape, gamma, sampling, data):
    asked = DraftSettings(gamma, TreeShape.parse(shape), sampling, p_min=data.draw(least))
    whole = written(list(speculate(*PAIRS[pair], prompt, asked, max_new_tokens=LENGTH)))
    asked = replace(asked, stop_token_ids=frozenset(data.draw(st.sets(st.sampled_from(whole), max_size=1))))
    rounds = list(speculate(*PAIRS[pair], prompt, asked, max_new_tokens=LENGTH))
    lookup = data.draw(st.integers(0, 2))
    result = streamed(pair, prompt, asked, mode, lookup=lookup)
    *text, last = written(rounds)
    assert result.output_tokens == text + [last] * (last not in asked.stop_token_ids)
    assert result.finish_reason == ("eos" if last in asked.stop_token_ids else "length")
    if (
        mode == "sync" and not lookup and not isinstance(PAIRS[pair][1], SuffixLM)
    ):  # whose drafts depend on what came before
        assert [r.tree_nodes for r in result.rounds] == [len(r.tree) for r in rounds]
        whole_rounds = len(rounds) - (result.finish_reason == "eos")  # in the last one the end may have been drafted
        assert [(r.drafted, r.accepted) for r in result.rounds[:whole_rounds]] == [
            (r.tree.depth(), r.accepted) for r in rounds[:whole_rounds]
        ]


@pytest.mark.parametrize("pair", ["llama", "gpt2", "llama, head on gpu", "synthetic", "llama, head"])
@some
@given(prompt=prompts, shape=st.sampled_from(["chain", "2x2"]), gamma=st.integers(1, 5), seed=st.integers(0, 1 << 31))
def test_rejection_sampling_over_streams_is_that_of_the_loop(pair, prompt, shape, gamma, seed):
    asked = DraftSettings(gamma, TreeShape.parse(shape), Sampling(temperature=1.0, seed=seed, rejection=True))
    rounds = list(speculate(*PAIRS[pair], prompt, asked, max_new_tokens=LENGTH))
    result = streamed(pair, prompt, asked, "sync")
    assert result.output_tokens == written(rounds)
    assert [r.accepted for r in result.rounds] == [r.accepted for r in rounds]


@pytest.mark.parametrize("pair", ["llama", "qwen3-mixed, gpu"])
def test_texts_side_by_side_are_those_of_the_loop(pair: str) -> None:
    async def write_all() -> list[SpeculativeResult]:
        config = OrchestratorConfig(mode="lookahead", gamma=3, max_output_tokens=LENGTH, stop_token_ids=[])
        return await asyncio.gather(
            *(run_speculative_loop_async(*STUBS[pair], [5, token], config) for token in range(10, 16))
        )

    streamed(pair, [5], DraftSettings(1), "sync")
    texts = event_loop().run(write_all())
    for token, result in zip(range(10, 16), texts, strict=True):
        rounds = list(speculate(*PAIRS[pair], [5, token], DraftSettings(3), max_new_tokens=LENGTH))
        assert result.output_tokens == written(rounds)


# ---- a head that reads the target's hidden states


@pytest.mark.parametrize("pair", ["llama, head", "llama, head on gpu"])
@pytest.mark.parametrize("mode", MODES)
def test_a_head_is_as_often_right_over_streams_as_in_the_loop(mode: str, pair: str) -> None:
    """Which shows that each state arrives at its place: with those of a token too early or too late it is not."""
    accepted = {"loop": 0, "streams": 0}
    for prompt in KNOWN:
        rounds = list(speculate(*PAIRS[pair], prompt, DraftSettings(3), max_new_tokens=LENGTH))
        result = streamed(pair, prompt, DraftSettings(3), mode)
        assert result.output_tokens == written(rounds)
        accepted["loop"] += sum(r.accepted for r in rounds)
        accepted["streams"] += sum(r.accepted for r in result.rounds)
    assert accepted["loop"] > 20
    # Ahead of the target a head reads its own outputs, so there it may be right at other places.
    assert abs(accepted["streams"] - accepted["loop"]) <= (0 if mode == "sync" else 6)


# ---- rejection sampling: the law of the text


class TableModel:
    """A table of logits (test_distributions) as a model of the loop; its cache is the tokens themselves."""

    max_context = 64

    def __init__(self, table: Table) -> None:
        self.table, self.vocab_size = table, table.vocab

    class Cache:
        def __init__(self) -> None:
            self.texts: list[tuple[int, ...]] = []  # of every slot, what was read up to it

        @property
        def length(self) -> int:
            return len(self.texts)

        def rollback(self, length: int) -> None:
            del self.texts[length:]

        def keep(self, length: int, path: Sequence[int]) -> None:
            self.texts[length:] = [self.texts[length + node] for node in path]

    def new_cache(self, capacity: int) -> Cache:
        return self.Cache()

    def step(
        self, cache: Cache, tokens: Sequence[int], tree: TokenTree = NO_DRAFT, cached_nodes: int = 0
    ) -> torch.Tensor:
        for token in tokens:
            cache.texts.append((*(cache.texts[-1] if cache.texts else ()), token))
        context = cache.length - cached_nodes
        rows = [cache.texts[-1]] if tokens else []
        for token, parent in list(zip(tree.token_ids, tree.parents, strict=True))[cached_nodes:]:
            cache.texts.append((*cache.texts[context + parent], token))
            rows.append(cache.texts[-1])
        return torch.stack([self.table(row[1:]) for row in rows])  # the prompt is one token, which is not counted


@pytest.mark.parametrize("shape", ["chain", "2x2"])
@pytest.mark.parametrize("kind", ["table", "suffix"])
def test_rejection_sampling_has_the_law_of_the_target(kind: str, shape: str) -> None:
    target, other = Table(16, vocab=5), Table(17, vocab=5)
    draft = TableModel(other) if kind == "table" else SuffixLM(5, min_match=1, memory_tokens=200)
    asked = DraftSettings(2, TreeShape.parse(shape))
    texts = []
    accepted = 0
    for seed in range(1500):
        sampling = replace(REJECTION, seed=seed)
        rounds = list(speculate(TableModel(target), draft, [0], replace(asked, sampling=sampling), max_new_tokens=3))
        texts.append(tuple(written(rounds)))
        place = -1
        for token in (0, *texts[-1]) if isinstance(draft, SuffixLM) else ():
            place = draft.memory.append(0, token, place)  # the end of a text is not learnt by itself
        accepted += sum(r.accepted for r in rounds)
    assert p_value(texts, law(target, 3, REJECTION)) > FITS
    assert p_value(texts, law(other, 3, REJECTION)) < WRONG  # it would be noticed
    assert accepted > 400
