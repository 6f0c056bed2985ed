"""The CPU engine for Llama-type models: the logits of transformers, the same bits whatever shares a pass."""

from __future__ import annotations

import math
import resource
import threading
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from specsplit.decoding.sampling import GREEDY
from specsplit.decoding.tree import TokenTree
from specsplit.engines import loading, numba
from specsplit.engines.numba import CHUNK, FusedCache, FusedLM, unsuitable
from specsplit.engines.numba_kernels import _meet, await_start, choose, start_others
from specsplit.engines.numba_team import Team
from specsplit.engines.passes import Pass, Propose
from specsplit.engines.quantise import quantise_linears
from specsplit.engines.transformers import CausalLM
from specsplit.engines.vector_kernels import processor_lacks
from specsplit.errors import UserError
from specsplit.models.sources import resolve_model
from specsplit.settings.worker import DraftWorkerConfig, TargetWorkerConfig

from tiny_models import SMALL, make_tiny_model, random_model

PROMPT = [5, 9, 33, 71, 12, 90, 44, 8, 101, 63, 27]
TREE = TokenTree([5, 6, 7, 8, 9], [-1, -1, 0, 1, 3], [-1.0] * 5)
PATHS = [[], [5], [6], [5, 7], [6, 8], [6, 8, 9]]
FUSED = ("llama", "qwen2", "qwen3", "qwen3-mixed", "mistral")
DTYPES = ("float32", "bfloat16", "int8")


def wide_model(layers: int = 2) -> CausalLM:
    """Sizes with remainders everywhere: no multiple of the rows that are computed at a time; untied output head."""
    torch.manual_seed(3)
    sizes = {**SMALL, "hidden_size": 48, "intermediate_size": 112, "vocab_size": 131, "num_hidden_layers": layers}
    return CausalLM(random_model(transformers.LlamaConfig(**sizes, tie_word_embeddings=False)))


def in_type(dtype: str) -> CausalLM:
    model = wide_model()
    if dtype != "float32":
        model.model.to(torch.bfloat16)
    if dtype == "int8":
        quantise_linears(model.model)
    return CausalLM(model.model)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("architecture", FUSED)
def test_logits_are_those_of_transformers(architecture: str, threads: int) -> None:
    model = make_tiny_model(architecture)
    ours = FusedLM(CausalLM(make_tiny_model(architecture)), threads)
    cache = ours.new_cache(64)
    ours.step(cache, PROMPT[:7])
    found = ours.step(cache, PROMPT[7:], TREE)
    with torch.inference_mode():
        for row, path in zip(found, PATHS, strict=True):
            expected = model(torch.tensor([PROMPT + path])).logits[0, -1]
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 1e4,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_position_embeddings(rope: dict) -> None:
    def config() -> transformers.LlamaConfig:
        return transformers.LlamaConfig(**SMALL, rope_parameters=dict(rope))

    model, ours = random_model(config()), FusedLM(CausalLM(random_model(config())), 1)
    tokens = list(range(10, 58))
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0, -1]
    torch.testing.assert_close(ours.step(ours.new_cache(64), tokens)[0], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_types_of_weights(dtype: str) -> None:
    """Against transformers in float32 with the very weights that are stored, rounded as they are."""
    stored = in_type(dtype)
    exact = wide_model().model
    with torch.no_grad():
        for name, module in exact.named_modules():
            other = stored.model.get_submodule(name)
            if hasattr(other, "scale"):
                module.weight.copy_(other.weight.float() * other.scale.float()[:, None])
            elif getattr(module, "weight", None) is not None:
                module.weight.copy_(other.weight.float())
        expected = exact(torch.tensor([PROMPT])).logits[0, -1]
    ours = FusedLM(stored, 2)
    torch.testing.assert_close(ours.step(ours.new_cache(32), PROMPT)[0], expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_whatever_shares_the_pass(dtype: str, threads: int) -> None:
    ours = FusedLM(in_type(dtype), threads)
    tokens = [3 + 7 * i % 120 for i in range(90)]

    def cached(count: int):
        cache = ours.new_cache(128)
        ours.step(cache, tokens[:count])
        return cache

    cache = ours.new_cache(128)
    alone = [ours.step(cache, [token])[0] for token in tokens]
    assert torch.equal(ours.step(ours.new_cache(128), tokens)[0], alone[-1])  # in chunks of CHUNK
    assert len(tokens) > CHUNK
    for count in (1, 2, 3, 4, 5, 8, 13):
        rows = ours.step(cached(70), tokens[70:71], TokenTree.chain(tokens[71 : 70 + count]))
        assert all(torch.equal(a, b) for a, b in zip(rows, alone[70 : 70 + count], strict=True)), count
    branches = TokenTree([9, tokens[21], 4, tokens[22], 8, tokens[23]], [-1, -1, 0, 1, 2, 3], [-1.0] * 6)
    rows = ours.step(cached(20), tokens[20:21], branches)
    assert all(torch.equal(rows[row], alone[at]) for row, at in ((0, 20), (2, 21), (4, 22), (6, 23)))
    passes = [Pass(cached(n), tokens[n : n + 1], TokenTree.chain(tokens[n + 1 : n + 6])) for n in (1, 30, 50, 84)]
    prompt = Pass(ours.new_cache(96), tokens[:80])
    for p, rows in zip([*passes, prompt], ours.step_many([*passes, prompt]), strict=True):
        last = p.cache.length
        assert all(torch.equal(a, b) for a, b in zip(rows, alone[last - len(rows) : last], strict=True))


def test_a_chain_ends_where_its_path_is_too_improbable() -> None:
    ours = FusedLM(wide_model(), 1)
    texts = [PROMPT, PROMPT[:4]]

    def chains(*leasts: float) -> tuple[list[list[Any]], list[int]]:
        caches = [ours.new_cache(64) for _ in leasts]
        steps = zip(caches, texts, leasts, strict=True)
        found = ours.step_many([Pass(c, t, then=Propose(GREEDY, 131, steps=6, least=least)) for c, t, least in steps])
        return found, [cache.length for cache in caches]

    whole, _ = chains(-math.inf, -math.inf)
    sums = [list(accumulate(best.log_probs[0] for best, _ in rows)) for rows in whole]
    found, lengths = chains(sums[0][2], sums[1][0] + 1e-3)  # three tokens are probable enough; none
    assert found == [whole[0][:4], whole[1][:1]]
    assert lengths == [len(PROMPT) + 3, 4]


def test_a_processor_that_lacks_instructions_gets_another_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = "+sse4.2,+avx,+avx2,+fma,+f16c"
    assert processor_lacks("x86_64", whole) is None
    assert processor_lacks("aarch64", "+neon") is None
    assert processor_lacks("AMD64", whole.replace(",+f16c", "")) == "this processor has no f16c"
    assert processor_lacks("x86_64", "+sse4.2,+avx") == "this processor has no avx2 and no fma and no f16c"
    monkeypatch.setattr(numba.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(numba, "FEATURES", "+sse4.2")
    assert "no avx2" in str(unsuitable(wide_model()))


def keys(cache: FusedCache) -> np.ndarray:
    """[layers, heads, slots, head_dim]"""
    layers, heads, _, dim, _ = cache.keys.shape
    return cache.keys.swapaxes(3, 4).reshape(layers, heads, -1, dim)


def test_a_kept_path_is_moved_into_place() -> None:
    ours = FusedLM(wide_model(), 1)
    cache, fresh = ours.new_cache(32), ours.new_cache(32)
    ours.step(cache, PROMPT, TREE)
    cache.keep(len(PROMPT), [1, 3, 4])
    ours.step(fresh, [*PROMPT, 6, 8, 9])
    held = slice(0, len(PROMPT) + 3)
    assert cache.length == fresh.length == held.stop
    assert (keys(cache)[:, :, held] == keys(fresh)[:, :, held]).all()
    assert (cache.values[:, :, held] == fresh.values[:, :, held]).all()
    assert cache.nbytes() == 2 * 2 * 2 * 32 * 8 * 4  # keys and values, layers, heads, slots, numbers, bytes


def test_a_pass_that_does_not_fit_changes_nothing() -> None:
    ours = FusedLM(wide_model(), 1)
    cache = ours.new_cache(8)
    ours.step(cache, PROMPT[:6])
    for tokens, message in ((PROMPT[:3], "exceed the cache of 8"), ([], "at least one token")):
        with pytest.raises(ValueError, match=message):
            ours.step(cache, tokens)
    assert cache.length == 6


@pytest.mark.parametrize("token", [-1, 131, 1 << 40])
def test_what_is_no_token_is_not_read(token: int) -> None:
    ours = FusedLM(wide_model(), 1)
    cache = ours.new_cache(16)
    with pytest.raises(IndexError, match="in an embedding of 131"):
        ours.step(cache, [5, token])
    assert cache.length == 0


def team_of(job: Callable[..., None]) -> Team:
    """Three threads that do a job written in Python."""

    def begun(thread: int, threads: int, sync: np.ndarray, *arguments: Any) -> None:
        if thread == 0:
            start_others(sync, threads)
        job(thread, threads, sync, *arguments)
        _meet(sync, threads)

    def follow(thread: int, threads: int, sync: np.ndarray, *arguments: Any) -> None:
        starts = 0
        while await_start(sync, starts):
            begun(thread, threads, sync, *arguments)
            starts += 1

    return Team(3, begun, follow)


def test_a_team_does_every_part_of_every_job() -> None:
    seen: list[tuple[int, int, int]] = []
    team = team_of(lambda thread, threads, sync, number: seen.append((number, thread, threads)))
    for number in range(20):
        arguments = (number,)
        for _ in range(1 + number % 3):  # the others get the arguments once
            team.run(arguments)
    expected = [(number, thread, 3) for number in range(20) for _ in range(1 + number % 3) for thread in range(3)]
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("failing", [{0}, {1}, {2}, {0, 2}])
@pytest.mark.parametrize("meetings", [0, 3])
def test_an_error_in_one_thread_ends_the_job_in_all(failing: set[int], meetings: int) -> None:
    met: list[int] = []

    def job(thread: int, threads: int, sync: np.ndarray, fails: bool) -> None:
        for _ in range(meetings):
            _meet(sync, threads)
        if fails and thread in failing:
            raise ZeroDivisionError(f"in thread {thread}")
        for _ in range(50):
            _meet(sync, threads)
        if not fails:
            met.append(thread)

    team = team_of(job)
    for number in range(1, 4):
        with pytest.raises(ZeroDivisionError, match="in thread"):
            team.run((True,))
        team.run((False,))
        assert sorted(met) == sorted([0, 1, 2] * number)


def test_a_team_that_is_gone_leaves_no_threads() -> None:
    before = set(threading.enumerate())
    team = team_of(lambda *_: None)
    team.run(())
    own = set(threading.enumerate()) - before  # those of other teams may end meanwhile
    assert len(own) == 2
    del team
    for thread in own:
        thread.join(30)
        assert not thread.is_alive()


def test_a_thread_that_comes_late_is_waited_for_asleep() -> None:
    slept: dict[int, int] = {}

    def job(thread: int, threads: int, sync: np.ndarray) -> None:
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        if thread == 1:
            time.sleep(0.5)
        _meet(sync, threads)
        slept[thread] = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before

    team_of(job).run(())
    assert slept[0] >= 1  # it gave up its core by itself


@pytest.mark.parametrize("row", [
    [1.0, 3.0, 2.0, 3.0], [-math.inf, 2.0, -math.inf, 1.0], [-math.inf] * 4, [1.0, math.nan, 9.0, 0.0],
    [0.0, math.inf, 1.0, 2.0], [0.0, -math.inf, -1e30, 3e38],
])  # fmt: skip
@pytest.mark.parametrize("most", [1, 3, 16])
def test_choices_are_those_of_torch(row: list[float], most: int) -> None:
    tokens, values = np.zeros(16, np.int64), np.zeros(16, np.float32)
    choose(np.array(row, np.float32), most, tokens, values)
    logits = torch.tensor(row)
    if not bool((logits < math.inf).all()):
        assert math.isnan(values[0])
        return
    expected = (logits if most == 1 else logits.log_softmax(-1)).tolist()
    order = sorted(range(4), key=lambda token: (-row[token], token))[:most]
    possible = [token for token in order if row[token] > -math.inf]
    assert tokens[: len(possible)].tolist() == possible
    assert values[: len(possible)].tolist() == pytest.approx([expected[token] for token in possible], abs=1e-5)
    assert all(value == -math.inf for value in values[len(possible) : most])


def no_rotary_limit() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: make_tiny_model("gpt2"), "GPT2LMHeadModel is none of"),
        (lambda: make_tiny_model("llama").half(), "its type is torch.float16"),
        (lambda: random_model(no_rotary_limit()), "position embedding is dynamic"),
        (lambda: random_model(transformers.LlamaConfig(**SMALL, hidden_act="gelu")), "activation is gelu"),
        (lambda: random_model(transformers.LlamaConfig(**SMALL, attention_bias=True)), "biases outside"),
        (lambda: random_model(transformers.LlamaConfig(**SMALL, mlp_bias=True)), "biases outside"),
    ],
)
def test_what_it_cannot_run_is_said(model, reason: str) -> None:
    causal = CausalLM(model())
    assert reason in str(unsuitable(causal))
    with pytest.raises(ValueError, match=reason):
        FusedLM(causal, 1)


@pytest.mark.parametrize(
    ("architecture", "engine", "kind"),
    [
        ("llama", "auto", FusedLM),
        ("llama", "fused", FusedLM),
        ("llama", "transformers", CausalLM),
        ("gpt2", "auto", CausalLM),
    ],
)
def test_the_engine_is_chosen(tiny_model_folder, architecture: str, engine: str, kind: type) -> None:
    config = TargetWorkerConfig(model=tiny_model_folder(architecture), engine=engine, port=0)
    model, identity = loading.load_model(*resolve_model(config.model), config, 1)
    assert type(model) is kind
    assert identity["parameters"] == sum(p.numel() for p in make_tiny_model(architecture).parameters())


def test_an_engine_that_cannot_run_the_model_is_refused(tiny_model_folder) -> None:
    config = TargetWorkerConfig(model=tiny_model_folder("gpt2"), engine="fused", port=0)
    with pytest.raises(UserError, match=r"engine fused cannot run .*GPT2LMHeadModel.*Use engine auto"):
        loading.load_model(*resolve_model(config.model), config, 1)


def test_an_engine_with_other_logits_is_refused(tiny_model_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    step = FusedLM.step
    monkeypatch.setattr(FusedLM, "step", lambda *args: step(*args).flip(-1))
    config = TargetWorkerConfig(model=tiny_model_folder("llama"), port=0)
    with pytest.raises(UserError, match="use engine transformers"):
        loading.load_model(*resolve_model(config.model), config, 1)


def test_drafts_made_of_the_target(tiny_model_folder) -> None:
    """Layers left out and int8 weights, in this engine as in the other."""
    folder: Path = tiny_model_folder("llama")
    for settings in ({"skip_layers": [1], "dtype": "float32"}, {"dtype": "int8"}):
        config = DraftWorkerConfig(model=folder, port=0, **settings)
        ours, _ = loading.load_model(*resolve_model(folder), config, 1)
        assert type(ours) is FusedLM
        theirs = CausalLM.load(folder, **settings)
        found = ours.step(ours.new_cache(32), PROMPT, TREE)
        expected = theirs.step(theirs.new_cache(32), PROMPT, TREE).float()
        assert torch.cosine_similarity(found, expected).min() > 0.99
