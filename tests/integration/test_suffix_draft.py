"""A draft worker that learns while it serves: many sessions, failures, owners, metrics, tables."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_metrics import scraped

from specsplit.client.result import SpeculativeResult
from specsplit.client.writer import TextWriter
from specsplit.experiment.records import Request
from specsplit.experiment.run import Run
from specsplit.experiment.runner import run_requests
from specsplit.models.sources import prepare_model
from specsplit.models.tokenizer import TextCodec
from specsplit.settings.run import OrchestratorConfig

from grpc_fixtures import Worker, serving

MODES = ("sync", "overlap", "lookahead")
LENGTH = 40


@pytest.fixture(params=["suffix", "or model"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Worker, Worker]]:
    for name in ("target", "model"):
        prepare_model({"source": "synthetic", "acceptance": 0.7, "step_ms": 0.5}, name, tmp_path / name)
    spec = {"source": "suffix", "tokenizer": str(tmp_path / "target")}
    if request.param == "or model":
        spec["model"] = str(tmp_path / "model")
    prepare_model(spec, "learns", tmp_path / "learns")
    with (
        serving("draft", tmp_path / "learns", metrics_port=0, drain_s=0.1) as draft,
        serving("target", tmp_path / "target", drain_s=0.1) as target,
    ):
        yield draft, target


def write(pair: tuple[Worker, Worker], prompt: list[int], **settings: object) -> SpeculativeResult:
    draft, target = pair
    with TextWriter(draft.address, target.address) as writer:
        config = OrchestratorConfig(**{"gamma": 3, "max_output_tokens": LENGTH, **settings})
        return writer.write(prompt, config)


def test_many_sessions_learn_from_each_other_and_no_text_changes(pair: tuple[Worker, Worker]) -> None:
    prompts = [[65 + i % 4, 66, 67] for i in range(12)]
    right = [write(pair, prompt, gamma=0).output_tokens for prompt in prompts[:4]]
    with ThreadPoolExecutor(6) as clients:
        for mode in MODES:
            results = list(clients.map(lambda prompt: write(pair, prompt, mode=mode), prompts))  # noqa: B023
            assert [r.output_tokens for r in results] == [right[i % 4] for i in range(12)]
            sources = Counter(r.draft_source for result in results for r in result.rounds)
            assert sources["global"] > 20
    counted = {name.split()[1]: n for name, n in scraped(pair[0]).items() if "suffix_drafts_total" in name}
    assert set(counted) <= {"session", "global", "model", "none"}
    assert counted["global"] > 0


def test_it_goes_on_after_its_worker_was_restarted_with_an_empty_memory(pair: tuple[Worker, Worker]) -> None:
    right = write(pair, [65, 66], gamma=0).output_tokens
    seen: list[int] = []

    def once(tokens: list[int]) -> None:
        if not seen:
            pair[0].restart()
        seen.extend(tokens)

    write(pair, [65, 66])
    with TextWriter(pair[0].address, pair[1].address) as writer:
        config = OrchestratorConfig(gamma=3, max_output_tokens=LENGTH, recovery_timeout_s=20.0)
        result = writer.write([65, 66], config, on_tokens=once)
    assert result.output_tokens == seen == right
    assert result.failures
    assert len(pair[0].servicer.model.model.memory) < 2 * LENGTH


def test_nobody_learns_from_another_owner(pair: tuple[Worker, Worker]) -> None:
    for owner in ("a", "b"):
        pair[0].servicer.owner_of = lambda metadata, owner=owner: owner
        sources = {r.draft_source for r in write(pair, [65, 66]).rounds}
        assert "global" not in sources
    assert "global" in {r.draft_source for r in write(pair, [65, 66]).rounds}


def test_a_repeat_is_not_looked_up_in_itself(pair: tuple[Worker, Worker], tmp_path: Path) -> None:
    draft, target = pair
    requests = [Request(name, "", [65, 66, 67]) for name in ("first", "same again")]
    config = OrchestratorConfig(gamma=3, max_output_tokens=LENGTH)
    codec = TextCodec.load(tmp_path / "target")
    workers = {"draft": draft.connect(), "target": target.connect()}
    run_requests(Run(requests, workers, codec, config, repeats=2), tmp_path / "run")
    rows = list(csv.DictReader((tmp_path / "run/requests.csv").open()))
    found = {(row["request_id"], row["repeat"]): int(row["drafts_from_global"]) for row in rows}
    assert found["first", "1"] == found["first", "2"] == 0
    assert found["same again", "1"] == found["same again", "2"] > 5
