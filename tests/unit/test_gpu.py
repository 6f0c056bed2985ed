"""The engine for GPUs on the CPU: the same passes on the same buffers, without graphs."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specsplit.decoding.growth import DraftSettings
from specsplit.decoding.sampling import GREEDY, NonFiniteLogits, Sampling
from specsplit.decoding.tree import TokenTree, TreeShape
from specsplit.decoding.verification import checked_pass, verify
from specsplit.engines import gpu_cache, gpu_passes, loading
from specsplit.engines.gpu import SMALLEST_PASS, GpuLM
from specsplit.engines.gpu_decoder import MOST_SPLIT, unsuitable
from specsplit.engines.gpu_head import GpuHead
from specsplit.engines.hidden_states import HiddenStatesHead
from specsplit.engines.passes import Pass, Propose, Walk
from specsplit.engines.recording import Recorder
from specsplit.engines.reduced_vocabulary import reduce_vocabulary
from specsplit.engines.transformers import CausalLM
from specsplit.models.sources import resolve_model
from specsplit.models.vocabulary import ReducedVocabulary, Vocabulary
from specsplit.settings.worker import TargetWorkerConfig
from specsplit.worker.draft import Drafter
from specsplit.worker.sessions import Session
from specsplit.worker.states import ReceivedStates
from tiny_heads import make_tiny_head

from tiny_models import VOCAB, make_tiny_model

PROMPT = [5, 9, 33, 71, 12, 90, 44, 8, 101, 63, 27]
TREE = TokenTree([7, 8, 9, 10, 11], [-1, 0, -1, 2, 2], [-1.0] * 5)
TYPES = ["llama", "qwen2", "qwen3-mixed", "mistral"]
SAMPLINGS = [GREEDY, Sampling(temperature=0.8, seed=9), Sampling(temperature=1.0, top_k=20, top_p=0.8, seed=9)]
sampled = pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "coupled", "cut"])


DRAWN = Sampling(temperature=1.0, top_k=9, seed=9, rejection=True)


def engine(architecture: str = "llama", **arguments: Any) -> GpuLM:
    return GpuLM(CausalLM(make_tiny_model(architecture)), **arguments)


def head(rows: int = VOCAB) -> HiddenStatesHead:
    return HiddenStatesHead(make_tiny_head(make_tiny_model("llama"), rows=rows))


@torch.inference_mode()
def logits_of(hf: Any, text: list[int]) -> torch.Tensor:
    """Logits after every token of a text, from transformers alone."""
    return hf(torch.tensor([text]), use_cache=False).logits[0]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("architecture", TYPES)
def test_logits_are_those_of_transformers(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts by scaled_dot_product_attention, drafts by products, over one block of the cache and several."""
    monkeypatch.setattr(gpu_cache, "BLOCK", 64)
    hf, model = make_tiny_model(architecture), engine(architecture)
    text = [3 + i * i % 90 for i in range(200)]
    expected = logits_of(hf, text)
    cache = model.new_cache(250)
    assert cache.pool.views == [(1, 128), (2, 128), (4, 128)]
    for start, end in ((0, 20), (20, 23), (23, 50), (50, 120), (120, 190), (190, 200)):
        rows = model.step(cache, text[start : start + 1], TokenTree.chain(text[start + 1 : end]))
        close(rows, expected[start:end])
        cache.rollback(start)
        close(model.step(cache, text[start:end])[0], expected[end - 1])
    assert MOST_SPLIT < 190 - 120
    for node in range(len(TREE)):
        path = [node]
        while TREE.parents[path[0]] >= 0:
            path.insert(0, TREE.parents[path[0]])
        cache.rollback(150)
        row = model.step(cache, text[150:152], TREE)[1 + node]
        close(row, logits_of(hf, text[:152] + [TREE.token_ids[i] for i in path])[-1])
        cache.keep(152, path)
        close(model.step(cache, [50])[0], logits_of(hf, text[:152] + [TREE.token_ids[i] for i in path] + [50])[-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    hf = make_tiny_model("qwen3-mixed").to(dtype)
    model = GpuLM(CausalLM(make_tiny_model("qwen3-mixed").to(dtype)))
    found = model.step(model.new_cache(300), PROMPT[:1], TokenTree.chain(PROMPT[1:])).double()
    similar = torch.cosine_similarity(found, logits_of(hf, PROMPT).double(), dim=-1)
    assert bool((similar > 0.999).all())


def test_a_token_has_the_same_bits_alone_and_in_a_draft() -> None:
    model = engine("qwen3-mixed")
    alone, drafted = model.new_cache(64), model.new_cache(64)
    rows = torch.cat([model.step(alone, [token]) for token in PROMPT])
    assert torch.equal(model.step(drafted, PROMPT[:1], TokenTree.chain(PROMPT[1:])), rows)


# ---- verdicts and drafts on the device


def counted_launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shapes of the launches from now on."""
    shapes: list[Any] = []
    run = gpu_passes.Program.run

    def counted(self: gpu_passes.Program, passes: Any) -> Any:
        shapes.append(self.shape)
        return run(self, passes)

    monkeypatch.setattr(gpu_passes.Program, "run", counted)
    return shapes


@sampled
@pytest.mark.parametrize("tokens", [1, 3, SMALLEST_PASS + 5])
def test_a_verdict_is_that_of_the_logits_and_the_cache_keeps_its_path(sampling: Sampling, tokens: int) -> None:
    """Trees of one node with every token after the text, and a branch that is right at its second node."""
    hf, model, plain = make_tiny_model("llama"), engine(), CausalLM(make_tiny_model("llama"))
    text, new = PROMPT[:4], [3 + i for i in range(tokens)]
    cache, other = model.new_cache(160), plain.new_cache(160)
    for own, lm in ((cache, model), (other, plain)):
        lm.step(own, text)
    right: list[int] = []
    for _ in range(3):  # what the target would write
        verdict = checked_pass(plain, other, [*text, *new, *right], TokenTree(), sampling)
        right.append(verdict.next_token)
        other.rollback(4)
    wrong = [token for token in range(40, 60) if token not in right]
    tree = TokenTree([wrong[0], wrong[1], right[0], wrong[2], right[1]], [-1, 0, -1, 2, 2], [-1.0] * 5)
    for draft in (tree, TokenTree.chain([*right, wrong[4]]), TokenTree()):
        verdict = model.step(cache, new, draft, then=Walk(sampling))
        assert verdict == verify(draft, plain.step(other, new, draft), 4 + tokens, sampling)
        cache.keep(4 + tokens, verdict.path)
        assert cache.length == 4 + tokens + len(verdict.path)
        accepted = [draft.token_ids[node] for node in verdict.path]
        close(model.step(cache, [50])[0], logits_of(hf, [*text, *new, *accepted, 50])[-1])
        for own in (cache, other):
            own.rollback(4)


@sampled
@pytest.mark.parametrize("reduced", [False, True])
def test_a_chain_is_one_launch_and_what_single_passes_draft(
    sampling: Sampling, reduced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = list(range(3, VOCAB, 2)) if reduced else None
    vocabulary = ReducedVocabulary(heads, VOCAB) if heads else Vocabulary(VOCAB)
    models: list[Any] = []
    for kind in (CausalLM, lambda hf: GpuLM(CausalLM(hf))):
        hf = make_tiny_model("llama")
        if heads:
            reduce_vocabulary(hf, heads)
        models.append(kind(hf))
    launches = counted_launches(monkeypatch)
    sessions = [Session(model.new_cache(96)) for model in models]
    text = list(PROMPT)
    for gamma, accepted in ((4, 4), (4, 2), (1, 1), (6, 0), (3, 3)):
        settings = DraftSettings(gamma, TreeShape(), sampling, frozenset({text[-1]}), vocab_size=120)
        launches.clear()
        expected, found = (
            Drafter(model, vocabulary, session, text, settings).draft()
            for model, session in zip(models, sessions, strict=True)
        )
        assert (found.token_ids, found.parents) == (expected.token_ids, expected.parents)
        torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-3, atol=1e-3)
        assert len(launches) == 1
        assert launches[0].then.steps == gamma - 1
        text += [*found.token_ids[:accepted], 60 + gamma]
    assert sessions[1].cache.length == len(sessions[1].tokens) + len(sessions[1].state.nodes)


@pytest.mark.parametrize("sampling", [*SAMPLINGS, DRAWN], ids=["greedy", "coupled", "cut", "drawn"])
@pytest.mark.parametrize("first", [0, 4])
def test_a_draft_of_a_head_is_one_launch_from_true_states_to_the_last_token(
    sampling: Sampling, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside HiddenStatesHead, which drafts pass by pass; a prompt is read before. first: position of the first state
    that came."""
    source, rows = head(60), list(range(3, 123, 2))
    models: list[Any] = [source, GpuHead(source)]
    vocabulary, states = ReducedVocabulary(rows, VOCAB), torch.randn(60, source.state_size)
    launches = counted_launches(monkeypatch)
    sessions = [Session(model.new_cache(96), hidden=ReceivedStates(first, 96, source.state_size)) for model in models]
    text, prompt_passes = PROMPT * 2, [(0, True)]
    for gamma, accepted in ((4, 4), (4, 2), (1, 1), (6, 0), (3, 3)):
        settings = DraftSettings(gamma, TreeShape(), sampling, frozenset({text[-1]}), vocab_size=120)
        launches.clear()
        drafts = []
        for model, session in zip(models, sessions, strict=True):
            session.hidden.add(session.hidden.end, states[session.hidden.end : len(text) - 1])
            drafter = Drafter(model, vocabulary, session, text, settings, reads_states=True, drafted_ahead=False)
            drafts.append(drafter.draft())
        expected, found = drafts
        assert (found.token_ids, found.parents) == (expected.token_ids, expected.parents)
        assert found.distributions.keys() == expected.distributions.keys()
        torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-3, atol=1e-3)
        assert [(shape.then.steps, shape.given) for shape in launches] == [*prompt_passes, (gamma - 1, True)]
        prompt_passes = []
        text += [*found.token_ids[:accepted], 61 + 2 * gamma]


def test_numbers_that_are_not_finite() -> None:
    """They are noticed on the path alone, drafts end there, and nothing of them is left for the next text."""
    model = engine()
    expected = model.step(model.new_cache(64), PROMPT)
    weight = model.runtime.decoder.embed.weight.data
    kept = weight[77].clone()
    weight[77] = torch.nan
    cache = model.new_cache(64)
    assert checked_pass(model, cache, PROMPT, TokenTree([77, 50], [-1, -1], [-1.0] * 2), GREEDY).next_token >= 0
    with pytest.raises(NonFiniteLogits, match="token 12 "):
        checked_pass(model, cache, [*PROMPT, 77], TokenTree(), GREEDY)
    settings = DraftSettings(4)
    session = Session(cache)
    cache.rollback(0)
    assert len(Drafter(model, Vocabulary(VOCAB), session, [*PROMPT, 77], settings).draft()) == 0
    assert session.state.overflowed
    weight[77] = kept
    cache.rollback(0)
    assert len(Drafter(model, Vocabulary(VOCAB), Session(cache), PROMPT, settings).draft()) == 4
    cache.rollback(0)
    assert torch.equal(model.step(cache, PROMPT), expected)


# ---- many sessions


def test_sessions_share_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts, drafts and logits of sessions of unlike length, some rows of the pool idle: as each alone."""
    model, plain = engine(sessions=8), CausalLM(make_tiny_model("llama"))
    shapes = counted_launches(monkeypatch)
    caches = [model.new_cache(400) for _ in range(6)]
    texts = {i: [3 + (i + 1) * k % 80 for k in range(length)] for i, length in ((1, 4), (2, 90), (3, 300), (5, 9))}
    others = {i: plain.new_cache(400) for i in texts}
    for i, text in texts.items():
        model.step(caches[i], text)
        plain.step(others[i], text)
    shapes.clear()
    found = model.step_many([Pass(caches[i], [20 + i], TREE, then=Walk(GREEDY)) for i in texts])
    for i, verdict in zip(texts, found, strict=True):
        assert verdict == verify(TREE, plain.step(others[i], [20 + i], TREE), len(texts[i]) + 1, GREEDY)
        caches[i].keep(len(texts[i]) + 1, verdict.path)
        others[i].keep(len(texts[i]) + 1, verdict.path)
    steps = {1: 0, 2: 3, 3: 1, 5: 2}
    sampling = SAMPLINGS[1]
    drafts = model.step_many(
        [Pass(caches[i], [30, 31][: 1 + i % 2], then=Propose(sampling, VOCAB, steps=steps[i])) for i in texts]
    )
    # A draft without steps is of another kind.
    assert [(s.row, s.sessions, s.tokens, s.then.steps) for s in shapes] == [(0, 8, 8, 0), (1, 1, 2, 0), (0, 8, 2, 3)]
    for i, draft in zip(texts, drafts, strict=True):
        row = plain.step(others[i], [30, 31][: 1 + i % 2])
        assert len(draft) == 1 + steps[i]
        for best, _ in draft:
            expected = checked_choice(row[0], others[i].length, sampling)
            assert best.token_ids[0] == expected
            row = plain.step(others[i], [expected])
        others[i].rollback(others[i].length - 1)
        assert caches[i].length == others[i].length
    for i, row in zip(texts, model.step_many([Pass(caches[i], [40]) for i in texts]), strict=True):
        close(row, plain.step(others[i], [40]))


def checked_choice(logits: torch.Tensor, position: int, sampling: Sampling) -> int:
    return verify(TokenTree(), logits[None], position, sampling).next_token


def test_rows_go_from_one_session_to_the_next() -> None:
    model = engine(sessions=2)
    expected = model.step(model.new_cache(64), PROMPT)
    gc.collect()
    caches = [model.new_cache(64) for _ in range(3)]
    assert [(cache.pool is caches[0].pool, cache.row) for cache in caches] == [(True, 0), (True, 1), (False, 0)]
    model.step(caches[0], [99] * 40)
    caches[0] = None
    gc.collect()
    again = model.new_cache(60)
    assert (again.pool, again.row) == (caches[1].pool, 0)
    assert torch.equal(model.step(again, PROMPT), expected)


@pytest.mark.parametrize("capacity", [10, 255, 256, 900, 1023, 1024, 2048, 5000, 8192])
def test_a_row_holds_its_tokens_and_a_slot_of_padding(capacity: int) -> None:
    pool = engine(sessions=1).new_cache(capacity).pool
    assert capacity < pool.blocks * pool.block <= 1.13 * capacity + 320
    assert pool.views[-1] == (pool.blocks, pool.block)
    for end in range(1, capacity + 1):
        blocks, seen = pool.view(end)
        assert end <= blocks * seen <= max(2 * end, gpu_cache.FEWEST, 2 * pool.block)
        assert blocks == 1 or seen == pool.block


# ---- what a recorded pass may do


class OnDevice(TorchDispatchMode):
    """Refuses operations between the host and the device; on `meta` none can read a value either."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves((args, kwargs, out)):
            assert not isinstance(each, torch.Tensor) or each.device.type == "meta", f"{func} uses the host"
        return out


def test_a_pass_never_waits_for_the_host() -> None:
    """As capture demands: no value is read, nothing is copied from or to the host after the warm-up."""
    model = GpuLM(CausalLM(make_tiny_model("qwen3-mixed").to("meta")), sessions=2)
    first, second = model.new_cache(100), model.new_cache(100)
    second.tap((2, 0))
    drafting = GpuHead(HiddenStatesHead(head().module.to("meta")))
    third, states = drafting.new_cache(100), torch.zeros(8, drafting.state_size)
    targets = torch.arange(VOCAB, device="meta")
    groups = [
        [Pass(first, PROMPT * 8)],
        [Pass(first, [5, 6], TREE), Pass(second, [5])],
        [Pass(second, [5], TREE, then=Walk(GREEDY))],
        *([Pass(first, [5], TREE, then=Walk(s)), Pass(second, [5], TREE, then=Walk(s))] for s in SAMPLINGS),
        *([Pass(first, [5], then=Propose(s, VOCAB, None, 3))] for s in [*SAMPLINGS, DRAWN]),
        *([Pass(first, [5], then=Propose(s, 99, targets, 1))] for s in [*SAMPLINGS, DRAWN]),
        [Pass(third, PROMPT[:8], then=Propose(GREEDY, 99, targets, 2), states=states)],
        [Pass(third, (), TREE, 3, then=Propose(GREEDY, 99, targets))],
    ]
    third.length = 20
    for passes in groups:
        lm = drafting if passes[0].cache is third else model
        program = gpu_passes.Program(lm.runtime, passes[0].cache.pool, lm._shape(passes), passes[0])
        program._pass(lm.runtime.plain)  # the warm-up makes constants
        with OnDevice():
            program._pass(lm.runtime.plain)


def test_compiled_then_recorded_then_as_it_is(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, calls = Recorder(torch.device("cpu"), compiles=True), []

    def broken() -> None:
        raise RuntimeError("no compiler")

    assert recorder.recorded(lambda: None, compiled := lambda: calls.append("compiled")) is compiled
    run = recorder.recorded(lambda: calls.append("plain"), broken)
    run()
    assert "a pass is not compiled, and so slower: RuntimeError: no compiler" in caplog.text
    recorder.records = True
    monkeypatch.setattr(recorder, "_captured", lambda run: calls.append("recorded") or run)
    torch.use_deterministic_algorithms(True, warn_only=True)
    recorder.recorded(run)()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(recorder, "_captured", lambda run: broken())
    recorder.recorded(run)()
    assert "a pass is not recorded as CUDA graphs, and so slower: RuntimeError: no compiler" in caplog.text
    assert calls == ["compiled", "plain", "recorded", "plain", "plain"]
    assert (recorder.compiles, recorder.records) == (False, True)  # another kind of pass may be recorded
    never = Recorder(torch.device("cpu"))
    never.records = True
    monkeypatch.setattr(never, "_captured", lambda run: broken())
    never.recorded(run)()
    assert not never.records
    monkeypatch.setattr(recorder, "_captured", lambda run: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        recorder.recorded(run)


@pytest.mark.parametrize("drafts", [True, False])
def test_passes_are_recorded_before_the_first_request(
    drafts: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    model, recorded = engine(), []
    model.runtime.recorder.records = True
    monkeypatch.setattr(model.runtime.recorder, "_captured", lambda run: recorded.append(run) or run)
    model.prepare(600, 3, drafts=drafts)
    cache = model.new_cache(600)
    assert (cache.pool.rows, cache.row, cache.pool.views) == (3, 0, [(1, 256), (1, 832)])
    assert len(recorded) == 2
    assert "recording passes: 2 of 2" in caplog.text
    assert "passes were recorded in " in caplog.text
    again = engine()
    assert torch.equal(model.step(cache, PROMPT), again.step(again.new_cache(600), PROMPT))  # nothing of it is left
    for length in (11, 300):
        cache.length = length
        model.step(cache, [5, 6], then=Propose(GREEDY, VOCAB, steps=1) if drafts else Walk(GREEDY))
    assert len(recorded) == 3  # but for that of the prompt they were


def test_passes_of_a_head_are_recorded_before_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    model, recorded = GpuHead(head()), []
    model.runtime.recorder.records = True
    monkeypatch.setattr(model.runtime.recorder, "_captured", lambda run: recorded.append(run) or run)
    model.prepare(200, 2, drafts=True)
    cache, states = model.new_cache(200), torch.randn(6, model.state_size)
    assert (cache.length, cache.pool.rows, len(recorded)) == (0, 2, 1)
    for count in (1, 5, 6):  # however many were accepted
        cache.length = 11
        model.step(cache, PROMPT[:count], then=Propose(GREEDY, VOCAB, steps=1), states=states[:count])
    assert len(recorded) == 1


@pytest.mark.slow
def test_compiled_passes_are_those_that_are_not() -> None:
    plain, fast = engine("qwen3-mixed", sessions=1), engine("qwen3-mixed", sessions=1, compiles=True)
    for drafts in (True, False):
        fast.prepare(100, 1, drafts=drafts)
    assert fast.runtime.recorder.compiles
    results = []
    for model in (plain, fast):
        cache = model.new_cache(100)
        model.step(cache, PROMPT[:9])
        draft = [
            best.token_ids[0] for best, _ in model.step(cache, PROMPT[9:], then=Propose(SAMPLINGS[1], VOCAB, None, 5))
        ]
        cache.rollback(len(PROMPT))
        tree = TokenTree([draft[0], 3, draft[1]], [-1, -1, 0], [-1.0] * 3)
        results.append(
            (draft, model.step(cache, [3], tree, then=Walk(SAMPLINGS[1])), cache.length, model.step(cache, [4, 5]))
        )
    assert results[0][:3] == results[1][:3]
    close(results[1][3], results[0][3])
    source, drafts = head(), []
    given = torch.randn(len(PROMPT), source.state_size)
    for compiles in (False, True):
        drafting = GpuHead(source, sessions=1, compiles=compiles)
        drafting.prepare(100, 1, drafts=True)
        assert drafting.runtime.recorder.compiles == compiles
        chain = drafting.step(drafting.new_cache(100), PROMPT, then=Propose(GREEDY, VOCAB, steps=5), states=given)
        drafts.append([best.token_ids[0] for best, _ in chain])
    assert drafts[0] == drafts[1]


# ---- the choice of the engine


def test_models_that_it_runs(tiny_model_folder: Any) -> None:
    assert unsuitable(CausalLM(make_tiny_model("llama"))) is None
    assert unsuitable(CausalLM(make_tiny_model("gpt2"))) is not None
    config = TargetWorkerConfig(model=tiny_model_folder("llama"), engine="graphs", device="cpu", port=0)
    assert type(loading.load_model(*resolve_model(config.model), config)[0]) is GpuLM
    config = TargetWorkerConfig(model=tiny_model_folder("llama"), engine="graphs", device="cpu", dtype="int8", port=0)
    assert type(loading.load_model(*resolve_model(config.model), config)[0]).__name__ == "GraphLM"
