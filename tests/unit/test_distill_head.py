"""Heads that read hidden states: what the writer keeps for them, and that they are trained as they draft."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from specsplit.distill.decoder import BatchDecoder
from specsplit.distill.head_training import make_head
from specsplit.distill.shards import Text, read_texts
from specsplit.distill.training import Row, Trainer
from specsplit.distill.writing import Writer, write_texts
from specsplit.engines.hidden_states import HiddenStatesHead
from specsplit.engines.transformers import CausalLM
from specsplit.errors import UserError
from specsplit.io import sha256_file
from specsplit.models.tokenizer import TextCodec
from specsplit.settings.distill import TrainingSettings, WritingSettings

LAYERS = [0, 1, 2]
WRITING = {
    **{"kind": "hidden_states", "state_layers": LAYERS, "tokens": 300, "max_user_tokens": 3, "max_answer_tokens": 10},
    **{"write_batch": 40, "top_k": 5, "answer_temperature": [0], "user_temperature": 8, "threads": 1},
}
TRAINING = {
    **{"kind": "hidden_states", "vocab_size": 60, "epochs": 3, "batch_size": 4, "learning_rate": 3e-3, "threads": 1},
    **{"validation_texts": 8, "evaluate_every": 5, "checkpoint_every": 4, "draft_dtype": "float32", "unroll_steps": 3},
}


@pytest.fixture(scope="module")
def target(tiny_model_folder: Any) -> Path:
    folder: Path = tiny_model_folder("llama")
    return folder


@pytest.fixture(scope="module")
def written(target: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[Text]]:
    """The manifest and the texts, as read from the shards."""
    folder = tmp_path_factory.mktemp("data")
    writer = Writer(CausalLM.load(target, device="cpu"), TextCodec.load(target), WritingSettings.load(WRITING))
    write_texts(writer, folder, {"target": {"model": "tiny"}, "held_out": {}})
    return read_texts(folder / "manifest.json")


def make(target: Path, written: tuple[dict[str, Any], list[Text]], **changes: Any) -> tuple[Any, TrainingSettings]:
    settings = TrainingSettings.load({**TRAINING, **changes})
    torch.manual_seed(settings.seed)
    model = CausalLM.load(target, device="cpu")
    return make_head(model, written[1], written[0], settings, torch.device("cpu"))[0], settings


# ---- what the writer keeps


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "qwen3-mixed"])
@torch.inference_mode()
def test_the_decoder_writes_and_notes_what_plain_passes_do(tiny_model: Callable[..., Any], architecture: str) -> None:
    """Greedy texts, likeliest tokens and states, of prompts of one length and several, some of which end early."""
    model = tiny_model(architecture)
    for rows in ([[1, 40, 41, 50], [1, 40, 42, 5, 6, 7], [1, 40, 33]], [[1, 9]] * 2):
        answers = BatchDecoder(CausalLM(model)).generate(rows, 20, 0.0, [2, 119], 0, top_k=4, layers=(1, 2))
        for row, answer in zip(rows, answers, strict=True):
            plain = model(torch.tensor([row + answer.tokens]), output_hidden_states=True)
            top = plain.logits[0, len(row) - 1 : -1].log_softmax(-1).topk(4)
            assert answer.tokens == top.indices[:, 0].tolist() == answer.top_ids[:, 0].tolist()
            assert len(answer.tokens) == 20 or answer.tokens[-1] in (2, 119)
            torch.testing.assert_close(answer.top_log_probs, top.values, atol=1e-4, rtol=1e-4)
            states = torch.stack([plain.hidden_states[layer][0, :-1] for layer in (1, 2)], 1)
            torch.testing.assert_close(answer.states.float(), states, atol=1e-2, rtol=1e-2)  # kept in bfloat16


def test_sampled_tokens_have_the_targets_probabilities(tiny_model: Callable[..., Any]) -> None:
    model = CausalLM(tiny_model("llama"))
    answers = BatchDecoder(model).generate([[1, 40]] * 4000, 1, 1.5, [], 3)
    counts = torch.bincount(torch.tensor([answer.tokens[0] for answer in answers]), minlength=128) / 4000
    with torch.inference_mode():
        expected = (model.model(torch.tensor([[1, 40]])).logits[0, -1] / 1.5).softmax(-1)
    assert float((counts - expected).abs().max()) < 0.03


def test_shards_hold_the_states_of_all_tokens_but_the_last(target: Path, written: Any) -> None:
    manifest, texts = written
    assert manifest["state_layers"] == LAYERS
    model = CausalLM.load(target, device="cpu").model
    for text in texts[:6]:
        with torch.inference_mode():
            plain = model(text.tokens[None].long(), output_hidden_states=True).hidden_states
        expected = torch.stack([plain[layer][0, :-1] for layer in LAYERS], 1)
        assert text.states.dtype == torch.bfloat16
        torch.testing.assert_close(text.states.float(), expected, atol=2e-2, rtol=1e-2)


# ---- training


def test_the_head_is_trained_as_it_drafts(target: Path, written: Any, tmp_path: Path) -> None:
    """The logits of every step of training are those of the saved head in its engine, token by token."""
    learner, settings = make(target, written)
    texts = sorted(written[1], key=lambda text: -text.answered)[:2]
    batch = learner.collate(texts)
    with torch.no_grad():
        unrolled = [logits.float() for logits, _, _ in learner.say(batch)]
    learner.save("float32", target, tmp_path)
    head = HiddenStatesHead.load(tmp_path, device="cpu", target=target)
    places = [0] * settings.unroll_steps
    for text in texts:
        tokens, states = text.tokens.tolist(), head.project(text.states.float().flatten(1))
        for row in range(text.answered):
            base = text.answer - 1 + row  # the last token that is read with a true state
            cache = head.new_cache(len(tokens) + settings.unroll_steps)
            logits = head.step(cache, tokens[1 : base + 1], states=states[:base])
            for step in range(settings.unroll_steps):
                if row + step >= text.answered:
                    break
                torch.testing.assert_close(unrolled[step][places[step]], logits[-1], atol=0.05, rtol=0.05)
                places[step] += 1
                if step + 1 < settings.unroll_steps and base + step + 1 < len(tokens):
                    logits = head.step(cache, [tokens[base + step + 1]])
    assert places == [len(logits) for logits in unrolled]


def test_the_head_learns(target: Path, written: Any) -> None:
    learner, settings = make(target, written, epochs=12, learning_rate=1e-2)
    trainer = Trainer(learner, written[1], settings)
    trainer.run()
    evaluated = [row for row in trainer.rows if "validation_loss" in row]
    assert evaluated[-1]["validation_loss"] < 0.8 * evaluated[0]["validation_loss"]
    losses = [row["loss"] for row in trainer.rows[1:]]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert set(trainer.columns) >= {"validation_agreement_2", "validation_agreement_3"} <= set(evaluated[-1])


class Stopped(Exception):
    pass


@pytest.mark.parametrize("threads", [1, 2])
def test_training_goes_on_with_the_same_weights(target: Path, written: Any, tmp_path: Path, threads: int) -> None:
    """Ended after a checkpoint and gone on with: the head and the curve are those of one go, by one thread and two."""

    def stop(row: Row) -> None:
        if row["step"] == 7:
            raise Stopped

    def trainer(checkpoint: Path | None) -> Trainer:
        learner, settings = make(target, written, epochs=2)
        torch.set_num_threads(threads)  # of the team, which is made now
        try:
            return Trainer(learner, written[1], settings, recipe_sha256="r", checkpoint=checkpoint)
        finally:
            torch.set_num_threads(1)

    whole = trainer(None)
    whole.run()
    with pytest.raises(Stopped):
        trainer(tmp_path / "checkpoint").run(stop)
    resumed = trainer(tmp_path / "checkpoint")
    resumed.run()
    assert resumed.resumed_at == 4
    assert json.dumps(resumed.rows) == json.dumps(whole.rows)
    for name, each in (("whole", whole), ("resumed", resumed)):
        each.learner.save("bfloat16", target, tmp_path / name)
    assert sha256_file(tmp_path / "whole" / "model.safetensors") == sha256_file(tmp_path / "resumed/model.safetensors")


def test_what_a_head_cannot_be_made_of(target: Path, written: Any) -> None:
    model, (manifest, texts) = CausalLM.load(target, device="cpu"), written
    with pytest.raises(UserError, match="state_layers: 3 is not one of the target's layers, 0 to 2"):
        Writer(model, TextCodec.load(target), WritingSettings.load({**WRITING, "state_layers": [3]}))
    with pytest.raises(UserError, match="written without hidden states: write it with kind hidden_states"):
        make(target, ({**manifest, "state_layers": []}, texts))
    with pytest.raises(UserError, match="take_layers: a head of kind hidden_states has no layers"):
        make(target, written, take_layers=[0])
