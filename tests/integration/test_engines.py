"""Draft and target engines together, without gRPC: the text is the target's own, whatever drafts it."""

from __future__ import annotations

import pytest
import torch

from specsplit.models.causal_lm import CausalLM
from specsplit.workers.draft.engine import draft_tree
from specsplit.workers.sessions import Session
from specsplit.workers.target.engine import verify_tree

from conftest import ARCHITECTURES, make_tiny_model

PROMPT = [5, 9, 33, 71, 12]
LENGTH = 24
SHAPES = ([], [2, 2], [3, 2, 1])


def noisy_copy(architecture: str, scale: float) -> CausalLM:
    """The target with noise on its weights: a draft that is right part of the time."""
    model = make_tiny_model(architecture)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * scale)
    return CausalLM(model)


def generate(target: CausalLM, draft: CausalLM | None, gamma: int, shape: list[int], length: int = LENGTH):
    """The loop of the orchestrator; returns the text and how many tokens were drafted and accepted."""
    text, counts = list(PROMPT), [0, 0]
    sessions = [Session(model.new_cache(160)) for model in (target, draft or target)]
    while len(text) < len(PROMPT) + length:
        tree = None
        if draft is not None:
            tree = draft_tree(draft, sessions[1], text, len(sessions[1].tokens), gamma=gamma, branching=shape)
            check_session(draft, sessions[1], text)
            counts[0] += tree.depth()
        verdict = verify_tree(target, sessions[0], text, len(sessions[0].tokens), tree or type(sessions[0].tree)())
        accepted = [tree.token_ids[node] for node in verdict.path] if tree else []
        counts[1] += len(accepted)
        text += accepted
        check_session(target, sessions[0], text)
        text.append(verdict.next_token)
    return text[len(PROMPT) : len(PROMPT) + length], counts


def check_session(model: CausalLM, session: Session, text: list[int]) -> None:
    """The cache holds the keys of `text`, as a fresh prefill makes them."""
    assert session.tokens == text
    assert session.cache.length == len(text) + session.cached_nodes
    expected = model.new_cache(160)
    model.step(expected, text)
    for ours, theirs in zip(session.cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(ours.keys[:, :, : len(text)], theirs.keys[:, :, : len(text)], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_text_is_the_targets_own(architecture):
    model = make_tiny_model(architecture)
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        reference = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=LENGTH)
    expected = reference[0, len(PROMPT) :].tolist()
    target = CausalLM(model)
    assert generate(target, None, 0, [])[0] == expected
    rates = {}
    drafts = {
        "same": CausalLM(make_tiny_model(architecture)),
        "noisy": noisy_copy(architecture, 0.03),
        "other": CausalLM(make_tiny_model(architecture, seed=1)),
    }
    for name, draft in drafts.items():
        totals = [0, 0]
        for gamma in (1, 2, 5):
            for shape in SHAPES:
                text, counts = generate(target, draft, gamma, shape)
                assert text == expected, (name, gamma, shape)
                totals = [a + b for a, b in zip(totals, counts, strict=True)]
        rates[name] = totals[1] / totals[0]
    assert rates["same"] > 0.99
    assert rates["other"] < rates["same"]


def test_partial_acceptance_really_happens():
    target = CausalLM(make_tiny_model("llama"))
    expected, _ = generate(target, None, 0, [])
    text, (drafted, accepted) = generate(target, noisy_copy("llama", 0.05), 5, [])
    assert text == expected
    assert 0.1 < accepted / drafted < 0.9


def test_a_draft_follows_the_shape_and_stops_at_stop_tokens():
    model = CausalLM(make_tiny_model("llama"))
    session = Session(model.new_cache(64))
    tree = draft_tree(model, session, PROMPT, 0, gamma=3, branching=[2, 2])
    assert tree.depths() == [1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    tree.validate(vocab_size=model.vocab_size)
    stop = tree.token_ids[0]
    stopped = draft_tree(model, Session(model.new_cache(64)), PROMPT, 0, gamma=3, branching=[2], stop_token_ids={stop})
    assert stopped.token_ids[0] == stop
    assert 0 not in stopped.parents
    alone = draft_tree(model, Session(model.new_cache(64)), PROMPT, 0, gamma=5, stop_token_ids={stop})
    assert alone.token_ids == [stop]


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_draft_that_fails_half_way_can_be_asked_again(monkeypatch, fails_at):
    model = CausalLM(make_tiny_model("llama"))
    first, second = PROMPT, [*PROMPT, 40, 41]
    expected = draft_tree(model, Session(model.new_cache(64)), second, 0, gamma=3, branching=[2])
    session = Session(model.new_cache(64))
    draft_tree(model, session, first, 0, gamma=3, branching=[2])
    original, passes = model.step, []

    def step(*args, **kwargs):
        passes.append(1)
        if len(passes) == fails_at:
            raise RuntimeError("lost power")
        return original(*args, **kwargs)

    monkeypatch.setattr(model, "step", step)
    with pytest.raises(RuntimeError, match="lost power"):
        draft_tree(model, session, second, len(first), gamma=3, branching=[2])
    monkeypatch.setattr(model, "step", original)
    held = session.tokens
    assert held == second[: len(held)]
    again = draft_tree(model, session, second, len(held), gamma=3, branching=[2])
    assert again.token_ids == expected.token_ids


@pytest.mark.parametrize("prefix", [0, 2, 5])
def test_a_shorter_prefix_rolls_back(prefix):
    model = CausalLM(make_tiny_model("llama"))
    other = [*PROMPT[:prefix], 60, 61, 62]
    for engine in ("draft", "target"):
        session = Session(model.new_cache(64))
        draft_tree(model, session, PROMPT, 0, gamma=2)
        if engine == "draft":
            draft_tree(model, session, other, prefix, gamma=2)
        else:
            session = Session(model.new_cache(64))
            verify_tree(model, session, PROMPT, 0, type(session.tree)())
            verify_tree(model, session, other, prefix, type(session.tree)())
        check_session(model, session, other)
