"""A head that reads the target's hidden states, over the wire: whatever is sent, lost or wrong, the text is the
target's own, and the head is right as often as beside its target."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

import specsplit
from specsplit.client import recovery, states
from specsplit.client.event_loop import event_loop
from specsplit.client.pipeline import run_speculative_loop_async
from specsplit.client.result import SpeculativeResult
from specsplit.client.states import check_states
from specsplit.client.writer import TextWriter
from specsplit.decoding.growth import DraftSettings
from specsplit.decoding.loop import speculate
from specsplit.engines.hidden_states import HiddenStatesHead
from specsplit.engines.numba import FusedLM
from specsplit.engines.numba_head import FusedHead
from specsplit.engines.transformers import CausalLM
from specsplit.errors import UserError
from specsplit.rpc.hidden_states import FORMS, pack_states
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.rpc.v1 import specsplit_pb2_grpc as pb_grpc
from specsplit.settings.run import OrchestratorConfig
from specsplit.worker.states import Wanted
from tiny_heads import make_tiny_head, save_tiny_head

from grpc_fixtures import PROMPTS, Reference, Worker, draft_request, serving, verify_request
from tiny_models import make_tokenizer
from waiting import wait_until

LENGTH = 24
MODES = ("sync", "overlap", "lookahead")
TREES = ("chain", "3x2", "dynamic-12x3")
WIDTH = 32  # of a hidden state; three are joined
EXACT = {"hidden_states_form": "float32"}


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(recovery, "LAST_CHANCE_S", 0.2)


@pytest.fixture(scope="module")
def folders(tiny_model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target, and a head that knows what it writes after PROMPTS."""
    target = tiny_model_folder("llama")
    reference = Reference(target)
    texts = [prompt + reference.text(prompt, LENGTH + 5 - len(prompt)) for prompt in PROMPTS]
    head = make_tiny_head(reference.model, texts)
    return {"target": target, "head": save_tiny_head(head, tmp_path_factory.mktemp("head"), make_tokenizer())}


@pytest.fixture(scope="module")
def pair(folders: dict[str, Path]) -> Iterator[tuple[Worker, Worker]]:
    with (
        serving("draft", folders["head"], drain_s=0.1) as draft,
        serving("target", folders["target"], hidden_states_draft=folders["head"], drain_s=0.1) as target,
    ):
        yield draft, target


@pytest.fixture(scope="module")
def texts(folders: dict[str, Path]) -> list[list[int]]:
    """What the target writes."""
    reference = Reference(folders["target"])
    return [reference.text(prompt, LENGTH) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def accepted(folders: dict[str, Path]) -> list[int]:
    """Of each prompt, the drafted tokens that are right beside the target."""
    target = FusedLM(CausalLM.load(folders["target"]), 1)
    head = FusedHead(HiddenStatesHead.load(folders["head"]), 1)
    texts = (speculate(target, head, prompt, DraftSettings(3), max_new_tokens=LENGTH) for prompt in PROMPTS)
    return [sum(r.accepted for r in rounds) for rounds in texts]


def write(pair: tuple[Worker, Worker], prompt: list[int], *, on_tokens: Any = None, **settings: Any) -> Any:
    config = OrchestratorConfig(**{"gamma": 3, "max_output_tokens": LENGTH, "ignore_eos": True, **settings})
    with TextWriter(pair[0].address, pair[1].address) as writer:
        return writer.write(prompt, config, on_tokens=on_tokens)


def right(result: SpeculativeResult) -> int:
    return sum(r.accepted for r in result.rounds)


# ---- what is sent


@pytest.mark.parametrize("project", ["draft", "target"])
def test_the_head_is_as_often_right_as_beside_its_target(pair: Any, texts: Any, accepted: Any, project: str) -> None:
    assert sum(accepted) > 60
    for prompt, text, expected in zip(PROMPTS, texts, accepted, strict=True):
        result = write(pair, prompt, hidden_states_project=project, **EXACT)
        assert (result.output_tokens, right(result)) == (text, expected)
        assert not result.rounds[0].drafted
        assert all(r.drafted for r in result.rounds[1:-1])


def test_both_in_the_engine_for_gpus(folders: dict[str, Path], texts: Any, accepted: Any) -> None:
    """They give and read the same states."""
    with (
        serving("draft", folders["head"], engine="graphs") as draft,
        serving("target", folders["target"], engine="graphs") as target,
    ):
        for prompt, text, expected in zip(PROMPTS, texts, accepted, strict=True):
            result = write((draft, target), prompt, **EXACT)
            assert (result.output_tokens, right(result)) == (text, expected)
        result = write((draft, target), PROMPTS[0], mode="lookahead", tree="3x2")  # whose accepted nodes are moved
        assert (result.output_tokens, right(result) > 5) == (texts[0], True)


@pytest.mark.parametrize("mode", MODES)
def test_the_text_is_that_of_the_target_alone(pair: tuple[Worker, Worker], mode: str) -> None:
    sampling = {"temperature": 0.8, "seed": 3}
    alone = write(pair, PROMPTS[0], gamma=0, **sampling).output_tokens
    for tree in TREES:
        for gamma in (5, "auto"):
            result = write(pair, PROMPTS[0], mode=mode, tree=tree, gamma=gamma, **sampling)
            assert result.output_tokens == alone, (tree, gamma)
    looked_up = write(pair, PROMPTS[0] * 2, mode=mode, lookup=1, **sampling)
    assert looked_up.output_tokens == write(pair, PROMPTS[0] * 2, gamma=0, **sampling).output_tokens
    assert {"lookup", "model"} <= {r.draft_source for r in looked_up.rounds}


@pytest.mark.parametrize("mode", MODES[1:])
def test_drafts_made_ahead_come_true(
    pair: Any, texts: Any, accepted: Any, mode: str, slow_target: Any, sent: list[pb.HiddenStates]
) -> None:
    gamma = 1 if mode == "overlap" else 3
    results = []
    for prompt in PROMPTS:
        sent.clear()
        results.append(write(pair, prompt, mode=mode, gamma=gamma, **EXACT))
        ends = [states.first + states.count for states in sent]
        assert [states.first for states in sent] == [0, *ends[:-1]]  # each position once, those of prepared rounds too
    assert [r.output_tokens for r in results] == texts
    assert sum(r.speculation_hits for r in results) > 10
    # A draft ahead follows the head's own outputs for longer, and is less often right.
    assert sum(map(right, results)) > 0.5 * sum(accepted) * (gamma / 3)


@pytest.fixture
def slow_target(pair: tuple[Worker, Worker]) -> Iterator[None]:
    """Slow enough that drafts ahead are ready."""
    pair[1].before_pass = lambda: time.sleep(0.01)
    yield
    pair[1].before_pass = lambda: None


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(pair: Any, texts: Any, accepted: Any, form: str) -> None:
    results = [write(pair, prompt, hidden_states_form=form) for prompt in PROMPTS]
    assert [r.output_tokens for r in results] == texts
    assert sum(map(right, results)) > 0.8 * sum(accepted)


def test_a_window_sends_the_end_of_the_prompt(pair: Any, texts: Any, sent: list[pb.HiddenStates]) -> None:
    prompt = PROMPTS[3]
    for window, first in ((1, 4), (3, 2), (100, 0)):
        sent.clear()
        result = write(pair, prompt, hidden_states_window=window)
        assert result.output_tokens == texts[3]
        assert all(r.drafted for r in result.rounds[1:-1])
        assert sent[0].first == first
        ends = [states.first + states.count for states in sent]
        assert [states.first for states in sent[1:]] == ends[:-1]  # each position once
        assert {states.form for states in sent} == {"bfloat16"}


@pytest.fixture
def sent(pair: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch) -> list[pb.HiddenStates]:
    """What the draft worker is sent, filled as it comes."""
    found: list[pb.HiddenStates] = []
    checked = pair[0].servicer._states

    def seen(request: pb.GenerateDraftsRequest) -> list[pb.HiddenStates]:
        found.extend(checked(request))
        return list(request.states)

    monkeypatch.setattr(pair[0].servicer, "_states", seen)
    return found


def test_states_larger_than_a_message_are_sent_in_parts(
    pair: Any, accepted: Any, monkeypatch: pytest.MonkeyPatch, sent: list[pb.HiddenStates]
) -> None:
    made = states.PassedStates.__init__

    def small(self: Any, *args: Any) -> None:
        made(self, *args)
        self._most_bytes = self._wanted.message_bytes = 2 * 4 * 3 * WIDTH  # two positions

    monkeypatch.setattr(states.PassedStates, "__init__", small)
    result = write(pair, PROMPTS[3], **EXACT)
    assert right(result) == accepted[3]
    assert [states.count for states in sent[:5]] == [2, 2, 2, 2, 1]  # two that came before, and then with the third


def test_texts_side_by_side_with_and_without_states(pair: Any, texts: Any, accepted: Any) -> None:
    """They share the passes of both workers."""

    async def write_all() -> list[SpeculativeResult]:
        async with (
            grpc.aio.insecure_channel(pair[0].address) as to_draft,
            grpc.aio.insecure_channel(pair[1].address) as to_target,
        ):
            stubs = pb_grpc.DraftServiceStub(to_draft), pb_grpc.TargetServiceStub(to_target)
            shared = {"max_output_tokens": LENGTH, "ignore_eos": True, **EXACT}
            return await asyncio.gather(
                *(
                    run_speculative_loop_async(*stubs, prompt, OrchestratorConfig(gamma=3 * (i % 2), **shared))
                    for i, prompt in enumerate(PROMPTS)
                )
            )

    results = event_loop().run(write_all())
    assert [r.output_tokens for r in results] == texts
    assert list(map(right, results)) == [expected * (i % 2) for i, expected in enumerate(accepted)]


def test_states_that_no_draft_follows_are_not_sent(
    pair: Any, folders: dict[str, Path], texts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[int] = []
    packed = Wanted.packed

    def noted(self: Wanted, rows: torch.Tensor, **more: Any) -> Any:
        ends.append(len(rows))
        return packed(self, rows, **more)

    monkeypatch.setattr(Wanted, "packed", noted)
    with serving("draft", folders["head"], max_context=16) as draft:
        result = write((draft, pair[1]), PROMPTS[0])
    assert result.output_tokens == texts[0]
    assert any(r.drafted for r in result.rounds)
    assert not result.rounds[-1].drafted
    assert 10 < max(ends) < 20
    ends.clear()
    assert write(pair, PROMPTS[0], max_output_tokens=1).output_tokens == texts[0][:1]
    assert not ends


# ---- what goes wrong


@pytest.mark.parametrize("role", ["draft", "target"])
@pytest.mark.parametrize("mode", MODES)
def test_a_worker_restarted_during_a_text(pair: Any, texts: Any, mode: str, role: str) -> None:
    worker = pair[0] if role == "draft" else pair[1]
    bursts: list[list[int]] = []

    def restart(tokens: list[int]) -> None:
        bursts.append(tokens)
        if len(bursts) == 3:
            worker.restart()

    result = write(pair, PROMPTS[0], mode=mode, on_tokens=restart)
    assert result.output_tokens == texts[0]
    assert result.failures
    assert all(r.drafted for r in result.rounds[5:-1])  # it has the states again


@pytest.mark.parametrize("mode", MODES)
def test_sessions_evicted_during_a_text(pair: Any, texts: Any, mode: str) -> None:
    bursts: list[list[int]] = []

    def evict(tokens: list[int]) -> None:
        bursts.append(tokens)
        if len(bursts) in (2, 4):
            for worker in pair:
                for session_id in list(worker.servicer.sessions._sessions):
                    worker.servicer.sessions.end(session_id)

    assert write(pair, PROMPTS[0], mode=mode, on_tokens=evict).output_tokens == texts[0]


def test_rejection_sampling_writes_the_same_text_when_the_draft_comes_back(pair: Any) -> None:
    settings = {"temperature": 0.9, "sampling": "rejection", "seed": 3, **EXACT}
    undisturbed = write(pair, PROMPTS[0], **settings)
    bursts: list[int] = []

    def restart(tokens: list[int]) -> None:
        bursts.append(len(tokens))
        if len(bursts) == 3:
            pair[0].restart()

    result = write(pair, PROMPTS[0], on_tokens=restart, **settings)
    assert result.output_tokens == undisturbed.output_tokens
    assert [r.accepted for r in result.rounds] == [r.accepted for r in undisturbed.rounds]
    assert [f.worker for f in result.failures] == ["draft"]


Spoil = Callable[[torch.Tensor], torch.Tensor]
SPOILS: dict[str, Spoil] = {
    "not a number": lambda rows: torch.full_like(rows, torch.nan),
    "infinite": lambda rows: torch.full_like(rows, torch.inf),
    "of other positions": lambda rows: rows.flip(0),
    "zero": torch.zeros_like,
}


@pytest.mark.parametrize(
    ("spoil", "form"),
    [*((spoil, "bfloat16") for spoil in SPOILS), ("infinite", "float32"), ("not a number", "int8")],
)
def test_wrong_states_change_no_text(
    pair: Any, texts: Any, monkeypatch: pytest.MonkeyPatch, spoil: str, form: str
) -> None:
    packed = Wanted.packed
    monkeypatch.setattr(
        Wanted, "packed", lambda self, rows, **k: packed(self, SPOILS[spoil](rows) if len(rows) > 9 else rows, **k)
    )
    result = write(pair, PROMPTS[0], hidden_states_form=form)
    assert result.output_tokens == texts[0]
    if spoil in ("not a number", "infinite"):
        drafted = [r.drafted > 0 for r in result.rounds]
        assert drafted[1]
        assert not any(drafted[5:])


def test_states_that_do_not_come_end_drafts(pair: Any, texts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states.PassedStates, "take", lambda self, reply: None)
    result = write(pair, PROMPTS[0])
    assert result.output_tokens == texts[0]
    assert not any(r.drafted for r in result.rounds)


# ---- the handshake and the requests


NEEDED = {"layers": [0, 1, 2], "hidden_size": 32, "vocab_size": 128, "forms": FORMS, "projection_sha256": "a"}
GIVEN = {"num_layers": 3, "hidden_size": 32, "forms": FORMS, "projection_sha256": "a"}


@pytest.mark.parametrize(
    ("needed", "given", "settings", "reason"),
    [
        ({}, None, {}, "the target big gives none: its worker is of an older version, or its engine cannot"),
        ({"hidden_size": 64}, {}, {}, "has states of 32 numbers, not 64: it is not the target that this draft was"),
        ({"vocab_size": 129}, {}, {}, "has 128 tokens, fewer than its 129"),
        ({"layers": [0, 1, 3]}, {}, {}, "has 3 layers, and none numbered 3"),
        ({"layers": []}, {"num_layers": 2}, {}, "has 2 layers, and none numbered 2"),
        ({"forms": ["float32"]}, {}, {}, "hidden_states_form bfloat16: the draft worker knows float32"),
        ({}, {"forms": ["int8"]}, {}, "hidden_states_form bfloat16: the target worker knows int8"),
        ({}, {"projection_sha256": ""}, {"hidden_states_project": "target"}, "the target worker has no fc of a draft"),
        ({}, {"projection_sha256": "b"}, {"hidden_states_project": "target"}, "has the fc of another draft; start it"),
    ],
)
def test_a_head_of_another_target_is_refused(needed: Any, given: Any, settings: Any, reason: str) -> None:
    draft = pb.DescribeReply(role="draft", model="head", states_needed=pb.StatesNeeded(**{**NEEDED, **needed}))
    target = pb.DescribeReply(role="target", model="big", vocab_size=128)
    if given is not None:
        target.states_given.CopyFrom(pb.StatesGiven(**{**GIVEN, **given}))
    with pytest.raises(UserError, match=reason):
        check_states(draft, target, OrchestratorConfig(**settings))


def test_workers_that_fit_are_not_refused() -> None:
    target = pb.DescribeReply(role="target", vocab_size=128, states_given=pb.StatesGiven(**GIVEN))
    head = pb.DescribeReply(role="draft", states_needed=pb.StatesNeeded(**NEEDED))
    for settings in ({}, {"hidden_states_project": "target"}):
        check_states(head, target, OrchestratorConfig(**settings))
    check_states(pb.DescribeReply(role="draft"), pb.DescribeReply(role="target"), OrchestratorConfig())


def test_a_target_that_gives_no_states_is_refused_before_the_first_round(
    pair: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FusedLM, "taps", False)
    with serving("target", folders["target"]) as target:
        with pytest.raises(UserError, match=r"the draft head\S* reads hidden states .* llama\S* gives none"):
            write((pair[0], target), PROMPTS[0])
        assert not target.passes
        with pytest.raises(grpc.RpcError, match="the engine of this target worker cannot give hidden states"):
            target.stub.VerifyDrafts(wanting(verify_request([5])), timeout=20)


def wanting(request: pb.VerifyDraftsRequest, **fields: Any) -> pb.VerifyDraftsRequest:
    wanted = {"layers": [0, 1, 2], "form": "float32", **fields}
    request.wanted_states.CopyFrom(pb.WantedStates(**wanted))
    return request


@pytest.mark.parametrize(
    ("fields", "status", "reason"),
    [
        ({"layers": [3]}, "INVALID_ARGUMENT", r"layers \[3\] are not at most 4 of 0 to 2"),
        ({"layers": range(5)}, "INVALID_ARGUMENT", "are not at most 4 of 0 to 2"),
        ({"form": "float64"}, "INVALID_ARGUMENT", "form 'float64' is none of bfloat16, float32, int8"),
        ({"first": 3}, "INVALID_ARGUMENT", "position 3 is not in a context of 3 tokens"),
        ({"projected": True, "layers": [0]}, "INVALID_ARGUMENT", "this worker has no fc of that draft"),
        ({"message_bytes": 400}, "RESOURCE_EXHAUSTED", "hidden states of 3 positions take 1152 bytes, and those of 1"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(pair: Any, fields: Any, status: str, reason: str) -> None:
    with pytest.raises(grpc.RpcError, match=reason) as caught:
        pair[1].stub.VerifyDrafts(wanting(verify_request([5, 6, 7], session=str(fields)), **fields), timeout=20)
    assert caught.value.code().name == status


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (pack_states(torch.ones(2, 7), 0, "float32"), "data has 56 bytes, and 2 positions of 96 numbers"),
        (pack_states(torch.ones(2, WIDTH), 0, "float32"), "data has 256 bytes"),
        (pack_states(torch.ones(2, 3 * WIDTH), 0, "float32", projected=True), "of 32 numbers as float32 take 256"),
        (pb.HiddenStates(count=1, form="float8"), "form 'float8' is none of"),
        (pb.HiddenStates(first=127, count=2, form="int8"), "positions 127 . 2 are beyond a text of 128 tokens"),
        (pb.HiddenStates(count=1 << 31, form="int8"), "are beyond a text of 128 tokens"),
    ],
)
def test_states_of_another_shape_are_refused(pair: Any, message: pb.HiddenStates, reason: str) -> None:
    request = draft_request([5, 6], session=reason)
    request.states.append(message)
    for call in (pair[0].stub.GenerateDrafts, lambda r, **k: next(pair[0].stub.StreamDrafts(iter([r]), **k))):
        with pytest.raises(grpc.RpcError, match=reason) as caught:
            call(request, timeout=20)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_client_that_knows_no_states_gets_no_drafts(pair: Any) -> None:
    assert not pair[0].stub.GenerateDrafts(draft_request([5, 6], session="old"), timeout=20).tree.token_ids


def test_a_draft_without_states_refuses_them(folders: dict[str, Path]) -> None:
    with serving("draft", folders["target"]) as draft:
        request = draft_request([5, 6])
        request.states.append(pack_states(torch.ones(1, 96), 0, "float32"))
        with pytest.raises(grpc.RpcError, match="the draft model of this worker reads no hidden states"):
            draft.stub.GenerateDrafts(request, timeout=20)


def test_a_request_sent_again_gets_the_same_states(pair: Any) -> None:
    request = wanting(verify_request([5, 6, 7], session="again"))
    first = pair[1].stub.VerifyDrafts(request, timeout=20)
    assert (first.states.first, first.states.count, len(first.states.data)) == (0, 3, 3 * 4 * 96)
    assert pair[1].stub.VerifyDrafts(request, timeout=20) == first
    later = wanting(verify_request([first.next_token], held=[5, 6, 7], round=2, session="again"), first=1)
    assert pair[1].stub.VerifyDrafts(later, timeout=20).states.count == 3


def test_a_session_that_wants_no_states_keeps_none(pair: Any) -> None:
    taps: list[tuple[int, ...]] = []

    def held() -> list[Any]:
        return [session for session in pair[1].servicer.sessions._sessions.values() if session.held]

    def look(tokens: list[int]) -> None:
        taps.extend(session.cache.taps for session in held())

    write(pair, PROMPTS[0], on_tokens=look, max_output_tokens=8)
    assert (0, 1, 2) in taps
    assert wait_until(lambda: not held())
    taps.clear()
    write(pair, PROMPTS[0], on_tokens=look, max_output_tokens=8, gamma=0)
    assert set(taps) == {()}


# ---- in Python


@pytest.mark.parametrize("project", ["draft", "target"])
def test_a_head_in_this_process(folders: dict[str, Path], texts: Any, accepted: Any, project: str) -> None:
    target = specsplit.Model(folders["target"], dtype="float32", max_context=128)
    head = specsplit.Model(folders["head"], dtype="float32", max_context=128)
    options: dict[str, Any] = {"gamma": 3, "max_new_tokens": LENGTH, "ignore_eos": True, **EXACT}
    with specsplit.load(target, head, hidden_states_project=project, **options) as pair:
        for prompt, text, expected in zip(PROMPTS[:3], texts, accepted, strict=False):
            generated = pair.generate(prompt)
            assert (generated.token_ids, sum(r.accepted for r in generated.rounds)) == (text, expected)
