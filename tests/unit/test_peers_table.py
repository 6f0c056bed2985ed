"""The race against Hugging Face's decoding: whose turn it is, what is compared, and the ratios."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from specsplit.analysis.peers_table import summarize_peers, write_peers
from specsplit.client.result import Round, SpeculativeResult
from specsplit.client.writer import TextWriter
from specsplit.errors import UserError
from specsplit.experiment import llama_cpp
from specsplit.experiment.peer_race import Ours, PeerRecord, race
from specsplit.experiment.peer_run import GivenModel, check_models, why_left_out
from specsplit.experiment.peers import Peer, PeerText
from specsplit.experiment.records import Request
from specsplit.settings.measure import BenchSettings
from specsplit.settings.run import OrchestratorConfig

REQUESTS = [Request("a", "chat", [5, 6]), Request("b", "code", [7])]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("generate", "hf_generate"),
        ("assisted", "hf_assisted"),
        ("assisted-5", "hf_assisted_5"),
        ("prompt-lookup", "hf_prompt_lookup"),
        ("llama.cpp", "llama_cpp"),
        ("llama.cpp-draft", "llama_cpp_draft"),
        ("llama.cpp-prompt-lookup", "llama_cpp_prompt_lookup"),
    ],
)
def test_peers_have_names(text: str, label: str) -> None:
    assert Peer.parse(text).label == label


@pytest.mark.parametrize("text", ["", "assisted-0", "assisted-x", "generate-5", "beam", "llama.cpp-5", "llama"])
def test_other_peers_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--baseline = .*should match"):
        BenchSettings.load({"baseline": [text]})


class FakeHuggingFace:
    """Writes three tokens, the last one wrong for request b."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def write(self, peer: Peer, prompt_ids: Sequence[int], *, max_tokens: int, stop_ids: Sequence[int]) -> PeerText:
        self.log.append(peer.label)
        assert (max_tokens, list(stop_ids)) == (3, [2])
        last = 9 if list(prompt_ids) == [7] else 3
        return PeerText([1, 1, last], "length", [1, 1, 1], [10.0, 30.0, 50.0], 10.0)

    def margin(self, context: Sequence[int], token: int, other: int) -> float:
        assert (list(context), token, other) == ([7, 1, 1], 3, 9)
        return 0.25


@pytest.fixture
def raced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[list[str], list[dict[str, str]]]]:
    def run(**options: Any) -> tuple[list[str], list[dict[str, str]]]:
        log: list[str] = []

        def write(self: TextWriter, prompt_ids: list[int], config: OrchestratorConfig, **_: Any) -> SpeculativeResult:
            log.append(f"gamma_{config.gamma}")
            rounds = [Round(1, 1, 1, 1, *[0.0] * 7), Round(2, 0, 0, 0, *[0.0] * 7)]
            return SpeculativeResult([1, 1, 3], "length", rounds, 20.0, 40.0)

        monkeypatch.setattr(TextWriter, "__enter__", lambda self: self)
        monkeypatch.setattr(TextWriter, "__exit__", lambda *_: None)
        monkeypatch.setattr(TextWriter, "write", write)
        monkeypatch.setattr("specsplit.experiment.peer_race.SETTLE_S", 0.0)
        worker: Any = SimpleNamespace(address="x", description=SimpleNamespace(max_context=64, eos_token_ids=[2]))
        configs = [OrchestratorConfig(gamma=gamma, max_output_tokens=3) for gamma in (0, 4)]
        ours = [
            Ours(f"gamma_{c.gamma}", c, dict.fromkeys(("draft", "target") if c.gamma else ("target",), worker))
            for c in configs
        ]
        output = tmp_path / "peers_requests.csv"
        hugging_face: Any = FakeHuggingFace(log)
        race(REQUESTS, ours, {Peer("generate"): hugging_face}, hugging_face, output, **options)
        with output.open(newline="") as file:
            return log, list(csv.DictReader(file))

    return run


def test_every_contender_takes_its_turn_on_every_request_in_a_moving_order(raced) -> None:
    log, rows = raced(warmup=1, repeats=2)
    names = ["gamma_0", "gamma_4", "hf_generate"]
    assert log[:3] == names  # the warm-up
    turns = [log[start : start + 3] for start in range(3, len(log), 3)]
    assert turns == [names, [*names[1:], names[0]], [*names[1:], names[0]], [names[2], *names[:2]]]
    assert [(row["contender"], row["place"]) for row in rows[3:6]] == [
        ("gamma_4", "1"),
        ("hf_generate", "2"),
        ("gamma_0", "3"),
    ]
    assert [(row["request_id"], row["repeat"]) for row in rows[::3]] == [("a", "1"), ("b", "1"), ("a", "2"), ("b", "2")]


def test_texts_are_compared_with_our_target_alone(raced) -> None:
    _, rows = raced(warmup=0, repeats=1)
    found = {(row["contender"], row["request_id"]): row for row in rows}
    assert all(row["identical"] == "True" for row in rows if row["engine"] == "specsplit")
    same, other = found["hf_generate", "a"], found["hf_generate", "b"]
    assert (same["identical"], same["first_divergence"], same["margin"]) == ("True", "", "")
    assert (other["identical"], other["first_divergence"], other["margin"]) == ("False", "2", "0.25")


def test_times_mean_the_same_for_both_engines(raced) -> None:
    _, rows = raced(warmup=0, repeats=1)
    ours = next(row for row in rows if row["contender"] == "gamma_4")
    theirs = next(row for row in rows if row["contender"] == "hf_generate")
    # Ours: two tokens after 20 ms, one after 40. Theirs: one after 10, 30 and 50 ms each.
    assert [float(ours[name]) for name in ("ttft_ms", "tpot_ms", "itl_ms", "total_latency_ms")] == [20, 10, 20, 40]
    assert [float(theirs[name]) for name in ("ttft_ms", "tpot_ms", "itl_ms", "total_latency_ms")] == [10, 20, 20, 50]
    assert (ours["num_rounds"], theirs["num_rounds"]) == ("2", "3")


def table(rows: Sequence[tuple[str, str, int, float, bool]]) -> pd.DataFrame:
    """contender, request, repeat, total latency (10 ms of it TTFT), identical; 11 tokens each."""
    return pd.DataFrame(
        [
            {
                **dict.fromkeys(field.name for field in fields(PeerRecord)),
                "contender": contender,
                "engine": "transformers" if contender.startswith("hf") else "specsplit",
                "request_id": request,
                "repeat": repeat,
                "generated_tokens": 11,
                "num_rounds": 5,
                "ttft_ms": 10.0,
                "tpot_ms": (total - 10) / 10,
                "itl_ms": (total - 10) / 10,
                "total_latency_ms": total,
                "identical": identical,
            }
            for contender, request, repeat, total, identical in rows
        ]
    )


def test_ratios_are_of_medians_over_repeats() -> None:
    rows = []
    times = (("a", 110.0, 210.0), ("b", 60.0, 110.0), ("c", 210.0, 410.0))
    for request, ours, theirs in (*times, *((name + "2", *both) for name, *both in times)):
        for repeat, noise in ((1, 0.0), (2, 500.0), (3, 0.0)):  # one slow repeat decides nothing
            rows.append(("hf_assisted", request, repeat, theirs + noise, request[0] != "c"))
            rows.append(("gamma_5", request, repeat, ours + noise, True))
            rows.append(("gamma_0", request, repeat, 2 * theirs, True))
    summary = summarize_peers(table(rows), bootstrap_samples=200).set_index("contender")
    assert list(summary.index) == ["gamma_0", "gamma_5", "hf_assisted"]
    assert summary.loc["gamma_5", "itl_vs_hf_assisted"] == pytest.approx(10 / 20)
    assert summary.loc["gamma_5", "itl_vs_hf_assisted_ci_low"] == pytest.approx(0.5)  # half on every prompt
    assert summary.loc["gamma_5", "latency_vs_hf_assisted"] == pytest.approx(380 / 730)
    assert summary.loc["hf_assisted", "itl_vs_hf_assisted"] == 1
    assert summary.loc["hf_assisted", "identical"] == pytest.approx(2 / 3)
    assert summary.loc["gamma_5", "tpot_ms_median"] == pytest.approx(10.0)
    assert list(summary["repeats"]) == [3, 3, 3]


def test_texts_too_short_for_a_time_per_token_count_on_neither_side() -> None:
    requests = table([(name, request, 1, 110.0, True) for name in ("gamma_0", "hf_generate") for request in "ab"])
    short = (requests["contender"] == "hf_generate") & (requests["request_id"] == "a")
    requests.loc[short, ["generated_tokens", "tpot_ms", "itl_ms"]] = [1, math.nan, math.nan]
    summary = summarize_peers(requests, bootstrap_samples=100).set_index("contender")
    assert summary.loc["gamma_0", "itl_vs_hf_generate"] == pytest.approx(1.0)
    assert math.isnan(summary.loc["gamma_0", "itl_vs_hf_generate_ci_low"])  # one request is left


def test_table_and_figure_are_made_from_the_rows(raced, tmp_path: Path) -> None:
    raced(warmup=0, repeats=1)
    written = write_peers(tmp_path, bootstrap_samples=100)
    assert [path.name for path in written] == ["peers.csv", "peers.png", "peers.svg"]
    assert all(path.stat().st_size for path in written)


def test_missing_rows_say_what_makes_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; `specsplit bench --baseline`"):
        write_peers(tmp_path)


def given(source: str = "local", weights: str = "w" * 64, tokenizer: str = "t", folder: Path = Path()) -> GivenModel:
    fingerprint = {"weights_sha256": weights, "tokenizer_sha256": tokenizer}
    return GivenModel(folder, {"name": "m", "source": {"source": source}, "fingerprint": fingerprint})


def points(device: str = "cpu", skip_layers: Sequence[int] = ()) -> list[Ours]:
    about = SimpleNamespace(weights_sha256="w" * 64, device=device, skip_layers=list(skip_layers))
    worker: Any = SimpleNamespace(address="x", description=about)
    configs = [OrchestratorConfig(gamma=gamma) for gamma in (0, 4)]
    return [
        Ours(f"gamma_{c.gamma}", c, dict.fromkeys(("draft", "target") if c.gamma else ("target",), worker))
        for c in configs
    ]


@pytest.mark.parametrize(
    ("target", "draft", "message"),
    [
        (None, None, "--target-model is missing"),
        (given(), None, "--draft-model is missing"),
        (given("synthetic"), None, "no weights that a peer could run: name a target with weights"),
        (given(weights="x" * 64), None, "a race is between the same models"),
        (given(), given(weights="x" * 64), "the draft worker at x serves other weights"),
    ],
)
def test_a_race_that_cannot_be_run_is_refused(target: Any, draft: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_models([Peer("assisted")], points(), {"target": target, "draft": draft})


def test_a_draft_is_raced_only_where_one_of_ours_has_it() -> None:
    with pytest.raises(UserError, match=r"--baseline llama\.cpp-draft: give a gamma above 0 as well"):
        check_models([Peer("llama.cpp-draft")], points()[:1], {"target": given(), "draft": given()})


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Folders of model files: safetensors, a GGUF file, an output head for a part of the vocabulary."""
    made = {name: tmp_path / name for name in ("safetensors", "gguf", "reduced")}
    for name, folder in made.items():
        folder.mkdir()
        (folder / ("model.gguf" if name == "gguf" else "model.safetensors")).touch()
    (made["reduced"] / "draft_to_target.json").write_text("[3, 1]")
    return made


# The peer, how target and draft are stored, what is special, and why the peer is left out (nothing: it is raced).
LEFT_OUT: list[tuple[str, str, str, dict[str, Any], str | None]] = [
    ("generate", "safetensors", "reduced", {}, None),
    ("prompt-lookup", "gguf", "reduced", {}, None),
    ("assisted", "gguf", "safetensors", {}, None),
    ("assisted-5", "safetensors", "reduced", {}, "m, the draft, has an output head for a part of the vocabulary"),
    ("assisted", "safetensors", "safetensors", {"source": "ngram"}, "m, the draft, has no weights"),
    ("assisted", "safetensors", "safetensors", {"source": "synthetic"}, "m, the draft, has no weights"),
    ("assisted", "safetensors", "safetensors", {"tokenizer": "u"}, "m, the draft, has another tokenizer"),
    ("llama.cpp", "gguf", "reduced", {}, None),
    ("llama.cpp-prompt-lookup", "gguf", "reduced", {"source": "ngram"}, None),
    ("llama.cpp", "safetensors", "safetensors", {}, "it wants a GGUF file, and m, the target, is none"),
    ("llama.cpp", "gguf", "gguf", {"device": "cuda:0"}, "the workers compute on cuda:0"),
    ("llama.cpp", "gguf", "gguf", {"installed": False}, "xllamacpp is not installed: pip install 'specsplit[peers]'"),
    ("llama.cpp-draft", "gguf", "gguf", {}, None),
    ("llama.cpp-draft", "gguf", "reduced", {}, "m, the draft, has an output head for a part of the vocabulary"),
    ("llama.cpp-draft", "gguf", "safetensors", {}, "it wants a GGUF file, and m, the draft, is none"),
    ("llama.cpp-draft", "gguf", "gguf", {"tokenizer": "u"}, "m, the draft, has another tokenizer"),
    ("llama.cpp-draft", "gguf", "gguf", {"skip_layers": [1]}, "it cannot leave out layers of the draft"),
]


@pytest.mark.parametrize(("peer", "target", "draft", "special", "reason"), LEFT_OUT)
def test_a_peer_that_cannot_use_the_models_says_why(
    peer: str,
    target: str,
    draft: str,
    special: dict[str, Any],
    reason: str | None,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llama_cpp, "installed", lambda: special.get("installed", True))
    own = {key: value for key, value in special.items() if key in ("source", "tokenizer")}
    models = {"target": given(folder=folders[target]), "draft": given(folder=folders[draft], **own)}
    ours = points(**{key: value for key, value in special.items() if key in ("device", "skip_layers")})
    check_models([Peer.parse(peer)], ours, models)
    found = why_left_out(Peer.parse(peer), ours, models)
    assert (found is None) == (reason is None)
    assert (reason or "") in (found or "")


def test_who_was_left_out_is_a_row_with_the_reason(raced, tmp_path: Path) -> None:
    raced(warmup=0, repeats=1)
    why = {"hf_assisted": {"engine": "transformers", "reason": "no draft"}}
    (tmp_path / "peers_run.json").write_text(json.dumps({"left_out": why}))
    write_peers(tmp_path, bootstrap_samples=100)
    summary = pd.read_csv(tmp_path / "peers.csv").set_index("contender")
    assert list(summary.index) == ["gamma_0", "gamma_4", "hf_generate", "hf_assisted"]
    row = summary.loc["hf_assisted"].dropna()
    assert dict(row) == {"engine": "transformers", "requests": 0, "reason": "no draft"}
    assert list(summary["reason"].isna()) == [True, True, True, False]
    assert summary.loc["hf_generate", "first_divergence"] == 2
    assert math.isnan(summary.loc["gamma_4", "first_divergence"])
