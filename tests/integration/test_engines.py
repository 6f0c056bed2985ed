"""Draft and target engines together, without gRPC: the text is the target's own, whatever drafts it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from specsplit.decoding.growth import DraftSettings
from specsplit.decoding.tree import TokenTree, TreeShape
from specsplit.engines.transformers import CausalLM
from specsplit.models.vocabulary import Vocabulary
from specsplit.worker.draft import Drafter
from specsplit.worker.sessions import Session
from specsplit.worker.target_service import verify_tree

from tiny_models import ARCHITECTURES, make_tiny_model

PROMPT = [5, 9, 33, 71, 12]
LENGTH = 24
CAPACITY = 160
GAMMAS = (1, 3, 8)
SHAPES = ([], [2, 2], [3, 2, 1])


def new_session(model: CausalLM) -> Session:
    return Session(model.new_cache(CAPACITY))


def draft_tree(
    model: CausalLM, session: Session, context: list[int], prefix: int, *, gamma: int, branching=(), stop_token_ids=()
) -> TokenTree:
    """A draft as the service makes it of a request whose first `prefix` tokens the session holds."""
    assert prefix <= len(session.tokens)
    settings = DraftSettings(gamma, TreeShape(tuple(branching)), stop_token_ids=frozenset(stop_token_ids))
    return Drafter(model, Vocabulary(model.vocab_size), session, context, settings).draft()


def noisy_copy(architecture: str) -> CausalLM:
    """The target with noise on its weights: a draft that is right part of the time."""
    model = make_tiny_model(architecture)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.05)
    return CausalLM(model)


def check_session(model: CausalLM, session: Session, text: list[int]) -> None:
    """The cache holds the keys and values of `text`, as a fresh prefill makes them."""
    assert session.tokens == text
    assert session.cache.length == len(text) + (len(session.state.nodes) if session.state else 0)
    expected = model.new_cache(CAPACITY)
    model.step(expected, text)
    for ours, theirs in zip(session.cache.layers, expected.layers, strict=True):
        for name in ("keys", "values"):
            a, b = (getattr(layer, name)[:, :, : len(text)] for layer in (ours, theirs))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@dataclass
class Written:
    text: list[int]
    drafted: int = 0
    accepted: int = 0


def generate(
    target: CausalLM, draft: CausalLM | None, gamma: int, shape: list[int], stop: int = -1, check: bool = False
) -> Written:
    """The loop of the orchestrator, without gRPC."""
    text, written = list(PROMPT), Written([])
    ours, theirs = new_session(target), new_session(draft or target)
    while len(text) < len(PROMPT) + LENGTH and stop not in text:
        tree = TokenTree()
        if draft is not None:
            tree = draft_tree(
                draft, theirs, text, len(theirs.tokens), gamma=gamma, branching=shape, stop_token_ids={stop}
            )
            written.drafted += tree.depth()
        verdict = verify_tree(target, ours, text, len(ours.tokens), tree)
        accepted = [tree.token_ids[node] for node in verdict.path]
        if check and draft is not None:
            check_session(draft, theirs, text)
        if check:
            check_session(target, ours, text + accepted)
        written.accepted += len(accepted)
        text += [*accepted, verdict.next_token]
    written.text = text[len(PROMPT) : len(PROMPT) + LENGTH]
    return written


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_text_is_the_targets_own(architecture):
    model = make_tiny_model(architecture)
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        reference = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=LENGTH)
    expected = reference[0, len(PROMPT) :].tolist()
    assert len(set(expected)) > 3  # else any draft would do
    target = CausalLM(model)
    assert generate(target, None, 0, [], check=True).text == expected
    drafts = {
        "same": CausalLM(make_tiny_model(architecture)),
        "noisy": noisy_copy(architecture),
        "other": CausalLM(make_tiny_model(architecture, seed=1)),
    }
    rates = {}
    every = architecture == "llama"  # others at each gamma and in each tree: test_identity.py, test_reference_loop.py
    for name, draft in drafts.items():
        runs = []
        for gamma in GAMMAS if name == "noisy" and every else (3,):
            for shape in SHAPES if name == "noisy" or every else SHAPES[:1]:
                runs.append(generate(target, draft, gamma, shape, check=name == "noisy" and gamma == 3))
                assert runs[-1].text == expected, (name, gamma, shape)
        rates[name] = sum(run.accepted for run in runs) / sum(run.drafted for run in runs)
    assert rates["same"] > 0.99
    assert 0.15 < rates["noisy"] < 0.85
    assert rates["other"] < 0.15


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gamma", [1, 3, 8])
def test_text_up_to_a_stop_token(gamma, shape):
    """Nothing is drafted after a stop token, and a draft that ends early changes no text."""
    target = CausalLM(make_tiny_model("llama"))
    full = generate(target, None, 0, []).text
    stop = full[9]
    expected = full[: full.index(stop) + 1]
    for draft in (CausalLM(make_tiny_model("llama")), noisy_copy("llama")):
        text = generate(target, draft, gamma, shape, stop=stop).text
        assert text[: len(expected)] == expected
        # At most the target's token after an accepted stop token, which the caller cuts off.
        assert len(text) <= len(expected) + 1


def test_a_draft_follows_the_shape_and_stops_at_stop_tokens():
    model = CausalLM(make_tiny_model("llama"))
    session = new_session(model)
    tree = draft_tree(model, session, PROMPT, 0, gamma=3, branching=[2, 2])
    assert tree.depths() == [1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    tree.validate(vocab_size=model.vocab_size)
    stop = tree.token_ids[0]
    stopped = draft_tree(model, new_session(model), PROMPT, 0, gamma=3, branching=[2], stop_token_ids={stop})
    assert stopped.token_ids[0] == stop
    assert 0 not in stopped.parents
    # A stop token beside it does not disturb what follows the first child.
    second = tree.token_ids[1]
    beside = draft_tree(model, new_session(model), PROMPT, 0, gamma=3, branching=[2], stop_token_ids={second})
    chain = draft_tree(model, new_session(model), PROMPT, 0, gamma=3)
    assert [beside.token_ids[node] for node in (0, 2, 3)] == chain.token_ids
    alone = draft_tree(model, new_session(model), PROMPT, 0, gamma=5, stop_token_ids={stop})
    assert alone.token_ids == [stop]


def break_call(monkeypatch, holder: object, name: str, number: int) -> None:
    """The call of this number, counted from 1, raises instead."""
    original, calls = getattr(holder, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise RuntimeError("out of memory")
        return original(*args, **kwargs)

    monkeypatch.setattr(holder, name, counted)


@pytest.mark.parametrize("resend", ["what is held", "all"])
@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_draft_that_fails_half_way_can_be_asked_again(monkeypatch, fails_at, resend):
    model = CausalLM(make_tiny_model("llama"))
    session = new_session(model)
    draft = draft_tree(model, session, PROMPT, 0, gamma=3, branching=[2])
    # The second branch was right, so that its keys have to be moved.
    text = [*PROMPT, draft.token_ids[1], draft.token_ids[3], 40]
    expected = draft_tree(model, new_session(model), text, 0, gamma=3, branching=[2])
    break_call(monkeypatch, model, "step", fails_at)
    with pytest.raises(RuntimeError, match="out of memory"):
        draft_tree(model, session, text, len(PROMPT), gamma=3, branching=[2])
    assert session.tokens == text[: len(session.tokens)]
    prefix = {"what is held": len(session.tokens), "all": 0}[resend]
    assert draft_tree(model, session, text, prefix, gamma=3, branching=[2]).token_ids == expected.token_ids
    check_session(model, session, text)


def test_a_draft_that_fails_while_it_mends_its_cache_can_be_asked_again():
    model = CausalLM(make_tiny_model("llama"))
    session = new_session(model)
    draft = draft_tree(model, session, PROMPT, 0, gamma=3, branching=[2])
    text = [*PROMPT, draft.token_ids[1], draft.token_ids[3], 40]
    keys, values = session.cache.layers[1].keys, session.cache.layers[1].values
    session.cache.layers[1].values = None  # the keys of the layers up to this one are moved, its values are not
    with pytest.raises(AttributeError):
        draft_tree(model, session, text, len(PROMPT), gamma=3, branching=[2])
    session.cache.layers[1].keys, session.cache.layers[1].values = keys, values
    again = draft_tree(model, session, text, len(session.tokens), gamma=3, branching=[2])
    assert again.token_ids == draft_tree(model, new_session(model), text, 0, gamma=3, branching=[2]).token_ids
    check_session(model, session, text)


def test_a_verification_that_fails_can_be_asked_again(monkeypatch):
    model = CausalLM(make_tiny_model("llama"))
    session = new_session(model)
    tree = draft_tree(model, new_session(model), [*PROMPT, 60], 0, gamma=3, branching=[2])
    verify_tree(model, session, PROMPT, 0, TokenTree())
    with monkeypatch.context() as patch:
        break_call(patch, model, "step", 1)
        with pytest.raises(RuntimeError, match="out of memory"):
            verify_tree(model, session, [*PROMPT, 60], len(PROMPT), tree)
    assert session.tokens == PROMPT
    verdict = verify_tree(model, session, [*PROMPT, 60], len(PROMPT), tree)
    assert len(verdict.path) == 3
    check_session(model, session, [*PROMPT, 60, *(tree.token_ids[node] for node in verdict.path)])


@pytest.mark.parametrize("prefix", [0, 2, 5])
def test_a_shorter_prefix_rolls_back(prefix):
    model = CausalLM(make_tiny_model("llama"))
    other = [*PROMPT[:prefix], 60, 61, 62]
    drafting, verifying = new_session(model), new_session(model)
    draft_tree(model, drafting, PROMPT, 0, gamma=2)
    tree = draft_tree(model, drafting, other, prefix, gamma=2)
    assert tree.token_ids == draft_tree(model, new_session(model), other, 0, gamma=2).token_ids
    check_session(model, drafting, other)
    verify_tree(model, verifying, PROMPT, 0, TokenTree())
    verdict = verify_tree(model, verifying, other, prefix, TokenTree())
    assert verdict.next_token == tree.token_ids[0]
    check_session(model, verifying, other)


def passes(model: CausalLM, monkeypatch) -> list[int]:
    """A list that gets the number of tokens of every pass from now on."""
    fed: list[int] = []
    step = model.step

    def counted(cache, tokens, tree=TokenTree(), cached_nodes=0):  # noqa: B008
        fed.append(len(tokens) + len(tree) - cached_nodes)
        return step(cache, tokens, tree, cached_nodes)

    monkeypatch.setattr(model, "step", counted)
    return fed


def test_the_same_context_can_be_drafted_from_again_without_a_pass(monkeypatch):
    model = CausalLM(make_tiny_model("llama"))
    session = new_session(model)
    first = draft_tree(model, session, PROMPT, 0, gamma=3)
    fed = passes(model, monkeypatch)
    assert draft_tree(model, session, PROMPT, len(PROMPT), gamma=3).token_ids == first.token_ids
    assert fed == []
    check_session(model, session, PROMPT)


def test_what_was_drafted_and_accepted_is_not_fed_again(monkeypatch):
    model = CausalLM(make_tiny_model("llama"))
    session = new_session(model)
    draft = draft_tree(model, session, PROMPT, 0, gamma=4)
    fed = passes(model, monkeypatch)
    text = PROMPT + draft.token_ids[:2]
    assert draft_tree(model, session, text, len(PROMPT), gamma=2).token_ids == draft.token_ids[2:]
    assert fed == []
    assert draft_tree(model, session, [*text, 60], len(text), gamma=2).token_ids != draft.token_ids[2:]
    assert fed == [1, 1]
    check_session(model, session, [*text, 60])


def test_a_draft_that_failed_is_not_taken_for_the_one_before(monkeypatch):
    model = CausalLM(make_tiny_model("llama"))
    session = new_session(model)
    draft = draft_tree(model, session, PROMPT, 0, gamma=3)
    with monkeypatch.context() as patch:
        break_call(patch, model, "step", 2)
        with pytest.raises(RuntimeError, match="out of memory"):
            draft_tree(model, session, [*PROMPT, 60, 61], len(PROMPT), gamma=3)
    # As many tokens are in the cache as before, but other ones.
    text = [*PROMPT, *draft.token_ids[:2], 40]
    draft_tree(model, session, text, len(PROMPT), gamma=3)
    check_session(model, session, text)
