"""Acceptance by position, beside a count by plain passes of both models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from specsplit.decoding.growth import DraftSettings
from specsplit.decoding.loop import speculate
from specsplit.distill.acceptance import ROUND_COLUMNS, InTargetTokens, acceptance, measure
from specsplit.distill.card import write_card
from specsplit.distill.distill_figure import draw_distillation
from specsplit.distill.training import LOSS_COLUMNS
from specsplit.engines.transformers import CausalLM
from specsplit.io import sha256_file
from specsplit.models.vocabulary import ReducedVocabulary, Vocabulary
from specsplit.provenance.folder import read_sums

PROMPTS = [[1, 40, 41, 42], [1, 77, 50], [1, 99, 60, 61, 70, 71]]
INTERVALS = {"confidence": 0.9}
GAMMA, LENGTH = 4, 20


@pytest.fixture(scope="module")
def pair(tiny_model: Callable[..., Any]) -> tuple[CausalLM, CausalLM]:
    """A target, and a draft that is right about half of the time."""
    target, draft = tiny_model("llama", 0), tiny_model("llama", 0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in draft.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * p.std() * 0.12)
    return CausalLM(target), CausalLM(draft)


def next_token(model: CausalLM, tokens: list[int], allowed: list[int] | None = None) -> int:
    """Greedy, by a plain pass over the whole text."""
    with torch.inference_mode():
        logits = model.model(torch.tensor([tokens])).logits[0, -1]
    if allowed is not None:
        return allowed[int(logits[allowed].argmax())]
    return int(logits.argmax())


def brute_force(
    target: CausalLM, draft: CausalLM, prompt: list[int], allowed: list[int] | None
) -> tuple[list[int], Counter[int], Counter[int]]:
    """The greedy text, and how often each position was reached and accepted."""
    text: list[int] = []
    reached: Counter[int] = Counter()
    accepted: Counter[int] = Counter()
    while len(text) < LENGTH and 2 not in text:
        context = [*prompt, *text]
        new: list[int] = []
        deepest = min(GAMMA, LENGTH - len(text) - 1) if text else 0  # the first token is the target's own
        for position in range(1, deepest + 1):
            if new and new[-1] == 2:
                break
            guess = next_token(draft, [*context, *new], allowed)
            reached[position] += 1
            if guess != next_token(target, [*context, *new]):
                break
            accepted[position] += 1
            new.append(guess)
        if 2 not in new:
            new.append(next_token(target, [*context, *new]))
        text += new
    return text, reached, accepted


@pytest.mark.parametrize("reduced", [False, True])
def test_acceptance_is_what_plain_passes_count(pair: tuple[CausalLM, CausalLM], reduced: bool) -> None:
    target, draft = pair
    allowed = list(range(0, 128, 2)) if reduced else None
    vocabulary: Vocabulary = Vocabulary(128)
    if allowed:

        class Odd(ReducedVocabulary):
            """The whole head's logits, of which it takes the rows itself."""

            def outward(self, logits: torch.Tensor) -> torch.Tensor:
                return super().outward(logits[:, allowed])

        vocabulary = Odd(allowed, 128)
    reached: Counter[int] = Counter()
    accepted: Counter[int] = Counter()
    for prompt in PROMPTS:
        expected, tried, kept = brute_force(target, draft, prompt, allowed)
        reached, accepted = reached + tried, accepted + kept
        asked = DraftSettings(GAMMA, stop_token_ids=frozenset(target.eos_token_ids))
        rounds = list(speculate(target, InTargetTokens(draft, vocabulary), prompt, asked, max_new_tokens=LENGTH))
        text = [token for r in rounds for token in r.tokens]
        assert text == expected
        assert sum(r.accepted + 1 for r in rounds) in (len(text), len(text) + 1)  # one more after an accepted end
    requests = [(f"p{i}", "c", prompt) for i, prompt in enumerate(PROMPTS)]
    measured = measure(target, draft, vocabulary, requests, gamma=GAMMA, max_tokens=LENGTH)
    table = acceptance(measured, **INTERVALS)
    assert dict(zip(table["position"], table["reached"], strict=True)) == dict(reached)
    assert dict(zip(table["position"], table["accepted"], strict=True)) == {p: accepted[p] for p in reached}
    assert 0 < accepted[1] < reached[1]  # else little was proved
    assert table["acceptance_rate_ci_low"].isna().all()  # of fewer than six requests there is no interval
    twice = pd.concat([measured, measured.assign(request_id=measured["request_id"] + " again")])
    known = acceptance(twice, **INTERVALS).dropna()  # nor of a position that few requests reached
    assert len(known)
    assert (known["acceptance_rate_ci_low"] <= known["acceptance_rate"]).all()
    assert (known["acceptance_rate_ci_high"] >= known["acceptance_rate"]).all()


def test_nothing_drafted_is_an_empty_table() -> None:
    assert acceptance(pd.DataFrame(columns=list(ROUND_COLUMNS)), **INTERVALS).empty
    rounds = pd.DataFrame([("a", "c", 1, 0, 0)], columns=list(ROUND_COLUMNS))
    assert acceptance(rounds, **INTERVALS).empty


# ---- card and figure


def report() -> tuple[dict[str, Any], dict[str, Any]]:
    hardware = {"name": "a processor, 1 threads of 2 cores, no GPU", "torch": "2", "transformers": "5"}
    data = {
        "settings": {"user_temperature": 1.0, "answer_temperature": [0.0, 0.7], "top_k": 8},
        "left_out": {"unusable": 1, "repeated": 2, "held_out": 0},
        **{"texts": 100, "answer_tokens": 1000, "data_sha256": "d" * 64, "seconds": 12.0},
    }
    settings = {"draft_dtype": "bfloat16", "epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "warmup_share": 0.03}
    settings |= {"kind": "independent", "unroll_steps": 3, "weight_decay": 0.01, "clip_norm": 1.0, "seed": 7}
    training = {
        **{"name": "mine", "architecture": "LlamaForCausalLM", "layers": [0, 2], "vocab_size": 40, "parameters": 9},
        **{"target": {"model": "big", "weights_sha256": "t" * 64, "vocab_size": 128}, "weights_sha256": "w" * 64},
        **{"steps": 50, "seconds": 3.0, "validation_loss": 1.0, "validation_agreement": 0.4},
        **{
            "learnt": 2000,
            "further_agreement": [],
            "untrained_agreement": 0.1,
            "settings": settings,
            "data": data,
            "hardware": hardware,
        },
    }
    return training, {"prompts": 3, "prompts_sha256": "p" * 64, "max_output_tokens": 20}


def test_the_card_tells_the_recipe_and_whether_the_draft_is_of_use(tmp_path: Path) -> None:
    training, measured = report()
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_text(name)
    table = pd.DataFrame({"position": [1, 2], "reached": [10, 4], "accepted": [4, 1], "acceptance_rate": [0.4, 0.25]})
    write_card(tmp_path, training, table, measured)
    card = (tmp_path / "MODEL_CARD.md").read_text()
    for said in ("40.0%", "a trial of the recipe", "d" * 64, "w" * 64, "| seed | 7 |", "no GPU", "12 s to write, 3 s"):
        assert said in card, said
    sums = read_sums(tmp_path / "SHA256SUMS")
    assert set(sums) == {"MODEL_CARD.md", "config.json", "model.safetensors"}
    assert all(sha256_file(tmp_path / name) == digest for name, digest in sums.items())
    table["acceptance_rate"] = 0.6
    training["settings"]["kind"], training["further_agreement"] = "hidden_states", [0.31, 0.2]
    write_card(tmp_path, training, table, measured)
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert "a trial of the recipe" not in card
    for said in (
        "before its layers [0, 2]",
        "2,000 tokens of answers passed",
        "3 tokens drafted in a row",
        "31.0%, 20.0%",
    ):
        assert said in card, said


def test_the_figure_of_a_short_training(tmp_path: Path) -> None:
    rows = [(0, 0, None, None, None, 3.0, 0.1), (1, 50, 1e-3, 2.5, 1.0, None, None), (2, 99, 1e-4, 2.0, 1.0, 2.1, 0.3)]
    losses = pd.DataFrame(rows, columns=list(LOSS_COLUMNS)).assign(validation_agreement_2=[0.0, None, 0.1])
    for table in (acceptance(pd.DataFrame([("a", "c", 1, 2, 1)], columns=list(ROUND_COLUMNS)), **INTERVALS), None):
        shown = acceptance(pd.DataFrame(columns=list(ROUND_COLUMNS)), **INTERVALS) if table is None else table
        png, svg = draw_distillation(losses, shown, tmp_path / "curves.png")
        assert png.read_bytes().startswith(b"\x89PNG")
        assert "Divergence from the target" in svg.read_text()
