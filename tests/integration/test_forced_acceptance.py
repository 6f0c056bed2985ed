"""Forced acceptance: drafts are right at the positions that the seed says, and the text stays the target's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from specsplit.client.result import SpeculativeResult
from specsplit.client.writer import TextWriter
from specsplit.decoding.forced import forced
from specsplit.models.sources import prepare_model
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import OrchestratorConfig
from specsplit.settings.worker import DraftWorkerConfig
from specsplit.worker.draft_service import MOST_FORCED, DraftServicer
from specsplit.worker.refusals import InvalidRequest

from grpc_fixtures import PROMPTS, Worker, noisy_copy, serving

PROMPT, LENGTH = PROMPTS[0], 40
KINDS = ("noisy", "right", "ngram")


@pytest.fixture(scope="module")
def workers(
    tiny_model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Worker]]:
    """A target, and drafts of several kinds: one often wrong, the target itself, one without a model."""
    folder, made = tiny_model_folder("llama"), tmp_path_factory.mktemp("drafts")
    prepare_model({"source": "ngram", "tokenizer": str(folder)}, "ngram", made / "ngram")
    noisy = noisy_copy(folder, made / "noisy", noise=0.3)
    with (
        serving("target", folder) as target,
        serving("draft", noisy) as often_wrong,
        serving("draft", folder) as right,
        serving("draft", made / "ngram") as ngram,
    ):
        yield {"target": target, "noisy": often_wrong, "right": right, "ngram": ngram}


def write(workers: dict[str, Worker], draft: str, **settings: Any) -> SpeculativeResult:
    config = OrchestratorConfig(**{"max_output_tokens": LENGTH, "ignore_eos": True, "seed": 3, **settings})
    with TextWriter(workers[draft].address, workers["target"].address) as writer:
        return writer.write(PROMPT, config)


def accepted_lengths(drafted: Sequence[int], acceptance: float) -> list[int]:
    """What rounds that draft so many tokens accept when the positions are right that the seed says."""
    right = forced(range(LENGTH), len(PROMPT), acceptance, seed=3).right
    position, found = 0, []
    for depth in drafted:
        here = right[position : position + depth]
        found.append(here.index(False) if False in here else depth)
        position += found[-1] + 1
    return found


@pytest.mark.parametrize("draft", KINDS)
@pytest.mark.parametrize("acceptance", [0.0, 0.6, 1.0])
def test_exactly_the_positions_of_the_seed_are_accepted(
    workers: dict[str, Worker], draft: str, acceptance: float
) -> None:
    alone = write(workers, draft, gamma=0).output_tokens
    for gamma in (1, 6):
        result = write(workers, draft, gamma=gamma, draft_acceptance=acceptance)
        assert result.output_tokens == alone
        drafted = [r.drafted for r in result.rounds]
        assert [r.accepted for r in result.rounds] == accepted_lengths(drafted, acceptance)
        if draft != "ngram":  # which proposes nothing where it finds nothing
            assert drafted[0] == 0  # the first token is the target's own
            assert set(drafted[1 : -gamma - 1]) <= {gamma}


@pytest.mark.parametrize("mode", ["sync", "overlap", "lookahead"])
@pytest.mark.parametrize(("tree", "temperature"), [("chain", 0), ("3x2", 0.8), ("dynamic-12x3", 0)])
def test_in_every_mode_and_tree_the_text_is_the_targets_and_drafts_are_right_as_often(
    workers: dict[str, Worker], mode: str, tree: str, temperature: float
) -> None:
    settings = {"mode": mode, "temperature": temperature}
    alone = write(workers, "noisy", gamma=0, **settings).output_tokens
    for acceptance, gamma in ((0.6, 3), (0.6, "auto")):
        result = write(workers, "noisy", gamma=gamma, tree=tree, draft_acceptance=acceptance, **settings)
        assert result.output_tokens == alone
        drafted = [r.drafted for r in result.rounds]
        assert [r.accepted for r in result.rounds] == accepted_lengths(drafted, acceptance)


def test_a_share_of_the_positions_is_right_and_does_not_depend_on_where_a_window_begins() -> None:
    whole = forced(range(5000), 100, 0.8, seed=1)
    assert 0.78 < sum(whole.right) / 5000 < 0.82
    assert forced(range(10), 107, 0.8, seed=1).right == whole.right[7:17]
    assert forced(range(5000), 100, 0.8, seed=2).right != whole.right


@pytest.mark.parametrize(
    "message",
    [{"tokens": [1, 2], "right": [True]}, {"tokens": [1] * (MOST_FORCED + 1), "right": [True] * (MOST_FORCED + 1)}],
)
def test_a_message_that_does_not_fit_together_is_refused(workers: dict[str, Worker], message: dict[str, Any]) -> None:
    servicer: Any = workers["noisy"].servicer
    assert isinstance(servicer, DraftServicer)
    assert isinstance(servicer.config, DraftWorkerConfig)
    with pytest.raises(InvalidRequest, match=f"tokens and right have one length, at most {MOST_FORCED}"):
        servicer._settings(pb.GenerateDraftsRequest(max_draft_tokens=2, forced=pb.Forced(**message)))


def test_the_name_of_the_draft_says_that_it_is_synthetic() -> None:
    made = OrchestratorConfig(gamma=3, draft_acceptance=0.8, draft_name="mine")
    assert made.draft_name == "mine-synthetic-0.8"
    assert OrchestratorConfig(**made.model_dump()).draft_name == "mine-synthetic-0.8"
    assert OrchestratorConfig(gamma=0, draft_acceptance=0.8).draft_name == "draft"
    with pytest.raises(ValueError, match="needs a text that is known beforehand"):
        OrchestratorConfig(draft_acceptance=0.8, sampling="rejection", temperature=1)
    with pytest.raises(ValueError, match="with lookup the text drafts too"):
        OrchestratorConfig(draft_acceptance=0.8, lookup=2)
