"""The loop over streams, in every mode: the text is the target's own, whatever is guessed and whatever goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import pytest

from specsplit.client import recovery
from specsplit.client.event_loop import event_loop
from specsplit.client.pipeline import run_speculative_loop_async
from specsplit.client.result import LINK_BYTES, SpeculativeResult
from specsplit.client.writer import TextWriter
from specsplit.errors import WorkerError
from specsplit.models.sources import prepare_model
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.rpc.v1 import specsplit_pb2_grpc as pb_grpc
from specsplit.settings.run import OrchestratorConfig

from grpc_fixtures import PROMPTS, Reference, Worker, noisy_copy, serving
from waiting import wait_until

PROMPT = PROMPTS[0]
LENGTH = 24
MODES = ("sync", "overlap", "lookahead")
TREES = ("chain", "3x2", "dynamic-12x3")
AHEAD = MODES[1:]


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(recovery, "LAST_CHANCE_S", 0.2)


def write(
    draft: Worker | None, target: Worker, prompt: list[int] = PROMPT, *, on_tokens: Any = None, **settings: Any
) -> SpeculativeResult:
    config = OrchestratorConfig(**{"gamma": 4, "max_output_tokens": LENGTH, "ignore_eos": True, **settings})
    with TextWriter(draft.address if draft else None, target.address) as writer:
        return writer.write(prompt, config, on_tokens=on_tokens)


@contextmanager
def noisy_pair(folder: Path, copy: Path) -> Iterator[tuple[Worker, Worker, Reference]]:
    """The model of `folder` as target, and a draft that agrees with it some of the time."""
    noisy_copy(folder, copy, noise=0.05)
    with serving("draft", copy) as draft, serving("target", folder) as target:
        yield draft, target, Reference(folder)


@pytest.fixture(scope="module")
def pair(
    tiny_model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Worker, Worker, Reference]]:
    with noisy_pair(tiny_model_folder("llama"), tmp_path_factory.mktemp("draft")) as made:
        yield made


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Worker, Worker]]:
    """A target slow enough that drafts ahead are ready, and a draft that is right four times of five."""
    folder = tmp_path_factory.mktemp("simulated")
    for name, settings in {"draft": {"acceptance": 0.8, "step_ms": 0.1}, "target": {"step_ms": 15.0}}.items():
        prepare_model({"source": "synthetic", **settings}, name, folder / name)
    with (
        serving("draft", folder / "draft", max_context=1024) as draft,
        serving("target", folder / "target", max_context=1024) as target,
    ):
        yield draft, target


@pytest.fixture(scope="module")
def alone(simulated: tuple[Worker, Worker]) -> Callable[[float], list[int]]:
    """The 80 tokens that the simulated target writes alone at a temperature."""

    @cache
    def text(temperature: float) -> list[int]:
        return write(None, simulated[1], gamma=0, max_output_tokens=80, temperature=temperature).output_tokens

    return text


# ---- the text


def check_text(pair: tuple[Worker, Worker, Reference], temperature: float) -> None:
    draft, target, reference = pair
    settings = {"temperature": temperature, "seed": 5}
    expected = write(None, target, gamma=0, **settings).output_tokens
    assert len(expected) == LENGTH
    if not temperature:
        assert expected == reference.text(PROMPT, LENGTH)
    accepted = drafted = 0
    with TextWriter(draft.address, target.address) as writer:
        for mode in MODES:
            for tree in TREES:
                for gamma in (1, 5):
                    config = OrchestratorConfig(
                        mode=mode,
                        tree=tree,
                        gamma=gamma,
                        max_output_tokens=LENGTH,
                        ignore_eos=True,
                        **settings,
                    )
                    result = writer.write(PROMPT, config)
                    assert result.output_tokens == expected, (mode, tree, gamma)
                    accepted += sum(r.accepted for r in result.rounds)
                    drafted += sum(r.drafted for r in result.rounds)
    assert 0.1 < accepted / drafted < 0.95  # else little was proved
    assert wait_until(lambda: len(target.servicer.sessions) == len(draft.servicer.sessions) == 0)


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_the_text_is_that_of_the_target_alone(pair: tuple[Worker, Worker, Reference], temperature: float) -> None:
    check_text(pair, temperature)


@pytest.mark.parametrize(("architecture", "temperature"), [("gpt2", 0), ("qwen3", 0.7)])
def test_the_text_is_that_of_a_target_of_another_architecture(
    tiny_model_folder: Callable[..., Path], tmp_path: Path, architecture: str, temperature: float
) -> None:
    """More of them in test_engines.py: the streams know no architecture."""
    with noisy_pair(tiny_model_folder(architecture), tmp_path / "draft") as made:
        check_text(made, temperature)


def test_seed_and_temperature_decide_the_text(pair: tuple[Worker, Worker, Reference]) -> None:
    draft, target, _ = pair
    texts = [
        tuple(write(draft, target, temperature=t, seed=s).output_tokens)
        for t, s in [(1.0, 1), (1.0, 2), (0.7, 1), (0, 1), (0, 2)]
    ]
    assert len(set(texts[:4])) == 4
    assert texts[3] == texts[4]


@pytest.mark.parametrize("tree", ["chain", "2x2"])
@pytest.mark.parametrize("mode", MODES)
def test_rejection_sampling_is_reproducible_and_drafts_are_accepted(
    pair: tuple[Worker, Worker, Reference], mode: str, tree: str
) -> None:
    draft, target, _ = pair
    settings = {"mode": mode, "tree": tree, "sampling": "rejection", "temperature": 1.0}
    first = write(draft, target, seed=3, **settings)
    assert write(draft, target, seed=3, **settings).output_tokens == first.output_tokens
    assert write(draft, target, seed=4, **settings).output_tokens != first.output_tokens
    assert sum(r.accepted for r in first.rounds) > 0


@pytest.mark.parametrize("has_draft", [True, False])
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_with_prompt_lookup_the_text_is_that_of_the_target_alone(
    pair: tuple[Worker, Worker, Reference], temperature: float, has_draft: bool
) -> None:
    draft, target, _ = pair
    settings = {"temperature": temperature, "seed": 5, "max_output_tokens": 48, "max_context": 120}
    prompt = PROMPT * 3
    expected = write(None, target, prompt, gamma=0, **settings).output_tokens
    rounds = []
    with TextWriter(draft.address if has_draft else None, target.address) as writer:
        for mode in MODES:
            for gamma in (1, 4, "auto"):
                more = {"mode": mode, "gamma": gamma, "lookup": 1, "ignore_eos": True}
                result = writer.write(prompt, OrchestratorConfig(**settings, **more))
                assert result.output_tokens == expected, (mode, gamma)
                rounds += result.rounds
    looked_up = [r for r in rounds if r.draft_source == "lookup"]
    assert len(looked_up) > 20
    assert all(r.draft_compute_ms == 0 and r.drafted for r in looked_up)
    assert any(r.draft_source == "model" for r in rounds) == has_draft


def test_rejection_sampling_with_prompt_lookup_is_reproducible(pair: tuple[Worker, Worker, Reference]) -> None:
    draft, target, _ = pair
    settings = {"sampling": "rejection", "temperature": 1.0, "lookup": 1, "seed": 3}
    first = write(draft, target, PROMPT * 3, **settings)
    assert write(draft, target, PROMPT * 3, **settings).output_tokens == first.output_tokens
    assert {"lookup", "model"} <= {r.draft_source for r in first.rounds}


def test_top_k_of_one_is_greedy(pair: tuple[Worker, Worker, Reference]) -> None:
    draft, target, reference = pair
    for sampling in ("coupled", "rejection"):
        result = write(draft, target, temperature=1.5, top_k=1, sampling=sampling)
        assert result.output_tokens == reference.text(PROMPT, LENGTH)


@pytest.mark.parametrize(("tree", "temperature"), [("chain", 0), ("3x2", 0.7), ("dynamic-12x3", 0.7)])
@pytest.mark.parametrize("mode", AHEAD)
def test_guesses_come_true_and_fail_and_change_nothing(
    simulated: tuple[Worker, Worker], alone: Callable[[float], list[int]], mode: str, tree: str, temperature: float
) -> None:
    settings = {"max_output_tokens": 80, "temperature": temperature, "tree": tree}
    result = write(*simulated, mode=mode, gamma=2, **settings)
    assert result.output_tokens == alone(temperature)
    assert result.rounds[0].speculation == "none"
    assert result.speculation_hits > 0
    assert result.speculation_misses > 0 or mode == "lookahead"
    assert result.speculation_hits + result.speculation_misses >= len(result.rounds) - 2
    hits = [r for r in result.rounds if r.speculation == "hit"]
    assert all(r.draft_wall_ms == 0 for r in hits)
    assert all(r.draft_compute_ms > 0 for r in hits)


def test_lookahead_foresees_more_than_overlap(simulated: tuple[Worker, Worker]) -> None:
    draft, target = simulated
    rates = []
    for settings in ({"mode": "overlap"}, {"mode": "lookahead", "fan_out": 1}, {"mode": "lookahead", "fan_out": 12}):
        result = write(draft, target, max_output_tokens=150, gamma=3, **settings)
        rates.append(result.speculation_hits / (result.speculation_hits + result.speculation_misses))
    # With acceptance .8: full acceptance and the next token .41; the 12 likeliest outcomes .96.
    assert rates[0] < 0.65
    assert rates[2] > 0.8
    assert rates[2] > rates[1]


@pytest.mark.parametrize("mode", MODES)
def test_a_simulated_network_delays_and_changes_nothing(simulated: tuple[Worker, Worker], mode: str) -> None:
    draft, target = simulated
    expected = write(draft, target, mode=mode)
    delayed = write(draft, target, mode=mode, rtt_ms=20, jitter_ms=5)
    assert delayed.output_tokens == expected.output_tokens
    assert delayed.ttft_ms is not None
    assert delayed.ttft_ms >= 20 + 15
    waited = sum(r.network_ms for r in delayed.rounds)
    assert waited >= 20 * sum(r.speculation != "hit" for r in delayed.rounds)
    if mode == "sync":
        assert all(r.verify_wall_ms >= 35 and r.network_ms >= 20 for r in delayed.rounds)


def test_a_simulated_bandwidth_delays_by_the_bytes(simulated: tuple[Worker, Worker]) -> None:
    draft, target = simulated
    prompt = PROMPT * 20
    expected = write(draft, target, prompt, max_output_tokens=4)
    narrow = write(draft, target, prompt, max_output_tokens=4, bandwidth_mbit=0.02)
    assert narrow.output_tokens == expected.output_tokens
    for r in narrow.rounds:
        assert r.network_ms >= (r.target_sent_bytes + r.target_received_bytes) * 8 / 20


def counted(channel: grpc.aio.Channel, bytes_of: dict[str, int], role: str) -> grpc.aio.Channel:
    """The channel, whose streams add up what their serializers make and their deserializers read."""
    plain = channel.stream_stream

    def stream(path: str, request_serializer: Any, response_deserializer: Any, **more: Any) -> Any:
        def write(message: Any) -> bytes:
            data: bytes = request_serializer(message)
            bytes_of[f"{role}_sent_bytes"] += len(data)
            return data

        def read(data: bytes) -> Any:
            bytes_of[f"{role}_received_bytes"] += len(data)
            return response_deserializer(data)

        return plain(path, request_serializer=write, response_deserializer=read, **more)

    channel.stream_stream = stream  # type: ignore[method-assign]
    return channel


@pytest.mark.parametrize(("mode", "gamma", "rtt_ms"), [("sync", 4, 0), ("sync", 0, 0), ("lookahead", 4, 4)])
def test_bytes_are_those_that_grpc_was_given(
    simulated: tuple[Worker, Worker], mode: str, gamma: int, rtt_ms: float
) -> None:
    expected = dict.fromkeys(LINK_BYTES, 0)
    config = OrchestratorConfig(mode=mode, gamma=gamma, rtt_ms=rtt_ms, max_output_tokens=LENGTH, ignore_eos=True)

    async def run() -> SpeculativeResult:
        addresses = {"draft": simulated[0].address, "target": simulated[1].address}
        opened = {role: grpc.aio.insecure_channel(address) for role, address in addresses.items()}
        draft, target = (counted(opened[role], expected, role) for role in ("draft", "target"))
        stubs = pb_grpc.DraftServiceStub(draft), pb_grpc.TargetServiceStub(target)
        result = await run_speculative_loop_async(*stubs, PROMPT, config)
        await asyncio.gather(*(channel.close() for channel in opened.values()))
        return result

    rounds = event_loop().run(run()).rounds
    assert {name: sum(getattr(r, name) for r in rounds) for name in LINK_BYTES} == expected
    assert all(r.target_sent_bytes > 0 and r.target_received_bytes > 0 for r in rounds) or mode == "lookahead"
    assert (expected["draft_sent_bytes"] > 0) == (gamma > 0)


# ---- where a text ends


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", [0, 1, 4, 9])
def test_an_end_of_text_ends_it_there(pair: tuple[Worker, Worker, Reference], mode: str, place: int) -> None:
    draft, target, reference = pair
    eos = reference.text(PROMPT, LENGTH)[place]
    *text, _ = reference.text(PROMPT, LENGTH, eos=eos)
    bursts: list[int] = []
    for tree in TREES:
        bursts.clear()
        result = write(
            draft, target, mode=mode, tree=tree, ignore_eos=False, stop_token_ids=[eos], on_tokens=bursts.extend
        )
        assert (result.output_tokens, result.finish_reason) == (text, "eos")
        assert bursts == text


@pytest.mark.parametrize("mode", AHEAD)
@pytest.mark.parametrize("tree", TREES)
def test_a_text_ends_at_its_limits(
    simulated: tuple[Worker, Worker], alone: Callable[[float], list[int]], mode: str, tree: str
) -> None:
    draft, target = simulated
    expected = alone(0)
    for count in (1, 2, 3, 7):
        result = write(draft, target, mode=mode, tree=tree, max_output_tokens=count)
        assert (result.output_tokens, result.finish_reason) == (expected[:count], "length")
    full = write(draft, target, mode=mode, tree=tree, max_context=40, max_output_tokens=60)
    assert (full.output_tokens, full.finish_reason) == (expected[: 40 - len(PROMPT)], "context")
    cut = write(draft, target, mode=mode, tree=tree, max_rounds=3, max_output_tokens=60)
    assert (len(cut.rounds), cut.finish_reason) == (3, "max_rounds")


@pytest.mark.parametrize("mode", AHEAD)
@pytest.mark.parametrize("tree", TREES)
def test_small_contexts_end_drafts_and_not_texts(tiny_model_folder: Callable[..., Path], mode: str, tree: str) -> None:
    folder = tiny_model_folder("llama")
    reference = Reference(folder)
    with serving("draft", folder, max_context=26) as draft, serving("target", folder, max_context=32) as target:
        result = write(draft, target, mode=mode, tree=tree, max_output_tokens=60)
    assert result.output_tokens == reference.text(PROMPT, 32 - len(PROMPT))
    assert result.finish_reason == "context"
    assert result.rounds[-1].drafted == 0


# ---- what goes wrong on the way


@pytest.mark.parametrize("role", ["draft", "target"])
@pytest.mark.parametrize(
    ("mode", "tree"), [("sync", "chain"), ("sync", "3x2"), ("overlap", "chain"), ("lookahead", "3x2")]
)
def test_a_worker_restarted_during_a_text(
    tiny_model_folder: Callable[..., Path], tmp_path: Path, mode: str, tree: str, role: str
) -> None:
    folder = tiny_model_folder("llama")
    noisy = noisy_copy(folder, tmp_path, noise=0.05)
    with serving("draft", noisy, drain_s=0.1) as draft, serving("target", folder, drain_s=0.1) as target:
        worker = draft if role == "draft" else target
        bursts: list[list[int]] = []

        def restart(tokens: list[int]) -> None:
            bursts.append(tokens)
            if len(bursts) == 3:
                worker.restart()

        result = write(draft, target, mode=mode, tree=tree, on_tokens=restart)
    assert result.output_tokens == Reference(folder).text(PROMPT, LENGTH) == [t for burst in bursts for t in burst]


@pytest.mark.parametrize("mode", MODES)
def test_sessions_evicted_during_a_text(pair: tuple[Worker, Worker, Reference], mode: str) -> None:
    draft, target, reference = pair
    bursts: list[list[int]] = []

    def evict(tokens: list[int]) -> None:
        bursts.append(tokens)
        if len(bursts) in (2, 4):
            for worker in (draft, target):
                for session_id in list(worker.servicer.sessions._sessions):
                    worker.servicer.sessions.end(session_id)

    result = write(draft, target, mode=mode, on_tokens=evict)
    assert result.output_tokens == reference.text(PROMPT, LENGTH)


@pytest.mark.parametrize("role", ["draft", "target"])
def test_a_worker_that_stays_away_is_named(tiny_model_folder: Callable[..., Path], role: str) -> None:
    folder = tiny_model_folder("llama")
    with serving("draft", folder, drain_s=0.1) as draft, serving("target", folder, drain_s=0.1) as target:
        worker = draft if role == "draft" else target
        with pytest.raises(WorkerError, match=rf"{role} worker failed in round 2: "):
            write(draft, target, on_tokens=lambda _: worker.server.stop(), recovery_timeout_s=0.3)
        with pytest.raises(WorkerError, match=f"{role} worker does not answer: UNAVAILABLE"):
            write(draft, target, recovery_timeout_s=0)


def test_a_target_that_hangs_meets_the_deadline(simulated: tuple[Worker, Worker]) -> None:
    _, target = simulated
    with pytest.raises(WorkerError, match=r"in round 1: DEADLINE_EXCEEDED: no answer within 0.005 s"):
        write(None, target, gamma=0, rpc_timeout_s=0.005, recovery_timeout_s=0.1)


# ---- the streams themselves


def test_texts_side_by_side_on_one_pair(pair: tuple[Worker, Worker, Reference]) -> None:
    draft, target, reference = pair

    async def write_all() -> list[SpeculativeResult]:
        async with (
            grpc.aio.insecure_channel(draft.address) as to_draft,
            grpc.aio.insecure_channel(target.address) as to_target,
        ):
            stubs = pb_grpc.DraftServiceStub(to_draft), pb_grpc.TargetServiceStub(to_target)
            return await asyncio.gather(
                *(
                    run_speculative_loop_async(
                        *stubs,
                        prompt,
                        OrchestratorConfig(mode=MODES[i % 3], tree=TREES[i % 2], max_output_tokens=16, ignore_eos=True),
                    )
                    for i, prompt in enumerate(PROMPTS[:6])
                )
            )

    results = event_loop().run(write_all())
    assert [r.output_tokens for r in results] == [reference.text(prompt, 16) for prompt in PROMPTS[:6]]


def test_drafts_prepared_for_another_outcome_or_round_are_ignored(pair: tuple[Worker, Worker, Reference]) -> None:
    _, target, reference = pair
    text = reference.text(PROMPT, 4)
    wrong = (text[0] + 1) % 128

    def prepared(round_number: int, token: int) -> pb.StreamVerifyRequest:
        tree = pb.TokenTree(token_ids=[text[1]], parents=[-1], log_probs=[0.0])
        outcome = pb.Outcome(next_token=token, tree=tree)
        return pb.StreamVerifyRequest(prepared=pb.Prepared(round=round_number, outcomes=[outcome]))

    first = pb.StreamVerifyRequest(
        verify=pb.VerifyDraftsRequest(context=pb.Context(session_id="p", round=1, new_tokens=PROMPT))
    )
    sent = [prepared(1, text[0]), first, prepared(1, wrong), prepared(2, text[0]), prepared(1, text[0])]
    replies = list(target.stub.StreamVerify(iter(sent), timeout=20))
    assert [(r.round, r.next_token, list(r.accepted_tokens)) for r in replies] == [
        (1, text[0], []),
        (2, text[2], [text[1]]),
    ]
    assert wait_until(lambda: not len(target.servicer.sessions))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tree_nodes": 1000, "tree_width": 1}, "tree_nodes and tree_width must be 1 to 256"),
        ({"tree_nodes": 10}, "tree_nodes and tree_width must be 1 to 256"),
        ({"ahead": pb.Ahead(fan_out=65)}, "fan_out is at most 64"),
        ({"ahead": pb.Ahead(fan_out=1, max_draft_tokens=65)}, "max_draft_tokens at most 64"),
    ],
)
def test_impossible_wishes_are_refused(
    pair: tuple[Worker, Worker, Reference], fields: dict[str, Any], reason: str
) -> None:
    draft, _, _ = pair
    request = pb.GenerateDraftsRequest(
        context=pb.Context(session_id="x", round=1, new_tokens=[5]), max_draft_tokens=2, **fields
    )
    for call in (draft.stub.GenerateDrafts, lambda r, **k: next(draft.stub.StreamDrafts(iter([r]), **k))):
        with pytest.raises(grpc.RpcError) as caught:
            call(request, timeout=20)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert reason in caught.value.details()
