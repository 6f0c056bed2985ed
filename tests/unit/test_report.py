"""The findings in words, the table for a screen, and the page that holds everything."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from specsplit.analysis.captions import CAPTIONS, FIGURES
from specsplit.analysis.conclusions import conclusions, lossless_sentence
from specsplit.analysis.costs import with_price
from specsplit.analysis.figures import draw_figures
from specsplit.analysis.findings import find_best
from specsplit.analysis.report import _chosen, write_report
from specsplit.analysis.summary_text import summary_table, text_table
from specsplit.analysis.tables import summarize
from specsplit.errors import UserError
from specsplit.experiment.columns import ROUND_COLUMNS
from specsplit.io import write_csv
from specsplit.settings.axes import CONFIGURATION
from specsplit.settings.configuration import load_pipeline_config
from specsplit.settings.measure import PriceSettings

from test_tables import a_request

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {"confidence": 0.95, "bootstrap_samples": 200, "seed": 0}


def a_sweep(latencies: dict[Any, float], requests: int = 8, **changes: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Requests whose latency is `latencies[gamma]` ms, give and take by request, and no rounds."""
    spread = [1 + 0.1 * math.sin(3 * i) for i in range(requests)]
    rows = [
        vars(a_request(f"p{i}", gamma, total_latency_ms=latency * spread[i], **({} if gamma == 0 else changes)))
        for gamma, latency in latencies.items()
        for i in range(requests)
    ]
    rounds = pd.DataFrame([], columns=[*ROUND_COLUMNS, *CONFIGURATION[1:]])
    return pd.DataFrame(rows).assign(matches_gamma0=pd.array([True] * len(rows), dtype="boolean")), rounds


def findings(latencies: dict[Any, float], **changes: Any) -> list[str]:
    requests, rounds = a_sweep(latencies, **changes)
    summary = summarize(requests, rounds, **SETTINGS)
    (finding,) = find_best(requests, rounds, summary, **SETTINGS)
    return finding.sentences()


def test_the_best_draft_length_with_its_interval() -> None:
    counted, sentence = findings({0: 1000.0, 1: 800.0, 3: 500.0})
    assert counted == "Compared on the 8 prompts that every configuration finished."
    assert sentence == "γ = 3 is fastest: a speedup of 2.00 (95 % interval 2.00 to 2.00) against the target alone."


def test_what_cannot_be_told_from_the_best_is_named() -> None:
    requests, rounds = a_sweep({0: 1000.0, 1: 500.0, 3: 500.0})
    third = requests["gamma"] == 3
    requests.loc[third, "total_latency_ms"] *= [0.9, 1.09] * 4  # faster on some prompts, slower on others
    summary = summarize(requests, rounds, **SETTINGS)
    (finding,) = find_best(requests, rounds, summary, **SETTINGS)
    assert finding.best["gamma"] == 3
    assert finding.ties == ("γ = 1",)
    assert finding.sentences()[-1] == "Not distinguishable from γ = 3 on these prompts: γ = 1."


def test_when_the_target_alone_is_fastest_the_best_draft_is_told() -> None:
    _, sentence = findings({0: 500.0, 1: 1000.0, 3: 800.0})
    assert sentence.startswith("The target alone is fastest. The best draft, γ = 3, has a speedup of 0.62 (95 %")


def test_one_request_gives_no_interval_and_says_so() -> None:
    sentences = findings({0: 1000.0, 1: 500.0}, requests=1)
    assert sentences == [
        "Compared on the 1 prompt that every configuration finished.",
        "γ = 1 had the largest speedup against the target alone: 2.00.",
        "There are too few requests to say how sure that is: an interval needs 6 requests.",
        "Not distinguishable from γ = 1 on these prompts: the target alone.",
    ]


def odd(latencies: dict[Any, float], requests: int = 8, lost: str = "", **changes: Any) -> str:
    """All that is said of a sweep of which `lost` says per prompt which gamma failed."""
    table, rounds = a_sweep(latencies, requests, **changes)
    for prompt, gamma in enumerate(lost):
        failed = (table["request_id"] == f"p{prompt}") & (table["gamma"].astype(str) == gamma)
        table.loc[failed, "status"], table.loc[failed, "matches_gamma0"] = "failed", None
    summary = with_price(summarize(table, rounds, **SETTINGS), PriceSettings(target_price=1.0))
    (finding,) = find_best(table, rounds, summary, **SETTINGS)
    said = [*finding.sentences(), *(text for texts in conclusions(summary, 0.95).values() for text in texts)]
    return " ".join([*said, *map(str, summary_table(summary)[1])])


NOTHING = re.compile(r"\b(nan|inf|None)\b|-0\.0|\b1 (prompts|texts|rounds|requests|configurations have)\b|:  ")


@pytest.mark.parametrize(
    ("said", "table"),
    [
        ("the 1 prompt that", lambda: odd({0: 1000.0, 3: 500.0}, 1)),
        ("Yes: the 1 text written with a draft is", lambda: odd({0: 1000.0, 3: 500.0}, 1)),
        ("No prompt of 4 was finished by every configuration", lambda: odd({0: 1000.0, 3: 500.0}, 4, "0303")),
        ("no network had two runs whose gamma 0", lambda: odd({0: 1000.0, 3: 500.0}, 4, "0303")),
        ("Nothing can be said of a speedup", lambda: odd({3: 500.0})),
        ("Nothing can be said of a speedup", lambda: odd({0: 1000.0, 3: 500.0}, generated_tokens=0)),
        ("Workers failed in 1 round;", lambda: odd({0: 1000.0, 3: 500.0}, 1, target_failures=1)),
        ("1 of 2 configurations has no gamma 0 of its own run", lambda: odd({0: 1000.0, 3: 500.0})),
        ("1 request failed and is in no mean", lambda: odd({0: 1000.0, 3: 500.0}, 8, "0")),
    ],
)
def test_what_is_said_of_odd_tables(said: str, table: Callable[[], str]) -> None:
    text = table()
    assert said in text
    assert not NOTHING.search(text), text


def test_a_share_is_all_only_when_it_is() -> None:
    table, rounds = a_sweep({0: 1000.0, 3: 500.0}, 3000)
    table.loc[table.index[-1], "matches_gamma0"] = False
    assert summary_table(summarize(table, rounds, **SETTINGS))[1][1][-2:] == ["99.9 %", "-"]


def test_the_target_alone_has_no_speedup_to_report() -> None:
    assert findings({0: 500.0}) == ["Only the target alone was run, so there is no speedup to report."]


def test_each_network_has_its_own_best() -> None:
    near, far = a_sweep({0: 1000.0, 1: 500.0}), a_sweep({0: 1500.0, 1: 1600.0})
    requests = pd.concat([near[0], far[0].assign(rtt_ms=14.0)], ignore_index=True)
    found = find_best(requests, near[1], summarize(requests, near[1], **SETTINGS), **SETTINGS)
    assert [(finding.where, finding.best["gamma"]) for finding in found] == [("RTT 0 ms", 1), ("RTT 14 ms", 0)]


def test_lossless_in_words() -> None:
    requests, rounds = a_sweep({0: 1000.0, 1: 500.0, 3: 400.0}, requests=4)
    assert lossless_sentence(summarize(requests, rounds, **SETTINGS)).startswith("Yes: each of the 8 texts")
    requests.loc[requests.index[-1], "matches_gamma0"] = False
    assert lossless_sentence(summarize(requests, rounds, **SETTINGS)) == (
        "No: 1 of 8 texts differs from that of the target alone (γ = 3)."
    )
    unknown = requests.assign(matches_gamma0=pd.array([pd.NA] * len(requests), dtype="boolean"))
    assert "Of 8 texts nothing can be said" in lossless_sentence(summarize(unknown, rounds, **SETTINGS))


def test_table_for_a_screen() -> None:
    requests, rounds = a_sweep({0: 1000.0, 3: 500.0}, mode="overlap")
    table = text_table(*summary_table(summarize(requests, rounds, **SETTINGS)))
    lines = table.splitlines()
    assert lines[0].split()[:2] == ["γ", "mode"]
    assert len({len(line) for line in lines}) == 1
    assert "2.00" in lines[3]
    assert "100 %" in lines[3]
    assert "nan" not in table


def test_captions_of_the_workflow_are_those_of_the_report() -> None:
    for name, caption in CAPTIONS.items():
        assert " ".join((ROOT / "workflow" / "report" / f"{name}.rst").read_text("utf-8").split()) == caption
    assert set(FIGURES) <= set(CAPTIONS)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with everything that a report needs."""
    folder = tmp_path_factory.mktemp("results")
    requests, rounds = a_sweep({0: 1000.0, 1: 800.0, 3: 500.0}, num_rounds=0)
    write_csv(requests, folder / "requests.csv")
    write_csv(summarize(requests, rounds, **SETTINGS), folder / "summary.csv")
    write_csv(rounds, folder / "per_round.csv")
    draw_figures(requests, rounds, folder / "figures", bootstrap_samples=100)
    run = {
        "command": "specsplit bench --gamma 3 --prompts <prompts>.jsonl",
        "started": "2025-01-31T12:00:00.5Z",
        "finished": "2025-01-31T12:01:00.5Z",
        "exit_code": 0,
        "workers": {
            "target": {"model": "big", "dtype": "float32", "device": "cpu", "threads": 2, "skip_layers": []},
            "draft": {"model": "small", "dtype": "int8", "device": "cpu", "threads": 2, "skip_layers": []},
        },
    }
    record = {
        "created": "2025-01-31T12:02:00Z",
        "complete": False,
        "checklist": [
            {"item": "seeds recorded", "ok": True, "detail": "seed 0"},
            {"item": "git commit known", "ok": False, "detail": "git: command not found"},
        ],
        "config": load_pipeline_config({}),
        "runs": [run],
        "models": [
            {
                "name": "smollm2-135m-instruct",
                "source": {"source": "huggingface", "repo": "someone/model", "revision": "abc123"},
                "fingerprint": {"weights_sha256": "f" * 64, "parameters": 134515008},
            }
        ],
        "dataset": {"count": 8, "source": "prompts.jsonl", "output_sha256": "e" * 64},
        "machine": {"hostname": "lab-7", "cpu_model": "A processor", "cores_usable": 2, "memory_bytes": 2**34},
        "gpu": {"gpus": [], "reason": "nvidia-smi: command not found"},
        "software": {"specsplit": "0.1.0", "python": "3.11", "packages": {"grpcio": "1.85"}},
        "git": {"commit": None, "reason": "git: command not found"},
    }
    (folder / "provenance").mkdir()
    (folder / "provenance" / "provenance.json").write_text(json.dumps(record))
    return folder


def page(results: Path, output: Path) -> str:
    write_report(results, output, **SETTINGS)
    return output.read_text("utf-8")


def test_a_reader_of_the_page_alone_gets_every_answer(results: Path, tmp_path: Path) -> None:
    text = page(results, tmp_path / "report.html")
    for answer in (
        "γ = 3 is fastest: a speedup of 2.00 (95 % interval 2.00 to 2.00)",
        "Yes: each of the 16 texts",
        "someone/model",
        "abc123",
        "134.5 million parameters",
        "smollm2-two-layers, int8",  # what auto was
        "draft: small, int8, on cpu",
        "f" * 64,
        "8 of prompts.jsonl",
        "e" * 64,
        "lab-7",
        "A processor, 2 cores usable",
        "16.0 GiB",
        "none (nvidia-smi: command not found)",
        "specsplit bench --gamma 3 --prompts &lt;prompts&gt;.jsonl",
        "2025-01-31 12:00:00 UTC",
        "✗ no",
        "“git commit known” (git: command not found)",
    ):
        assert answer in text, answer


def test_the_page_needs_no_other_file(results: Path, tmp_path: Path) -> None:
    text = page(results, tmp_path / "report.html")
    links = re.findall(r"(?:src|href)=\"([^\"]{0,40})", text)
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "http" not in re.sub(r"data:[^\"]+", "", text)
    assert text.count("data:image/svg+xml") == len(FIGURES) - 1  # nothing was drafted ahead


def test_tables_measured_beside_the_sweep_are_shown_when_there(results: Path, tmp_path: Path) -> None:
    assert "More measurements" not in page(results, tmp_path / "before.html")
    peers = results / "peers.csv"
    peers.write_text(
        "contender,requests,itl_ms_mean,itl_ms_ci_low,itl_ms_ci_high,latency_vs_hf_generate,identical\n"
        "<gamma_0>,8,12.3456789,11.111,13.999,,1\n"
    )
    try:
        text = page(results, tmp_path / "after.html")
        assert "itl ms</th>" in text
        assert "<td>&lt;gamma_0&gt;</td><td>12.3 [11.1, 14]</td><td>-</td><td>1</td>" in text
        peers.write_text("")
        with pytest.raises(UserError, match=r"peers\.csv: is empty"):
            page(results, tmp_path / "bad.html")
    finally:
        peers.unlink()


def test_a_missing_figure_is_named(results: Path, tmp_path: Path) -> None:
    figure = results / "figures" / "ttft.svg"
    kept = figure.read_bytes()
    figure.unlink()
    try:
        with pytest.raises(UserError, match=r"ttft\.svg: No such file or directory; make it with"):
            page(results, tmp_path / "report.html")
    finally:
        figure.write_bytes(kept)


def test_the_name_of_a_synthetic_draft_is_never_left_out() -> None:
    """What is the same in every row is, as a rule."""
    columns = ["gamma", "mode", "draft"]
    assert _chosen(pd.DataFrame([["1", "sync", "draft"]], columns=columns), ["*"])[0] == ["gamma"]
    assert _chosen(pd.DataFrame([["1", "sync", "draft-synthetic-0.8"]], columns=columns), ["*"])[0] == [
        "gamma",
        "draft",
    ]
