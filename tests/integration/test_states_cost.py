"""What shipping hidden states costs: the measurement with a tiny head, and what is said of a table."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from specsplit.analysis.states_table import draw_states_cost, states_sentences
from specsplit.cli.main import main
from specsplit.launch.environment import REQUIRED
from specsplit.provenance.facts import beside_facts, read_run
from tiny_heads import make_tiny_head, save_tiny_head

from grpc_fixtures import Reference, noisy_copy, serving
from tiny_models import make_tokenizer

PROMPTS = [f"{word} and the quick brown fox" for word in ("hello", "one two", "jumps over")]
WIDTH, TOKENS = 32, 8  # of a hidden state; of each text
# Bytes of a position, as docs/hidden-states.md has them.
ON_PAPER = {
    ("draft", "bfloat16"): 3 * 2 * WIDTH,
    ("draft", "int8"): 3 * WIDTH + 4,
    ("target", "bfloat16"): 2 * WIDTH,
    ("target", "int8"): WIDTH + 4,
}


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SPECSPLIT_")]:
        monkeypatch.delenv(name)
    for name, value in REQUIRED.items():  # the command need not start anew
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def clients(tiny_model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Flags that name prompts, workers and tokenizer."""
    target = tiny_model_folder("llama")
    draft = noisy_copy(target, tmp_path_factory.mktemp("draft"), noise=0.03)
    head = save_tiny_head(make_tiny_head(Reference(target).model), tmp_path_factory.mktemp("head"), make_tokenizer())
    prompts = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": text[:3], "prompt": text}) + "\n" for text in PROMPTS))
    with (
        serving("target", target, hidden_states_draft=head) as one,
        serving("draft", draft) as other,
        serving("draft", head) as third,
    ):
        addresses = ["--target-addr", one.address, "--draft-addr", other.address, "--head-addr", third.address]
        yield ["states-cost", "--prompts", str(prompts), *addresses, "--tokenizer", str(target)]


def test_bytes_are_those_on_paper(clients: list[str], tmp_path: Path) -> None:
    table, figure = tmp_path / "hidden_states.csv", tmp_path / "hidden_states.png"
    network = ["--rtt-ms", "2", "--bandwidth-mbit", "0", "100", "--window", "0", "4"]
    main([*clients, "--output", str(table), "--figure", str(figure), *network, "--output-tokens", str(TOKENS)])
    rows = pd.read_csv(table)
    assert len(rows) == (1 + 2 * 2 * 2) * 2
    assert (rows["lossless"] == 1).all()
    assert (rows["generated_tokens"] == TOKENS * len(PROMPTS)).all()
    assert rows.loc[rows["draft"] == "draft", ["project", "form", "window"]].isna().all(axis=None)
    assert (rows.loc[rows["draft"] == "draft", "latency_vs_draft"] == 1).all()
    assert rows["latency_vs_draft_ci_low"].isna().sum() == len(rows), "three prompts give no interval"
    received = rows["target_received_bytes_per_token"] * rows["generated_tokens"]
    alone = received[rows["draft"] == "draft"].mean()
    whole, windowed = rows["window"] == 0, rows["window"] == 4
    positions = sum(len(make_tokenizer().encode(text)) + TOKENS - 1 for text in PROMPTS)
    for (project, form), size in ON_PAPER.items():
        own = (rows["project"] == project) & (rows["form"] == form)
        assert received[own & whole].to_numpy() - alone == pytest.approx(positions * size, rel=0.3)
        assert received[own & windowed].max() < 0.7 * received[own & whole].min()
        sent = rows["draft_sent_bytes_per_token"] * rows["generated_tokens"]
        assert (sent[own & whole] > 0.7 * positions * size).all()
    facts = beside_facts(read_run(tmp_path / "hidden_states_run.json"))
    assert {fact.partition(": ")[0] for fact in facts if " worker" in fact.partition(": ")[0]} == {
        *("target worker", "draft worker states_cost.draft", "draft worker states_cost.head")  # not the sweep's draft
    }
    assert figure.stat().st_size
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_draft_that_reads_no_states_is_no_head(
    clients: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "t.csv"), "--project", "draft"]
    draft = clients[clients.index("--draft-addr") + 1]
    for flags, message in (
        (["--head-addr", draft], "reads no hidden states: name a head of this target by states_cost.head"),
        (["--head-addr", ""], "--head-addr is missing"),
        (
            ["--draft-addr", clients[clients.index("--head-addr") + 1]],
            "name a draft that reads none by states_cost.draft",
        ),
    ):
        with pytest.raises(SystemExit):
            main([*clients, *output, *flags])
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def made_up(ratios: dict[tuple[str, float], float], interval: float | None = 0.01) -> pd.DataFrame:
    """A table: ratio of the head to the draft by form and bandwidth."""
    common: dict[str, Any] = {"rtt_ms": 10.0, "texts": 6, "acceptance_length": 1.5, "ms_per_token": 30.0}
    rows = []
    for mbit in dict.fromkeys(mbit for _, mbit in ratios):
        kinds = {"draft": {"draft": "draft", "latency_vs_draft": 1.0}}
        kinds |= {
            form: {"draft": "head", "project": "target", "form": form, "window": 0, "latency_vs_draft": ratio}
            for (form, at), ratio in ratios.items()
            if at == mbit
        }
        for place, own in enumerate(kinds.values()):
            ends = {"latency_vs_draft_joint_low": None, "latency_vs_draft_joint_high": None}
            if interval is not None:
                low, high = own["latency_vs_draft"] - interval, own["latency_vs_draft"] + interval
                ends = {"latency_vs_draft_joint_low": low, "latency_vs_draft_joint_high": high}
            rows.append(
                {"bandwidth_mbit": mbit, "target_received_bytes_per_token": 100.0 + place} | common | own | ends
            )
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (made_up({("int8", 10): 1.4, ("int8", 0): 1.2}),
         ["In 0 of 2 cases", "in 2 slower", "the head never wins (2 bandwidths), in every way"]),
        (made_up({("int8", 10): 0.8, ("int8", 0): 0.7}), ["In 2 of 2 cases", "wins at every bandwidth (2)"]),
        (made_up({("int8", 10): 1.3, ("int8", 100): 0.9, ("int8", 0): 0.8}),
         ["In 2 of 3 cases", "in 1 slower", "At a round trip of 10 ms the head wins from 100 Mbit/s on (2 of 3"]),
        (made_up({("int8", 0): 0.8, ("int8", 10): 1.3}), ["wins at unlimited bandwidth alone"]),
        (made_up({("int8", 10): 0.8, ("int8", 100): 1.0, ("bfloat16", 10): 1.1, ("bfloat16", 100): 1.1}),
         ["in 1 the interval holds both", "wins at 10 Mbit/s alone, with one vector in int8",
          "never wins (2 bandwidths), with one vector in bfloat16"]),
        (made_up({("int8", 10): 0.5}, interval=None), ["No ratio has an interval"]),
    ],
)  # fmt: skip
def test_the_paragraph_says_what_the_table_says(table: pd.DataFrame, said: list[str], tmp_path: Path) -> None:
    text = " ".join(states_sentences(table))
    assert text.startswith("A token takes 100 bytes from the target with the draft that reads no hidden states, and 10")
    assert [words for words in said if words not in text] == [], text


def test_a_kind_is_a_line_and_a_round_trip_a_panel(tmp_path: Path) -> None:
    table = made_up({("int8", 10): 0.8, ("int8", 0): 1.0})
    paths = draw_states_cost(pd.concat([table, table.assign(rtt_ms=50.0)]), tmp_path / "figure.png")
    text = paths[1].read_text()
    assert [path.suffix for path in paths] == [".png", ".svg"]
    assert all(
        words in text for words in ("RTT 10 ms", "RTT 50 ms", "no limit", "one vector in int8", "reads no states")
    )
