"""Numbers that are not finite: the text ends with a named error, no other text sees them, a draft ends alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specsplit.api.in_process import InProcessStub
from specsplit.client.event_loop import event_loop
from specsplit.client.pipeline import run_speculative_loop_async
from specsplit.decoding.growth import DraftSettings
from specsplit.decoding.loop import NO_DRAFT, speculate
from specsplit.decoding.sampling import GREEDY, NonFiniteLogits, Sampling, candidates, choose
from specsplit.decoding.tree import ROOT, TokenTree
from specsplit.decoding.verification import checked_pass, verify
from specsplit.engines.cuda_graphs import GraphLM
from specsplit.engines.gpu import GpuLM
from specsplit.engines.numba import FusedLM
from specsplit.engines.transformers import CausalLM
from specsplit.errors import WorkerError
from specsplit.settings.run import OrchestratorConfig
from specsplit.settings.worker import DraftWorkerConfig, TargetWorkerConfig
from specsplit.worker.batching import SharedModel
from specsplit.worker.draft_service import DraftServicer
from specsplit.worker.target_service import TargetServicer

from tiny_models import VOCAB, make_tiny_model

BAD = 99  # the model overflows when it reads this token
LENGTH = 12
PROMPT = [5, 6, 7]
SAMPLINGS = [GREEDY, Sampling(1.0, seed=3), Sampling(0.7, top_p=0.8, seed=4), Sampling(1.0, seed=3, rejection=True)]
IDENTITY = {"model": "tiny", "weights_sha256": "0", "tokenizer_sha256": "0", "parameters": 1}


def overflowing(value: float = float("inf")) -> Any:
    model = make_tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[BAD] = value
        model.get_output_embeddings().weight[BAD] = 0  # which it does not write by itself
    return model


ENGINES = {
    "transformers": lambda: CausalLM(overflowing()),
    "graphs": lambda: GraphLM(overflowing()),
    "gpu": lambda: GpuLM(CausalLM(overflowing())),
    "fused": lambda: FusedLM(CausalLM(overflowing()), 1),
}


@pytest.fixture(params=ENGINES)
def engine(request):
    return ENGINES[request.param]()


def alone(model: Any, prompt: list[int], sampling: Sampling) -> list[int]:
    rounds = speculate(model, None, prompt, DraftSettings(0, sampling=sampling), max_new_tokens=LENGTH)
    return [token for each in rounds for token in each.tokens]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_token_is_chosen_from_numbers_that_are_not_finite(sampling, value):
    logits = torch.randn(1, VOCAB)
    logits[0, 17] = value
    with pytest.raises(NonFiniteLogits, match="token 40 of the text"):
        verify(TokenTree(), logits, 40, sampling)
    assert candidates(logits, [40], sampling, 4)[0].token_ids == []
    if not sampling.rejection:
        with pytest.raises(NonFiniteLogits, match="wider dtype"):
            choose(logits[0], 40, sampling)


def test_rows_that_are_not_on_the_path_are_not_looked_at():
    logits = torch.zeros(3, VOCAB)
    logits[0, 4], logits[1, 8], logits[2] = 1.0, 1.0, float("nan")
    assert verify(TokenTree([4, 5], [ROOT, ROOT], [-1.0, -1.0]), logits, 3, GREEDY).path == [0]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_text_that_overflows_leaves_the_next_ones_as_they_are(engine, sampling):
    expected = alone(engine, PROMPT, sampling)
    cache = engine.new_cache(64)
    with pytest.raises(NonFiniteLogits):
        checked_pass(engine, cache, [*PROMPT, BAD, 8], NO_DRAFT, sampling)
    assert cache.length == 0
    text = list(PROMPT)  # the same cache, as sessions of a worker have it one after another
    while len(text) < len(PROMPT) + LENGTH:
        text.append(checked_pass(engine, cache, text, NO_DRAFT, sampling).next_token)
    assert text[len(PROMPT) :] == expected
    del cache  # its buffers go to the next one
    assert alone(engine, PROMPT, sampling) == expected


def test_what_is_left_of_a_forgotten_text_does_not_end_the_next_one(engine):
    expected = alone(engine, PROMPT, GREEDY)
    cache = engine.new_cache(64)
    engine.step(cache, [*PROMPT[:2], 40, BAD, 8])  # nobody looks at the logits, as of a part of a prompt
    cache.rollback(2)
    assert checked_pass(engine, cache, PROMPT, NO_DRAFT, GREEDY).next_token == expected[0]


@pytest.mark.parametrize("sampling", SAMPLINGS[:3])
def test_a_drafted_token_that_overflows_does_not_change_the_text(engine, sampling):
    expected = alone(engine, PROMPT, sampling)
    cache, text = engine.new_cache(64), list(PROMPT)
    while len(text) < len(PROMPT) + LENGTH:
        following = expected[len(text) - len(PROMPT)]
        tree = TokenTree([BAD, following, BAD], [ROOT, ROOT, 1], [-1.0, -1.0, -1.0])
        verdict = checked_pass(engine, cache, text, tree, sampling)
        text += [*(tree.token_ids[node] for node in verdict.path), verdict.next_token]
    assert text[len(PROMPT) :][:LENGTH] == expected[:LENGTH]


# Each mode and kind of tree once; what an engine does about it is the same in each.
@pytest.mark.parametrize(
    ("engine", "mode", "tree"),
    [
        ("transformers", "sync", "dynamic-12x3"),
        ("graphs", "overlap", "chain"),
        ("gpu", "lookahead", "3x2"),
        ("fused", "lookahead", "chain"),
    ],
    indirect=["engine"],
)
def test_workers_end_the_text_by_name_and_a_draft_ends_drafting_alone(engine, mode, tree):
    good = CausalLM(make_tiny_model("llama"))
    settings = {"max_context": 128, "threads": 1}
    shared = SharedModel(engine, 1, 0)  # one thread runs a model, whoever asks
    draft = InProcessStub(DraftServicer(shared, DraftWorkerConfig(**settings), IDENTITY))
    target = InProcessStub(TargetServicer(SharedModel(good, 1, 0), TargetWorkerConfig(**settings), IDENTITY))
    bad_target = InProcessStub(TargetServicer(shared, TargetWorkerConfig(**settings), IDENTITY))
    config = OrchestratorConfig(mode=mode, tree=tree, gamma=3, max_output_tokens=LENGTH, stop_token_ids=[])

    def write(target: InProcessStub, prompt: list[int]) -> list[int]:
        return event_loop().run(run_speculative_loop_async(draft, target, prompt, config)).output_tokens

    for prompt in ([5, BAD, 7], PROMPT, [4, BAD], PROMPT):  # drafts end in the first and the third
        assert write(target, prompt) == alone(good, prompt, GREEDY)
    expected = write(bad_target, PROMPT)
    with pytest.raises(WorkerError, match=r"logits of token \d+ of the text are not finite") as raised:
        write(bad_target, [5, BAD, 7])
    assert raised.value.code == "DATA_LOSS"
    assert write(bad_target, PROMPT) == expected == alone(engine, PROMPT, GREEDY)
