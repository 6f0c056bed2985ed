"""The loop over real gRPC: the text is the target's own, whatever drafts it and whatever goes wrong on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import torch
import transformers

from specsplit.client import recovery
from specsplit.client.event_loop import event_loop
from specsplit.client.handshake import check_tokenizers, connected_pair
from specsplit.client.pipeline import run_speculative_loop_async
from specsplit.client.result import SpeculativeResult
from specsplit.errors import UserError, WorkerError
from specsplit.rpc.connection import connect
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.rpc.v1 import specsplit_pb2_grpc as pb_grpc
from specsplit.settings.run import OrchestratorConfig

from grpc_fixtures import PROMPTS, Reference, Worker, noisy_copy, serving
from tiny_models import SMALL, make_tokenizer
from waiting import wait_until

PROMPT = PROMPTS[0]
LENGTH = 40
TREES = ("chain", "3x2", "dynamic-8x2")
SHAPES: dict[str, dict[str, Any]] = {
    "alone": {"gamma": 0},
    "chain-1": {"gamma": 1},
    "chain-3": {"gamma": 3},
    "chain-12": {"gamma": 12},
    "tree": {"gamma": 4, "tree": "3x2"},
    "bush": {"gamma": 3, "tree": "2x2x2"},
}


@pytest.fixture(scope="module")
def folders(tiny_model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target and a draft that agrees with it some of the time."""
    target = tiny_model_folder("llama")
    return target, noisy_copy(target, tmp_path_factory.mktemp("draft"), noise=0.03)


@pytest.fixture(scope="module")
def reference(folders: tuple[Path, Path]) -> Reference:
    return Reference(folders[0])


@pytest.fixture(scope="module")
def target(folders: tuple[Path, Path]) -> Iterator[Worker]:
    with serving("target", folders[0]) as worker:
        yield worker


@pytest.fixture(scope="module")
def draft(folders: tuple[Path, Path]) -> Iterator[Worker]:
    with serving("draft", folders[1]) as worker:
        yield worker


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(recovery, "LAST_CHANCE_S", 0.2)


class Between:
    """Stands between the client and a worker: `sending` sees each round's request first."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def sending(self, request: Any) -> None:
        raise NotImplementedError

    def stub(self, stub: Any) -> Any:
        """The stub that the client is given. stub: the worker's, of grpc.aio."""
        verb = "StreamDrafts" if self.worker.role == "draft" else "StreamVerify"
        rpc = getattr(stub, verb)

        def call() -> Any:
            stream = rpc()
            write = stream.write

            async def written(message: Any) -> None:
                if self.worker.role == "draft":
                    await asyncio.to_thread(self.sending, message)
                elif message.HasField("verify"):  # the others are prepared drafts
                    await asyncio.to_thread(self.sending, message.verify)
                await write(message)

            stream.write = written
            return stream

        return SimpleNamespace(**{"Describe": stub.Describe, verb: call})


def write(
    draft: Worker | Between | None,
    target: Worker | Between,
    prompt: list[int] = PROMPT,
    *,
    on_tokens: Any = None,
    **settings: Any,
) -> SpeculativeResult:
    """One text over streams."""
    config = OrchestratorConfig(**{"gamma": 4, "max_output_tokens": LENGTH, "ignore_eos": True, **settings})

    async def text() -> SpeculativeResult:
        async with AsyncExitStack() as stack:
            stubs: list[Any] = []
            for end, kind in ((draft, pb_grpc.DraftServiceStub), (target, pb_grpc.TargetServiceStub)):
                worker = end.worker if isinstance(end, Between) else end
                if worker is None:
                    stubs.append(None)
                    continue
                stub = kind(await stack.enter_async_context(grpc.aio.insecure_channel(worker.address)))
                stubs.append(end.stub(stub) if isinstance(end, Between) else stub)
            return await run_speculative_loop_async(*stubs, prompt, config, on_tokens=on_tokens)

    return event_loop().run(text())


# ---- the text


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompt", PROMPTS[:2], ids=str)
def test_the_text_is_that_of_the_target_alone(
    draft: Worker, target: Worker, reference: Reference, prompt: list[int], shape: str
) -> None:
    result = write(draft, target, prompt, **SHAPES[shape])
    assert result.output_tokens == reference.text(prompt, LENGTH)
    assert result.finish_reason == "length"
    assert sum(row.accepted + 1 for row in result.rounds) == LENGTH
    assert wait_until(lambda: len(target.servicer.sessions) == len(draft.servicer.sessions) == 0)


def test_drafts_are_accepted_and_rejected(draft: Worker, target: Worker) -> None:
    """Or the other tests would prove little."""
    rounds = write(draft, target).rounds
    assert 0 < sum(row.accepted for row in rounds) < sum(row.drafted for row in rounds)
    assert len(rounds) < LENGTH / 2
    assert len(write(draft, target, tree="3x2").rounds) < len(rounds)


def test_a_perfect_draft_is_accepted_whole(target: Worker, folders: tuple[Path, Path]) -> None:
    with serving("draft", folders[0]) as same:
        rounds = write(same, target, gamma=4).rounds
        assert [(row.drafted, row.accepted) for row in rounds] == [(0, 0), *[(4, 4)] * 7, (3, 3)]
        # One pass for the prompt, and one for each draft, a chain: the cache keeps what was accepted.
        assert same.passes == 1 + 7 + 1


def test_tokens_come_as_they_are_accepted(draft: Worker, target: Worker) -> None:
    bursts: list[list[int]] = []
    result = write(draft, target, on_tokens=bursts.append)
    assert [token for burst in bursts for token in burst] == result.output_tokens
    assert [len(burst) for burst in bursts] == [row.accepted + 1 for row in result.rounds]


def test_a_target_alone_needs_no_draft(target: Worker, reference: Reference) -> None:
    result = write(None, target, gamma=0)
    assert result.output_tokens == reference.text(PROMPT, LENGTH)
    assert {(row.drafted, row.tree_nodes, row.draft_wall_ms) for row in result.rounds} == {(0, 0, 0.0)}


def test_figures_of_the_rounds(draft: Worker, target: Worker) -> None:
    result = write(draft, target, gamma=4, tree="3x2")
    assert [row.round for row in result.rounds] == list(range(1, len(result.rounds) + 1))
    first, full = result.rounds[:2]
    assert (first.drafted, first.tree_nodes, first.draft_wall_ms, first.draft_queue_ms) == (0, 0, 0.0, 0.0)
    assert first.draft_hidden_ms + full.draft_hidden_ms > 0  # of the prompt, which nobody waited for
    assert (full.drafted, full.tree_nodes) == (4, 3 + 6 + 6 + 6)
    for row in result.rounds:
        assert row.accepted <= row.drafted
        assert 0 < row.verify_compute_ms + row.verify_queue_ms <= row.verify_wall_ms
        if row.drafted:
            assert 0 < row.draft_compute_ms + row.draft_queue_ms <= row.draft_wall_ms
        waited = row.verify_wall_ms - row.verify_compute_ms + max(0.0, row.draft_wall_ms - row.draft_compute_ms)
        assert 0 <= row.network_ms <= waited + 1e-6
    assert result.ttft_ms is not None
    assert 0 < result.ttft_ms <= result.total_ms
    assert sum(row.verify_wall_ms + row.draft_wall_ms for row in result.rounds) <= result.total_ms


# ---- where a text ends


@pytest.mark.parametrize("shape", ["alone", "chain-1", "chain-12"])  # more of them in test_pipeline.py
@pytest.mark.parametrize("place", [0, 1, 7])
def test_an_end_of_text_ends_it_there_and_is_no_part_of_it(
    draft: Worker, target: Worker, reference: Reference, place: int, shape: str
) -> None:
    eos = reference.text(PROMPT, LENGTH)[place]
    *text, last = reference.text(PROMPT, LENGTH, eos=eos)
    bursts: list[int] = []
    settings = {**SHAPES[shape], "ignore_eos": False, "stop_token_ids": [eos]}
    result = write(draft, target, on_tokens=bursts.extend, **settings)
    assert last == eos
    assert result.output_tokens == text == bursts
    assert result.finish_reason == "eos"
    assert (result.ttft_ms is None) == (not text)


def test_an_end_of_text_inside_an_accepted_block(
    target: Worker, folders: tuple[Path, Path], reference: Reference
) -> None:
    """The draft goes on after what only the loop knows to be an end, and the target accepts all of it."""
    text = reference.text(PROMPT, 8)

    class GoesOn(Between):
        """A draft worker that does not hear of stop tokens."""

        def sending(self, request: pb.GenerateDraftsRequest) -> None:
            del request.stop_token_ids[:]

    with serving("draft", folders[0]) as same:
        result = write(GoesOn(same), target, gamma=6, ignore_eos=False, stop_token_ids=[text[3]])
    assert result.output_tokens == text[:3]
    # All six were accepted; those from the end on are not given out, so they do not count.
    assert [(row.tree_nodes, row.drafted, row.accepted) for row in result.rounds[1:]] == [(6, 6, 6)]
    assert [(row.tree_nodes, row.drafted, row.accepted) for row in result.counted_rounds[1:]] == [(6, 2, 2)]


def test_the_target_names_the_end_of_text_itself(draft: Worker, target: Worker, reference: Reference) -> None:
    text = reference.text(PROMPT, LENGTH)
    absent = next(token for token in range(128) if token not in text)
    model = target.servicer.model.model
    own, model.eos_token_ids = model.eos_token_ids, (absent, text[5])
    try:
        assert write(draft, target, ignore_eos=False).output_tokens == text[: text.index(text[5])]
        assert write(draft, target, ignore_eos=True).output_tokens == text
        assert write(draft, target, ignore_eos=False, stop_token_ids=[]).output_tokens == text
    finally:
        model.eos_token_ids = own


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_a_text_ends_after_max_output_tokens(draft: Worker, target: Worker, reference: Reference, count: int) -> None:
    result = write(draft, target, max_output_tokens=count, gamma=12)
    assert result.output_tokens == reference.text(PROMPT, count)
    assert result.finish_reason == "length"
    assert all(row.drafted < count for row in result.rounds)  # the last token is always the target's own


def test_a_text_ends_after_max_rounds(draft: Worker, target: Worker) -> None:
    whole = write(draft, target)
    cut = write(draft, target, max_rounds=3)
    assert cut.finish_reason == "max_rounds"
    assert [row.accepted for row in cut.rounds] == [row.accepted for row in whole.rounds[:3]]
    assert cut.output_tokens == whole.output_tokens[: len(cut.output_tokens)]


@pytest.mark.parametrize("shape", ["alone", "chain-12", "tree"])
def test_a_text_ends_at_the_targets_context(
    draft: Worker, folders: tuple[Path, Path], reference: Reference, shape: str
) -> None:
    with serving("target", folders[0], max_context=30) as small:
        result = write(draft, small, **SHAPES[shape])
    assert result.finish_reason == "context"
    assert result.output_tokens == reference.text(PROMPT, 30 - len(PROMPT))


def test_a_text_ends_at_the_context_that_is_asked_for(draft: Worker, target: Worker, reference: Reference) -> None:
    result = write(draft, target, max_context=20)
    assert (result.finish_reason, result.output_tokens) == ("context", reference.text(PROMPT, 20 - len(PROMPT)))
    assert write(draft, target, max_context=10_000).finish_reason == "length"


@pytest.mark.parametrize("shape", ["alone", "chain-12", "tree"])
def test_a_small_context_of_the_draft_ends_the_drafts_and_not_the_text(
    target: Worker, folders: tuple[Path, Path], reference: Reference, shape: str
) -> None:
    with serving("draft", folders[1], max_context=24) as small:
        result = write(small, target, **SHAPES[shape])
    assert result.output_tokens == reference.text(PROMPT, LENGTH)
    if shape != "alone":
        assert result.rounds[1].drafted > 0
        assert result.rounds[-2].drafted == 0


def test_a_prompt_that_does_not_fit_is_refused(draft: Worker, target: Worker) -> None:
    with pytest.raises(UserError, match="the prompt has 128 tokens, a text can have 128: shorten the prompt"):
        write(draft, target, [5] * 128)
    with pytest.raises(UserError, match="a text can have 10"):
        write(draft, target, [5] * 10, max_context=10)
    assert len(write(draft, target, [5] * 127).output_tokens) == 1


def test_a_prompt_without_tokens_is_refused(draft: Worker, target: Worker) -> None:
    with pytest.raises(UserError, match="the prompt has no tokens"):
        write(draft, target, [])


# ---- the first token

FIRST: dict[str, dict[str, Any]] = {
    **{f"{mode}, {tree}": {"mode": mode, "tree": tree} for mode in ("sync", "overlap", "lookahead") for tree in TREES},
    "auto": {"gamma": "auto"},
    "coupled": {"temperature": 0.8, "tree": "3x2"},
    "rejection": {"temperature": 0.8, "sampling": "rejection"},
}


class Held(Between):
    """A draft worker that is not sent a text before another token of it is shown."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self.shown = len(PROMPT)

    def take(self, tokens: list[int]) -> None:
        self.shown += len(tokens)

    def sending(self, request: Any) -> None:
        if request.context.prefix_length == 0:
            assert wait_until(lambda: self.shown > len(request.context.new_tokens))


@pytest.mark.parametrize("settings", FIRST.values(), ids=FIRST)
def test_the_first_token_waits_for_no_draft(
    draft: Worker, target: Worker, reference: Reference, settings: dict[str, Any]
) -> None:
    """Nor does the first one after the target has lost the text."""
    held = Held(draft)

    def lose() -> None:
        end.sent[-1].context.prefix_crc32 ^= 1

    # With rejection sampling a text depends on where its rounds are cut: there, a failure does not change that.
    end = Unreliable(target, 0 if settings.get("sampling") == "rejection" else 4, lose)
    result = write(held, end, on_tokens=held.take, **settings)
    assert result.rounds[0].drafted == 0
    assert sum(row.drafted for row in result.rounds) > 0
    assert sum(row.accepted + 1 for row in result.rounds) == LENGTH
    if "temperature" not in settings:
        assert result.output_tokens == reference.text(PROMPT, LENGTH)
    else:
        assert result.output_tokens == write(draft, target, **settings).output_tokens


@pytest.mark.parametrize(("limit", "drafted"), [(1, False), (2, False), (3, True)])
def test_a_draft_worker_reads_only_what_it_will_draft_for(
    draft: Worker, target: Worker, limit: int, drafted: bool
) -> None:
    passes = draft.passes
    result = write(draft, target, max_output_tokens=limit)
    assert len(result.output_tokens) == limit
    assert (draft.passes > passes) == drafted


# ---- what goes wrong on the way


class Unreliable(Between):
    """A worker whose round `number` (from 1) meets `trouble` once; it counts what was sent."""

    def __init__(self, worker: Worker, number: int, trouble: Callable[[], object]) -> None:
        super().__init__(worker)
        self._number, self._trouble = number, trouble
        self.sent: list[Any] = []

    def sending(self, request: Any) -> None:
        self.sent.append(request)
        if len(self.sent) == self._number:
            self._trouble()

    @property
    def resent_whole(self) -> int:
        return sum(request.context.prefix_length == 0 for request in self.sent[1:])


@pytest.mark.parametrize("role", ["draft", "target"])
def test_a_lost_reply_is_asked_for_again(draft: Worker, target: Worker, role: str) -> None:
    """The worker does its work, and the connection breaks before the reply is there."""
    undisturbed = write(draft, target, tree="2")
    ends: dict[str, Any] = {"draft": draft, "target": target}
    worker, passes = ends[role], ends[role].passes

    class LostReply(Unreliable):
        """The stream whose round `number` is answered is cut instead."""

        def stub(self, stub: Any) -> Any:
            stub = super().stub(stub)
            verb = next(name for name in vars(stub) if name != "Describe")
            rpc = getattr(stub, verb)

            def call() -> Any:
                stream = rpc()
                read = stream.read

                async def cut() -> Any:
                    reply = await read()
                    if len(self.sent) == self._number:
                        self._number = 0
                        stream.cancel()
                        return grpc.aio.EOF
                    return reply

                stream.read = cut
                return stream

            setattr(stub, verb, call)
            return stub

    ends[role] = LostReply(worker, 3, lambda: None)
    result = write(**ends, tree="2")
    assert result.output_tokens == undisturbed.output_tokens
    assert [(f.worker, f.round, f.action) for f in result.failures] == [(role, 3, "reconnect")]
    assert [row.round for row in result.rounds] == list(range(1, len(result.rounds) + 1))
    assert [row.accepted for row in result.rounds[:2]] == [row.accepted for row in undisturbed.rounds[:2]]
    assert result.rounds[2].drafted == 0  # both workers read the whole text
    assert ends[role].resent_whole == 1
    assert worker.passes > passes


@pytest.mark.parametrize("role", ["draft", "target"])
def test_a_session_evicted_during_a_text(folders: tuple[Path, Path], reference: Reference, role: str) -> None:
    with (
        serving("draft", folders[1], max_sessions=1) as draft,
        serving("target", folders[0], max_sessions=1) as target,
    ):
        ends: dict[str, Any] = {"draft": draft, "target": target}

        def another_text() -> None:
            other = write(draft, target, PROMPTS[1], max_rounds=2)
            assert other.output_tokens == reference.text(PROMPTS[1], LENGTH)[: len(other.output_tokens)]

        ends[role] = Unreliable(ends[role], 5, another_text)
        assert write(**ends).output_tokens == reference.text(PROMPT, LENGTH)
        assert ends[role].resent_whole == 1


def test_a_round_is_sent_again_until_the_recovery_timeout(draft: Worker, target: Worker) -> None:
    class Away(Between):
        tries = 0

        def stub(self, stub: Any) -> Any:
            async def said(what: Any = None) -> Any:
                return what

            def call() -> Any:
                self.tries += 1
                return SimpleNamespace(
                    **{"write": said, "read": lambda: said(grpc.aio.EOF), "cancel": lambda: None},
                    **{"code": lambda: said(grpc.StatusCode.UNAVAILABLE), "details": lambda: said("connection reset")},
                    trailing_metadata=said,
                )

            return SimpleNamespace(Describe=stub.Describe, StreamVerify=call)

    away = Away(target)
    failed = "target worker failed in round 1: UNAVAILABLE: connection reset"
    with pytest.raises(WorkerError, match=f"{failed}$"):
        write(draft, away, recovery_timeout_s=0)
    assert away.tries == 1
    with pytest.raises(WorkerError, match=rf"{failed}; gave up after 0\.\d s"):
        write(draft, away, recovery_timeout_s=0.2)
    assert away.tries > 3


def test_a_refusal_is_not_tried_again(folders: tuple[Path, Path], target: Worker) -> None:
    with serving("draft", folders[1]) as small:
        # A limit that it did not say: what it says is kept within (test_limits.py).
        end = Unreliable(small, 1, lambda: setattr(small.servicer.limits, "tree_nodes", 3))
        with pytest.raises(WorkerError, match="draft worker failed in round 2: RESOURCE_EXHAUSTED: a tree of 4 nodes"):
            write(end, target)
    assert len(end.sent) == 2  # the prompt, and the one that is refused


@pytest.mark.parametrize(("mode", "error"), [("sync", KeyboardInterrupt), ("lookahead", KeyError)])
def test_a_text_that_fails_leaves_no_session(draft: Worker, target: Worker, mode: str, error: type) -> None:
    def fail(tokens: list[int]) -> None:
        raise error

    with pytest.raises(error):
        write(draft, target, mode=mode, on_tokens=fail)
    assert wait_until(lambda: len(target.servicer.sessions) == len(draft.servicer.sessions) == 0)
    assert write(draft, target, max_output_tokens=2).finish_reason == "length"  # the event loop goes on


# ---- finding the workers


def test_the_address_of_the_other_worker_is_noticed(draft: Worker) -> None:
    with pytest.raises(WorkerError, match=r"is not a target worker.*swapped"):
        connect("target", draft.address)


def test_an_address_where_nobody_answers(target: Worker) -> None:
    with pytest.raises(WorkerError, match=r"no draft worker answers at 127\.0\.0\.1:1 within 0\.2 s.*--draft-addr"):
        connect("draft", "127.0.0.1:1", timeout_s=0.2)


@pytest.mark.parametrize("address", ["", "localhost", ":50051", "localhost:", "localhost:http", "localhost:70000"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="is not an address: write host:port"):
        connect("draft", address)


def test_a_pair_shares_one_tokenizer(draft: Worker, target: Worker) -> None:
    sha256 = target.servicer.identity["tokenizer_sha256"]
    config = OrchestratorConfig(draft_address=draft.address, target_address=target.address)
    with connected_pair(config, sha256) as workers:
        assert [worker.description.role for worker in workers.values()] == ["draft", "target"]
    with pytest.raises(UserError, match="the tokenizers differ"), connected_pair(config, "0" * 64):
        pass
    alone = config.model_copy(update={"gamma": 0, "draft_address": "127.0.0.1:1"})
    with connected_pair(alone, sha256) as workers:
        assert list(workers) == ["target"]


def test_tokenizers_that_differ_are_named() -> None:
    check_tokenizers({"a": "x", "b": "x"})
    with pytest.raises(UserError, match=r"a has 111111111111, b has none\): token ids would mean different text"):
        check_tokenizers({"a": "1" * 64, "b": ""})


@pytest.mark.parametrize("vocabulary", [64, 300])
@pytest.mark.parametrize("tree", ["chain", "3x2"])
def test_a_draft_whose_vocabulary_is_padded_otherwise(target, reference, tmp_path, vocabulary, tree):
    """It drafts tokens that the target does not have, or cannot read all that the target writes."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(**{**SMALL, "vocab_size": vocabulary})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    # The first token is the target's: one that the draft can read.
    prompt = next(p for p in ([token, 5] for token in range(3, 64)) if reference.text(p, 1)[0] < vocabulary)
    with serving("draft", tmp_path) as draft:
        result = write(draft, target, prompt, tree=tree)
    assert result.output_tokens == reference.text(prompt, LENGTH)
    assert any(row.tree_nodes for row in result.rounds)
