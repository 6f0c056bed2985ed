"""Drafts made of a target and trained on it: what they hold, that they learn, that a seed decides their bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from specsplit.distill.draft import DraftLearner, build_draft, pick_layers, pick_vocabulary
from specsplit.distill.shards import Text
from specsplit.distill.training import Row, Trainer, hash_recipe, learning_rate, split_texts
from specsplit.distill.writing import Writer
from specsplit.engines.numba import FusedLM
from specsplit.engines.transformers import CausalLM
from specsplit.errors import UserError
from specsplit.io import sha256_file
from specsplit.models.tokenizer import TextCodec
from specsplit.models.vocabulary import ReducedVocabulary, load_vocabulary, read_reduced_map
from specsplit.settings.distill import TrainingSettings, WritingSettings

from tiny_models import SMALL, make_tokenizer, random_model

SETTINGS = {
    **{"layers": 2, "vocab_size": 40, "epochs": 3, "batch_size": 4, "learning_rate": 3e-3, "validation_texts": 8},
    **{"evaluate_every": 5, "checkpoint_every": 4, "draft_dtype": "float32", "threads": 1},
}
PROMPT = [5, 90, 7, 33]


def settings(**changes: Any) -> TrainingSettings:
    return TrainingSettings.load({**SETTINGS, **changes})


@pytest.fixture(scope="module", params=["untied", "tied"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(f"target-{request.param}")
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=request.param == "tied")
    model = random_model(config)
    with torch.no_grad():  # its text is to be learnt in a second: the last token says most of the next
        model.get_output_embeddings().weight.mul_(0.5)
        for parameter in model.model.layers.parameters():
            parameter.mul_(0.5)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(target: Path) -> list[Text]:
    given = {"max_user_tokens": 3, "max_answer_tokens": 12, "write_batch": 128, "top_k": 5, "answer_temperature": [0]}
    given["user_temperature"] = 8  # users of a model with random weights have little to say
    writer = Writer(CausalLM.load(target, device="cpu"), TextCodec.load(target), WritingSettings.load(given))
    return writer.batch(0).texts


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(target: Path, texts: list[Text], given: TrainingSettings, **options: Any) -> tuple[Trainer, list[int] | None]:
    model = CausalLM.load(target, device="cpu")
    tokens = pick_vocabulary(given, texts, model, top_k=5)
    learner = DraftLearner(build_draft(model, pick_layers(given, 3), tokens), tokens)
    return Trainer(learner, texts, given, **options), tokens


def saved(trainer: Trainer, tokens: list[int] | None, target: Path, folder: Path) -> str:
    trainer.learner.save(trainer.settings.draft_dtype, target, folder)
    return sha256_file(folder / "model.safetensors")


# ---- the draft


def test_layers_are_spread_or_named() -> None:
    assert pick_layers(settings(layers=1), 30) == [0]
    assert pick_layers(settings(layers=2), 30) == [0, 29]
    assert pick_layers(settings(layers=4), 30) == [0, 10, 19, 29]
    assert pick_layers(settings(take_layers=[29, 3]), 30) == [3, 29]
    with pytest.raises(UserError, match="layers 4: the target has 3"):
        pick_layers(settings(layers=4), 3)
    with pytest.raises(UserError, match="take_layers: 3 is not one of the target's layers, 0 to 2"):
        pick_layers(settings(take_layers=[0, 3]), 3)
    with pytest.raises(UserError, match="a layer stands there twice"):
        settings(take_layers=[1, 1])


def test_a_draft_before_training_is_its_targets_own_parts(target: Path, texts: list[Text], tmp_path: Path) -> None:
    """With every layer, what it says of the tokens that it knows is what the target says; saved and loaded, too."""
    trainer, tokens = make(target, texts, settings(take_layers=[0, 1, 2]))
    assert tokens is not None
    saved(trainer, tokens, target, tmp_path / "draft")
    draft, whole = CausalLM.load(tmp_path / "draft", device="cpu"), CausalLM.load(target, device="cpu")
    assert draft.vocab_size == 40
    assert 2 in tokens  # the end of a text
    known = [token for token in tokens[:-1] if token not in (0, 1, 2)][:6]
    expected = whole.step(whole.new_cache(16), known)[:, tokens[:-1]]
    found = draft.step(draft.new_cache(16), known)
    torch.testing.assert_close(found[:, :-1], expected, rtol=1e-4, atol=1e-4)
    # Tokens that it does not know are all read alike.
    strange = [token for token in range(128) if token not in tokens]
    rows = [draft.step(draft.new_cache(16), [*known, token]) for token in (*strange[:2], tokens[-1])]
    assert rows[0].tolist() == rows[1].tolist() == rows[2].tolist() != found.tolist()


def test_what_is_saved_is_small_and_whole(target: Path, texts: list[Text], tmp_path: Path) -> None:
    trainer, tokens = make(target, texts, settings(draft_dtype="bfloat16"))
    assert tokens is not None
    digest = saved(trainer, tokens, target, tmp_path / "a")
    assert digest == saved(trainer, tokens, target, tmp_path / "b")
    with safe_open(tmp_path / "a" / "model.safetensors", framework="pt") as kept:
        shapes = {name: tuple(kept.get_slice(name).get_shape()) for name in kept.keys()}  # noqa: SIM118
        assert {kept.get_slice(name).get_dtype() for name in kept.keys()} == {"BF16"}  # noqa: SIM118
    assert shapes["model.embed_tokens.weight"] == (40, 32)
    assert ("lm_head.weight" in shapes) == (not trainer.learner.model.config.tie_word_embeddings)
    assert sum(math.prod(shape) for shape in shapes.values()) == trainer.parameters
    loaded = CausalLM.load(tmp_path / "a", device="cpu", dtype="bfloat16")
    assert loaded.parameters == trainer.parameters
    assert loaded.num_layers == 2
    assert read_reduced_map(tmp_path / "a") == tokens
    vocabulary = load_vocabulary(tmp_path / "a", target, loaded.vocab_size)
    assert isinstance(vocabulary, ReducedVocabulary)
    outward = vocabulary.outward(torch.arange(40.0)[None])
    assert outward.shape == (1, 128)
    assert outward[0, tokens].tolist() == list(range(40))
    assert str(tmp_path) not in (tmp_path / "a" / "config.json").read_text()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (target / name).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_compiled_engine_reads_a_reduced_vocabulary(
    target: Path, texts: list[Text], tmp_path: Path, dtype: str
) -> None:
    trainer, tokens = make(target, texts, settings(draft_dtype=dtype))
    saved(trainer, tokens, target, tmp_path / "draft")
    plain = CausalLM.load(tmp_path / "draft", device="cpu", dtype=dtype)
    expected = plain.step(plain.new_cache(16), PROMPT).double()
    fused = FusedLM(CausalLM.load(tmp_path / "draft", device="cpu", dtype=dtype), 1)
    found = fused.step(fused.new_cache(16), PROMPT).double()
    assert found.shape == (1, 40)
    assert float(torch.cosine_similarity(expected, found)) > (0.99999 if dtype == "float32" else 0.99)


def test_a_draft_with_the_whole_vocabulary(target: Path, texts: list[Text], tmp_path: Path) -> None:
    trainer, tokens = make(target, texts, settings(vocab_size=None, epochs=1))
    trainer.run()
    saved(trainer, tokens, target, tmp_path / "draft")
    assert tokens is None
    assert read_reduced_map(tmp_path / "draft") is None
    assert CausalLM.load(tmp_path / "draft", device="cpu").vocab_size == 128


def test_what_a_draft_cannot_be_made_of(tiny_model: Callable[..., Any], target: Path, texts: list[Text]) -> None:
    with pytest.raises(UserError, match="which is a GPT2LMHeadModel; wanted one of LlamaForCausalLM"):
        build_draft(CausalLM(tiny_model("gpt2")), [0], None)
    with pytest.raises(UserError, match="vocab_size 6: wanted at least 7"):
        make(target, texts, settings(vocab_size=6))


# ---- training


def test_a_batch_points_at_the_tokens_before_the_answers(target: Path, texts: list[Text]) -> None:
    batch = make(target, texts, settings())[0].learner.collate(texts[:3])
    flat = batch.ids.flatten().tolist()
    expected = [text.tokens[i].item() for text in texts[:3] for i in range(text.answer - 1, len(text.tokens) - 1)]
    assert [flat[place] for place in batch.places] == expected
    assert len(batch.rows) == len(batch.log_probs) == len(expected)


def test_the_learning_rate_rises_and_falls() -> None:
    given = settings(learning_rate=1.0, warmup_share=0.1)
    rates = [learning_rate(step, 100, given) for step in range(1, 101)]
    assert rates[:10] == [pytest.approx(step / 11) for step in range(1, 11)]
    assert rates[10] == 1.0
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.001
    assert learning_rate(1, 1, settings(learning_rate=1.0, warmup_share=0)) == 1.0


def test_some_texts_are_held_back(texts: list[Text]) -> None:
    train, validation = split_texts(texts, 8, seed=0)
    assert (len(train), len(validation)) == (len(texts) - 8, 8)
    assert {id(t) for t in train} | {id(t) for t in validation} == {id(t) for t in texts}
    assert [id(t) for t in split_texts(texts, 8, seed=0)[1]] == [id(t) for t in validation]
    assert [id(t) for t in split_texts(texts, 8, seed=1)[1]] != [id(t) for t in validation]
    with pytest.raises(UserError, match=f"there are {len(texts)} texts"):
        split_texts(texts, len(texts), seed=0)


def test_the_draft_learns(target: Path, texts: list[Text]) -> None:
    """On the texts that it is trained on and on others it comes closer to its target."""
    trainer, _ = make(target, texts, settings(epochs=12, learning_rate=1e-2))
    trainer.run()
    evaluated = [row for row in trainer.rows if "validation_loss" in row]
    assert evaluated[-1]["validation_loss"] < 0.8 * evaluated[0]["validation_loss"]
    losses = [row["loss"] for row in trainer.rows[1:]]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert [row["step"] for row in trainer.rows] == list(range(trainer.steps + 1))
    answers = sum(text.answered for text in trainer.train_texts)
    assert trainer.rows[-1]["tokens"] == trainer.learnt == 12 * answers


def test_the_same_seed_gives_the_same_bytes(target: Path, texts: list[Text], tmp_path: Path) -> None:
    digests = []
    for seed in (1, 1, 2):
        trainer, tokens = make(target, texts, settings(seed=seed))
        trainer.run()
        digests.append(saved(trainer, tokens, target, tmp_path / "draft"))
    assert digests[0] == digests[1] != digests[2]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("at", [6, 8, 1])
def test_training_goes_on_bit_for_bit(target: Path, texts: list[Text], tmp_path: Path, at: int) -> None:
    """Ended after a checkpoint, right at one, and before the first: the draft and the curve are those of one go."""
    whole, tokens = make(target, texts, settings())
    whole.run()
    expected = saved(whole, tokens, target, tmp_path / "whole")

    def stop(row: Row) -> None:
        if row["step"] == at + 1:
            raise Stopped

    options = {"recipe_sha256": "r", "checkpoint": tmp_path / "checkpoint"}
    with pytest.raises(Stopped):
        make(target, texts, settings(), **options)[0].run(stop)
    resumed, tokens = make(target, texts, settings(), **options)
    seen: list[Row] = []
    resumed.run(seen.append)
    assert resumed.resumed_at == at // 4 * 4
    assert seen[0]["step"] == (resumed.resumed_at + 1 if at >= 4 else 0)
    assert saved(resumed, tokens, target, tmp_path / "resumed") == expected
    assert json.dumps(resumed.rows) == json.dumps(whole.rows)


def test_everything_that_decides_the_weights_is_in_the_recipe() -> None:
    told: dict[str, Any] = {
        **{"settings": settings(), "data_sha256": "d", "target": {"weights_sha256": "w"}},
        **{"hardware": {"name": "a GPU", "device": "cuda", "threads": 2, "torch": "2.11"}, "code": "c"},
    }
    others = [
        *({"settings": settings(**change)} for change in ({"epochs": 9}, {"learning_rate": 1e-3}, {"seed": 5})),
        *({"data_sha256": "e"}, {"target": {"weights_sha256": "v"}}, {"code": "another"}),
        *({"hardware": {**told["hardware"], key: "another"}} for key in told["hardware"]),
    ]
    assert len({hash_recipe(**{**told, **other}) for other in ({}, *others)}) == 1 + len(others)
    assert hash_recipe(**{**told, "settings": settings(checkpoint_every=1)}) == hash_recipe(**told)


def test_a_checkpoint_of_another_recipe_is_not_taken(target: Path, texts: list[Text], tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    make(target, texts, settings(epochs=1), recipe_sha256="one", checkpoint=checkpoint)[0].run()
    assert checkpoint.is_file()
    other, _ = make(target, texts, settings(epochs=1), recipe_sha256="two", checkpoint=checkpoint)
    other.run()
    assert other.resumed_at == 0
    checkpoint.write_bytes(b"broken")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        make(target, texts, settings(epochs=1), recipe_sha256="one", checkpoint=checkpoint)[0].run()


def test_a_loss_that_is_no_number_ends_the_training(target: Path, texts: list[Text]) -> None:
    trainer, _ = make(target, texts, settings())
    with torch.no_grad():
        trainer.learner.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="step 1: the loss is nan; train with a lower learning_rate"):
        trainer.run()
