"""Limits of the workers: every one is said by `Describe`, refused beyond, and kept within by the client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import specsplit
from specsplit.client import limits
from specsplit.client.result import SpeculativeResult
from specsplit.client.writer import TextWriter
from specsplit.models.sources import prepare_model
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import OrchestratorConfig
from specsplit.worker import inbox

from grpc_fixtures import Worker, serving

PROMPT = [65, 66, 67]
LENGTH = 60
VOCAB = 300
MODES = ("sync", "overlap", "lookahead")

# By limit, and what meets it where that is more than one thing: the lower value of one worker, and settings of a text
# that go beyond it. The next limit is one line.
ROWS: dict[str, tuple[int, dict[str, Any]]] = {
    "tree_nodes": (30, {"gamma": 16, "tree": "4x4x2"}),
    "tree_nodes, dynamic": (3, {"gamma": 16, "tree": "dynamic-64x8", "lookup": 1}),
    "draft_tokens": (2, {"gamma": 7}),
    "children": (2, {"gamma": 3, "tree": "4x3"}),
    "tree_width": (2, {"gamma": 6, "tree": "dynamic-32x8"}),
    "fan_out": (2, {"gamma": 3, "fan_out": 64}),
    "stop_tokens": (1, {"gamma": 5, "stop_token_ids": [7, 1 << 40, *range(200, 300)]}),
    "message_bytes": (
        1 << 20,
        {"gamma": 64, "fan_out": 64, "temperature": 0.9, "sampling": "rejection", "max_output_tokens": 20},
    ),
    "waiting_messages": (3, {"gamma": 2}),
    "sessions": (1, {"gamma": 4}),
    "calls": (1, {"gamma": 4}),
    "streams": (1, {"gamma": 4}),
    # Said beside `limits`.
    "max_context": (32, {"gamma": 16, "tree": "4x4x2"}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for name, own in {"draft": {"acceptance": 0.8}, "target": {}}.items():
        prepare_model({"source": "synthetic", "vocab_size": VOCAB, **own}, name, folder / name)
    return {name: folder / name for name in ("draft", "target")}


@pytest.fixture
def pair(models: dict[str, Path]) -> Iterator[tuple[Worker, Worker]]:
    with serving("draft", models["draft"], max_context=2048) as draft, serving("target", models["target"]) as target:
        yield draft, target


def write(draft: Worker | None, target: Worker, **settings: Any) -> SpeculativeResult:
    config = OrchestratorConfig(**{"max_output_tokens": LENGTH, "recovery_timeout_s": 5.0, **settings})
    with TextWriter(draft and draft.address, target.address) as writer:
        return writer.write(PROMPT, config)


def lower(worker: Worker, limit: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a worker a lower limit, as its settings would: what it says and what it enforces."""
    if limit == "message_bytes":
        worker.settings["max_message_mb"] = value >> 20
    elif limit == "max_context":
        worker.settings["max_context"] = value
    elif limit in ("sessions", "calls"):
        worker.settings[f"max_{limit}"] = value
    worker.restart()
    if limit == "waiting_messages":
        monkeypatch.setattr(inbox, "MOST_WAITING", value)
    if limit != "max_context":
        setattr(worker.servicer.limits, limit, value)


@pytest.mark.parametrize("role", ["draft", "target"])
@pytest.mark.parametrize("row", ROWS)
def test_a_limit_of_one_worker_is_kept_within(
    pair: tuple[Worker, Worker], row: str, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft, target = pair
    limit, (value, settings) = row.partition(",")[0], ROWS[row]
    lower(draft if role == "draft" else target, limit, value, monkeypatch)
    alone = {key: settings[key] for key in ("stop_token_ids",) if key in settings}
    expected = write(None, target, gamma=0, **alone).output_tokens
    for mode in MODES:
        result = write(draft, target, mode=mode, **settings)
        assert result.failures == []
        assert settings.get("sampling") == "rejection" or result.output_tokens == expected
        assert result.finish_reason in ("length", "eos", "context")
        if limit != "stop_tokens":
            sources = {measured.draft_source for measured in result.rounds if measured.drafted}
            assert sources >= ({"lookup"} if "lookup" in settings else {""})


def test_every_limit_has_a_row() -> None:
    assert {row.partition(",")[0] for row in ROWS} == {field.name for field in pb.Limits.DESCRIPTOR.fields} | {
        "max_context"
    }


def test_every_limit_is_said(pair: tuple[Worker, Worker]) -> None:
    for worker in pair:
        said = worker.stub.Describe(pb.DescribeRequest()).limits
        assert all(getattr(said, field.name) > 0 for field in pb.Limits.DESCRIPTOR.fields)
        assert said == worker.servicer.limits


# ---- the default limits


@pytest.mark.parametrize("tree", ["4x4x2", "8x8x8x8", "dynamic-256x64", "2x" * 70 + "2"])
def test_any_tree_finishes_with_the_limits_that_workers_have_by_default(pair: tuple[Worker, Worker], tree: str) -> None:
    draft, target = pair
    target.settings["max_context"] = 2048
    target.restart()
    expected = write(None, target, gamma=0, max_output_tokens=40).output_tokens
    for mode, gamma in (("sync", 64), ("overlap", 16), ("lookahead", "auto"), ("lookahead", 64)):
        result = write(draft, target, mode=mode, gamma=gamma, tree=tree, max_output_tokens=40)
        assert (result.failures, result.finish_reason) == ([], "length")
        assert result.output_tokens == expected
        assert max(row.tree_nodes for row in result.rounds) > 0


def test_what_is_smaller_than_the_settings_is_said_before_the_first_round(
    pair: tuple[Worker, Worker], caplog: pytest.LogCaptureFixture
) -> None:
    draft, target = pair
    limits._warn.cache_clear()
    write(draft, target, gamma=3, tree="2x2", max_output_tokens=4)
    assert not caplog.records
    target.servicer.limits.tree_nodes = 9
    for _ in range(2):
        write(draft, target, gamma=16, tree="4x4x2", max_output_tokens=4)
    (record,) = caplog.records  # once
    assert "the target worker takes 9 nodes a tree at most" in record.message
    assert "drafts have 1 tokens at most, as tree 4x4x2, instead of gamma 16, tree 4x4x2" in record.message
    write(None, target, gamma=0, max_output_tokens=4)
    assert len(caplog.records) == 1


def test_a_worker_that_says_nothing_of_its_limits_is_asked_for_what_the_settings_say() -> None:
    old = pb.DescribeReply(max_context=64, vocab_size=VOCAB)
    found = limits.DraftLimits.of(OrchestratorConfig(gamma=5, tree="3x2"), old, old)
    assert (str(found.shape), found.gamma, found.outcomes, found.context, found.shortened) == ("3x2", 5, 16, 64, ())


def test_a_pair_writes_as_many_texts_at_once_as_the_workers_have_sessions(models: dict[str, Path]) -> None:
    with ExitStack() as stack:
        draft = stack.enter_context(serving("draft", models["draft"], max_sessions=2))
        target = stack.enter_context(serving("target", models["target"], max_sessions=3))
        with specsplit.connect(target.address, draft.address, gamma=3, max_new_tokens=20) as written:
            texts = written.generate([PROMPT] * 12)
        most = max(len(worker.servicer.sessions._spare) for worker in (draft, target))
    assert len({tuple(text.token_ids) for text in texts}) == 1
    assert most <= 2
