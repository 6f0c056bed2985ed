"""A draft made by the workflow: what is planned for it, a sweep with it, and the trial recipe in full."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from safetensors import safe_open

from specsplit.decoding.growth import DraftSettings
from specsplit.decoding.loop import speculate
from specsplit.distill.acceptance import InTargetTokens
from specsplit.engines.hidden_states import HiddenStatesHead
from specsplit.engines.transformers import CausalLM
from specsplit.io import sha256_file
from specsplit.models.tokenizer import TextCodec
from specsplit.models.vocabulary import load_vocabulary

ROOT = Path(__file__).parents[2]
STEPS = {"distill_write_data": 1, "distill_train": 1, "distill_measure": 1, "distill_card": 1}
TINY = {
    **{"name": "mine", "tokens": 400, "user_temperature": 4, "max_user_tokens": 3, "max_answer_tokens": 16},
    **{"write_batch": 64, "top_k": 8, "vocab_size": 64, "batch_size": 8, "validation_texts": 4, "gamma": 3},
}
MADE = {"source": "local", "path": "results/distill/mine/draft"}


def test_what_is_planned_for_a_distilled_draft(workspace):
    """By its own name all four steps; for a sweep with it the two that make it, before the model is prepared."""
    workspace.config["distill"] = TINY
    prepared = {"prepare_model": 1, "prepare_dataset": 1}
    assert workspace.planned(target="distill") == {
        **{"distill": 1, "settings": 9, "operation": 1},
        **{**STEPS, **prepared},
    }
    workspace.config["models"]["made"] = MADE
    workspace.config["draft"] = {"model": "made"}
    text = workspace.run("--dry-run", "--printshellcmds")
    commands = {word: line for line in text.splitlines() for word in re.findall(r"specsplit distill (\S+)", line)}
    assert set(commands) == {"write-data", "train"}
    assert "--held-out prompts.jsonl" in commands["write-data"]
    told = "results/settings/distill/train/settings.json"
    assert told in commands["train"]
    workspace.run(target=told)
    assert json.loads((workspace.folder / told).read_text())["run"]["vocab_size"] == 64
    assert text.index("specsplit distill train") < text.index(
        "specsplit prepare-model --local results/distill/mine/draft"
    )
    assert text.count("specsplit prepare-model") == 2


@pytest.mark.slow
def test_a_sweep_with_a_distilled_draft(workspace):
    """Lossless with a draft that knows half of the tokens; a change of the training makes draft and runs anew."""
    workspace.config["distill"] = TINY
    workspace.config["models"]["made"] = MADE
    workspace.config["draft"] = {"model": "made", "lookup": 0, "p_min": 0}
    workspace.run()
    results = workspace.folder / "results"
    summary = pd.read_csv(results / "summary.csv")
    summary = summary[summary["setup"] == "workers"]
    assert list(summary["gamma"]) == [0, 1, 3]
    assert (summary["lossless"] == 1).all()
    manifest = json.loads((workspace.folder / "resources" / "models" / "made" / "model.json").read_text())
    run = json.loads((results / "runs" / "gamma_3" / "run.json").read_text())
    assert run["workers"]["draft"]["weights_sha256"] == manifest["fingerprint"]["weights_sha256"]
    assert workspace.planned() == {}
    workspace.run(target="distill")
    assert workspace.planned() == workspace.planned(target="distill") == {}
    workspace.config["distill"] = {**TINY, "epochs": 1, "checkpoint_every": 7}
    planned = workspace.planned()
    assert planned["distill_train"] == planned["prepare_model"] == 1
    assert planned["benchmark"] == 2
    assert "distill_write_data" not in planned
    workspace.config["distill"] = {**TINY, "checkpoint_every": 7, "gamma": 2}
    assert set(workspace.planned(target="distill")) == {
        *("distill", "distill_measure", "distill_card"),
        *("settings", "operation"),
    }


@pytest.mark.slow
def test_a_head_that_reads_hidden_states(workspace):
    """Written, trained, measured and described by the same rules; the acceptance of its card is that of the reference
    loop, and a sweep with it is lossless."""
    workspace.config["distill"] = {**TINY, "kind": "hidden_states", "state_layers": [0, 1, 2], "unroll_steps": 2}
    workspace.run(target="distill")
    folder = workspace.folder / "results" / "distill" / "mine"
    manifest = json.loads((folder / "data" / "manifest.json").read_text())
    assert manifest["state_layers"] == [0, 1, 2]
    assert "bytes a token" in (workspace.folder / "results/logs/distill/mine_write_data.log").read_text()
    card = (folder / "draft" / "MODEL_CARD.md").read_text()
    for row in by_loop(workspace, folder / "draft").itertuples():
        assert f"| {row.position} | {row.reached} | {row.accepted} |" in card
    workspace.config["models"]["made"] = MADE
    workspace.config["draft"] = {"model": "made", "dtype": "float32", "lookup": 0, "p_min": 0}
    workspace.config["workers"] |= {"engine": "transformers"}
    workspace.run()
    summary = pd.read_csv(workspace.folder / "results" / "summary.csv")
    assert (summary[summary["setup"] == "workers"]["lossless"] == 1).all()
    workspace.config["distill"] = {**workspace.config["distill"], "unroll_steps": 3}
    planned = workspace.planned(target="distill")
    assert planned["distill_train"] == 1
    assert "distill_write_data" not in planned


def by_loop(workspace, draft):
    """Acceptance by position of a head, counted from the rounds of the reference loop."""
    target = Path(workspace.config["models"]["tiny"]["path"])
    head, codec = HiddenStatesHead.load(draft, dtype="bfloat16", device="cpu", target=target), TextCodec.load(target)
    model = InTargetTokens(head, load_vocabulary(draft, target, head.vocab_size))
    asked = DraftSettings(TINY["gamma"], stop_token_ids=frozenset([2]))
    rounds = []
    for line in (workspace.folder / "prompts.jsonl").read_text().splitlines():
        prompt = codec.encode(json.loads(line)["prompt"])
        rounds += speculate(CausalLM.load(target, device="cpu"), model, prompt, asked, max_new_tokens=12)
    counted = [
        (place, sum(r.accepted >= place - 1 < len(r.tree) for r in rounds), sum(r.accepted >= place for r in rounds))
        for place in range(1, TINY["gamma"] + 1)
    ]
    return pd.DataFrame([row for row in counted if row[1]], columns=["position", "reached", "accepted"])


@pytest.mark.slow
@pytest.mark.model
def test_the_trial_recipe(workspace):
    """config/examples/distill_test.yaml as it is, twice: the same bytes, of a draft that is small and loads."""
    raw = yaml.safe_load((ROOT / "config" / "examples" / "distill_test.yaml").read_text())
    name = "smollm2-135m-instruct"
    prepared = ROOT / "resources" / "models" / name
    workspace.config = raw
    if (prepared / "model.json").is_file():
        workspace.config |= {"models": {"here": {"source": "local", "path": str(prepared)}}}
        workspace.config |= {"target": {"model": "here"}, "draft": {"model": "here"}}
    shutil.copytree(ROOT / "resources" / "prompts", workspace.folder / "resources" / "prompts")
    folder = workspace.folder / "results" / "distill" / "test"
    files = ("draft/model.safetensors", "draft/draft_to_target.json", "loss.csv", "acceptance.csv")
    found = []
    for _ in range(2):
        workspace.run(target="distill")
        manifest = json.loads((folder / "data" / "manifest.json").read_text())
        found.append((manifest["data_sha256"], *(sha256_file(folder / name) for name in files)))
        if len(found) == 1:
            shutil.move(folder, workspace.folder / "first")
    assert found[0] == found[1]
    losses = pd.read_csv(folder / "loss.csv")
    evaluated = losses["validation_loss"].dropna()
    assert evaluated.iloc[-1] < 0.8 * evaluated.iloc[0]
    acceptance = pd.read_csv(folder / "acceptance.csv")
    assert acceptance["position"].iloc[0] == 1
    assert acceptance["acceptance_rate"].between(0, 1).all()
    with safe_open(folder / "draft" / "model.safetensors", framework="np") as weights:
        assert weights.get_slice("model.embed_tokens.weight").get_shape() == [1024, 576]
    card = (folder / "draft" / "MODEL_CARD.md").read_text()
    assert manifest["data_sha256"] in card
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
