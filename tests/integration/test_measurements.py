"""The measurements beside the sweep, with tiny models behind real workers: race, capacity, context curve, overhead."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from specsplit.cli.main import main
from specsplit.errors import UserError
from specsplit.experiment import openai_load
from specsplit.experiment.hugging_face import HuggingFace
from specsplit.experiment.peers import Peer, PeerModel
from specsplit.launch.environment import REQUIRED

from grpc_fixtures import Reference, noisy_copy, serving

PROMPTS = {"p0": "hello", "p1": "the quick brown fox", "p2": "one two one two one"}


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("SPECSPLIT_")]:
        monkeypatch.delenv(name)
    for name, value in REQUIRED.items():  # the command need not start anew
        monkeypatch.setenv(name, value)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def folders(tiny_model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Target and a draft that is right some of the time."""
    target = tiny_model_folder("llama")
    return target, noisy_copy(target, tmp_path_factory.mktemp("draft"), noise=0.03)


@pytest.fixture(scope="module")
def clients(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Flags that name prompts, workers and tokenizer."""
    target, draft = folders
    prompts = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": name, "prompt": text}) + "\n" for name, text in PROMPTS.items()))
    with serving("target", target, max_sessions=4) as one, serving("draft", draft, max_sessions=4) as other:
        addresses = ["--target-addr", one.address, "--draft-addr", other.address]
        yield ["--prompts", str(prompts), *addresses, "--tokenizer", str(target)]


def test_hugging_face_writes_its_own_text_in_every_way(folders: tuple[Path, Path]) -> None:
    target, draft = folders
    prompt = [5, 6, 7, 5, 6, 7, 5, 6]
    text = Reference(target).text(prompt, 12)
    stop = text[7]
    with HuggingFace(
        PeerModel(target, "float32", "cpu"), PeerModel(draft, "float32", "cpu", skip_layers=(1,)), threads=1
    ) as peers:
        assert peers.description["threads"] == 1
        for name in ("generate", "assisted", "assisted-3", "prompt-lookup"):
            whole = peers.write(Peer.parse(name), prompt, max_tokens=12, stop_ids=[])
            assert (whole.output_tokens, whole.finish_reason) == (text, "length")
            assert sum(whole.chunks) == 12
            assert whole.arrived_ms == sorted(whole.arrived_ms)
            assert whole.ttft_ms == whole.arrived_ms[0]
            ended = peers.write(Peer.parse(name), prompt, max_tokens=12, stop_ids=[stop])
            assert (ended.output_tokens, ended.finish_reason) == (text[: text.index(stop)], "eos")
        assert len(peers.write(Peer("assisted", 3), prompt, max_tokens=12, stop_ids=[]).chunks) < 12
        assert peers.margin(prompt, text[0], (text[0] + 1) % 128) > 0


def test_a_model_that_hugging_face_cannot_load_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="no weights; expected model"),
        HuggingFace(PeerModel(tmp_path, "float32", "cpu"), None, threads=1),
    ):
        raise AssertionError("it has no model")


@pytest.mark.slow
def test_a_race_from_the_command_line(folders: tuple[Path, Path], clients: list[str], tmp_path: Path) -> None:
    models = ["--target-model", str(folders[0]), "--draft-model", str(folders[1])]
    race = ["--baseline", "generate", "assisted-3", "--gamma", "3", "--mode", "sync", "overlap", "--repeats", "2"]
    rest = ["--results-dir", str(tmp_path), "--max-output-tokens", "8", "--ignore-eos"]
    main(["bench", *clients, *models, *race, *rest])
    rows = pd.read_csv(tmp_path / "peers_requests.csv")
    assert len(rows) == 5 * 3 * 2
    assert rows["identical"].all()
    assert (rows["generated_tokens"] == 8).all()
    summary = pd.read_csv(tmp_path / "peers.csv").set_index("contender")
    assert list(summary.index) == ["gamma_0", "gamma_3", "overlap_gamma_3", "hf_assisted_3", "hf_generate"]
    assert summary.loc["hf_generate", "itl_vs_hf_generate"] == 1
    assert (summary["itl_vs_hf_assisted_3"] > 0).all()
    run = json.loads((tmp_path / "peers_run.json").read_text())
    assert run["hugging_face"]["threads"] == run["ours"]["gamma_0"]["workers"]["target"]["threads"]
    assert (tmp_path / "figures" / "peers.png").stat().st_size
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "0.7"], "a race is greedy"),
        (["--rtt-ms", "5"], "without a simulated network"),
        (["--max-rounds", "3"], "Hugging Face knows no such limit"),
        ([], "--target-model is missing"),
    ],
)
def test_a_race_that_makes_no_sense_is_refused(
    clients: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        main(["bench", *clients, "--baseline", "generate", "--results-dir", str(tmp_path), *flags])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_clients_at_once_get_the_texts_of_one(clients: list[str], tmp_path: Path) -> None:
    load = ["--clients", "3", "--gamma", "0", "3", "--requests", "13", "--max-output-tokens", "6", "--ignore-eos"]
    main(["capacity", *clients, "--results-dir", str(tmp_path), *load])
    rows = pd.read_csv(tmp_path / "capacity_requests.csv")
    assert rows.groupby(["gamma", "clients"]).size().to_dict() == {(0, 1): 13, (0, 3): 13, (3, 1): 13, (3, 3): 13}
    assert rows["matches_single"].all()
    assert sorted(rows.loc[rows["clients"] == 3, "client"].unique()) == [0, 1, 2]
    assert rows.groupby(["gamma", "clients", "request_id", "repeat"]).size().eq(1).all()
    assert rows["repeat"].max() == 5  # thirteen requests of three prompts
    assert rows.groupby("request_id")["output_sha256"].nunique().eq(1).all()
    summary = pd.read_csv(tmp_path / "capacity.csv")
    assert list(summary["clients"]) == [1, 3, 1, 3]
    assert list(summary.loc[summary["clients"] == 1, "gain"]) == [1, 1]
    assert (tmp_path / "figures" / "capacity.svg").stat().st_size


@pytest.mark.slow
def test_the_server_under_a_load_client(clients: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECSPLIT_SERVE_API_KEY_FILE", "of-another-server")
    table = tmp_path / "openai_load.csv"
    load = ["--clients", "1", "2", "--gamma", "2", "--requests", "8", "--max-output-tokens", "24"]
    main(["openai-load", *clients, "--output", str(table), *load])
    rows = pd.read_csv(table)
    assert list(rows["gamma"]) == [0, 0, 2, 2]
    assert list(rows["clients"]) == [1, 2] * 2
    assert (rows["requests"] == 8).all()
    assert list(rows["gain"])[:2] == [1, 1]
    assert (rows[["tokens_per_second", "ttft_ms_median", "tpot_ms_median", "gain"]] > 0).all(axis=None)
    assert rows["acceptance_length"].isna().tolist() == [True, True, False, False]
    assert rows["client"].str.startswith("llama-benchy ").all()


def test_a_load_client_that_is_not_installed_is_told(
    clients: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise openai_load.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(openai_load, "metadata", SimpleNamespace(**vars(openai_load.metadata) | {"version": version}))
    with pytest.raises(SystemExit):
        main(["openai-load", *clients, "--output", str(tmp_path / "openai_load.csv")])
    assert "pip install 'specsplit[load]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_requests_that_arrive_at_a_rate_and_the_one_that_is_sustained(clients: list[str], tmp_path: Path) -> None:
    load = ["--clients", "2", "--rates", "50", "20", "--gamma", "0", "2", "--requests", "8", "--arrivals", "gamma"]
    rest = ["--burstiness", "0.5", "--saturation-steps", "2", "--max-output-tokens", "6", "--ignore-eos"]
    main(["capacity", *clients, "--results-dir", str(tmp_path), *load, *rest])
    rows = pd.read_csv(tmp_path / "capacity_requests.csv")
    opened = rows[rows["arrivals"] == "gamma"]
    assert rows["matches_single"].all()
    assert opened.groupby(["gamma", "rate"]).size().tolist() == [8] * 8
    assert (opened["started_ms"] >= opened["due_ms"] - 1).all()
    for _, level in opened.groupby("rate"):  # the same moments for both gammas
        if level["gamma"].nunique() == 2:
            due = [own.sort_values("client")["due_ms"].tolist() for _, own in level.groupby("gamma")]
            assert due[0] == pytest.approx(due[1])
    summary = pd.read_csv(tmp_path / "capacity.csv")
    assert list(summary["arrivals"]) == [*["closed"] * 2, *["gamma"] * 4] * 2
    assert list(summary["rate"].dropna())[:2] == [20, 50]
    assert summary.loc[(summary["gamma"] == 2) & (summary["clients"] > 0), "speedup_at_load"].notna().all()


def test_too_few_requests_for_so_many_clients_are_refused(
    clients: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["capacity", *clients, "--results-dir", str(tmp_path), "--clients", "64", "--requests", "32"])
    assert "64 clients need at least 256" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_cost_of_a_token_against_its_context(
    clients: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, figure = tmp_path / "curve.csv", tmp_path / "curve.png"
    flags = ["--length", "16", "64", "4096", "--gamma", "0", "3", "--output-tokens", "10", "--texts", "2"]
    main(["context-curve", *clients, "--output", str(table), "--figure", str(figure), *flags])
    assert "left out, for the workers hold 128 tokens: 4096" in capsys.readouterr().out
    rows = pd.read_csv(table)
    assert list(zip(rows["gamma"], rows["context_tokens"], strict=True)) == [(0, 16), (0, 64), (3, 16), (3, 64)]
    assert (rows["output_tokens"] == 10).all()
    assert rows["itl_ms_median"].notna().all()
    assert figure.stat().st_size
    with pytest.raises(SystemExit):
        main(["context-curve", *clients, "--output", str(table), "--length", "4096"])
    assert "it exceeds the 128 of a worker" in capsys.readouterr().err


def test_overhead_of_models_that_take_no_time(tmp_path: Path) -> None:
    table = tmp_path / "overhead.csv"
    main(["overhead", "--output", str(table), "--mode", "sync", "--gamma", "2", "--tokens", "8", "--texts", "1"])
    rows = pd.read_csv(table)
    assert list(zip(rows["mode"], rows["gamma"], strict=True)) == [("sync", 0), ("sync", 2)]
    assert (rows["overhead_ms_median"] > 0).all()
    assert (rows["overhead_ms_median"] <= rows["round_ms_median"]).all()
