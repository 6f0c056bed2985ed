"""The text that a target writes: from its own template, the same for the same seed, gone on with where it was."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specsplit.distill.decoder import Answer
from specsplit.distill.shards import (
    Text,
    batches,
    frequent_tokens,
    read_shard,
    read_texts,
    shard_header,
    shard_path,
    write_shard,
)
from specsplit.distill.writing import Writer, chat_template, plain, write_texts
from specsplit.engines.transformers import CausalLM
from specsplit.errors import UserError
from specsplit.io import sha256_file
from specsplit.models.tokenizer import TextCodec
from specsplit.settings.distill import WritingSettings

SMALL = {"tokens": 60, "max_user_tokens": 3, "max_answer_tokens": 8, "write_batch": 6, "top_k": 5, "threads": 1}
ABOUT = {"target": {"model": "tiny"}, "held_out": {}}


@pytest.fixture(scope="module")
def target(tiny_model_folder: Any) -> tuple[CausalLM, TextCodec]:
    folder = tiny_model_folder("llama")
    return CausalLM.load(folder, device="cpu"), TextCodec.load(folder)


def write(target: tuple[CausalLM, TextCodec], folder: Path, held_out: tuple[str, ...] = (), **settings: Any) -> Any:
    writer = Writer(*target, WritingSettings.load({**SMALL, **settings}), held_out)
    return write_texts(writer, folder, ABOUT)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(folder.glob("shard-*"))}


def test_texts_are_prompts_in_the_template_with_the_targets_own_probabilities(
    target: tuple[CausalLM, TextCodec], tmp_path: Path
) -> None:
    manifest = write(target, tmp_path)
    read, texts = read_texts(tmp_path / "manifest.json")
    assert read == manifest
    assert manifest["texts"] == len(texts) > 4
    assert manifest["answer_tokens"] == sum(text.answered for text in texts) >= 60
    colon = target[1].tokenizer.convert_tokens_to_ids(":")
    for text in texts:
        tokens = text.tokens.tolist()
        assert tokens[0] == 1  # <s>, where the user begins
        assert tokens[text.answer - 1] == colon  # the template's, before the answer
        assert 1 <= text.answered <= 8
        assert 2 not in tokens[:-1]  # an end-of-text token ends it
        logits = target[0].model(torch.tensor([tokens])).logits[0, text.answer - 1 : -1]
        top = logits.log_softmax(-1).topk(5)
        assert top.indices.tolist() == text.top_ids.tolist()
        torch.testing.assert_close(text.top_log_probs.float(), top.values, atol=1e-2, rtol=1e-3)
    prompts = [tuple(text.tokens[: text.answer].tolist()) for text in texts]
    assert len(set(prompts)) == len(prompts)


def test_greedy_answers_are_what_the_target_writes(target: tuple[CausalLM, TextCodec], tmp_path: Path) -> None:
    write(target, tmp_path, answer_temperature=[0])
    for text in read_texts(tmp_path / "manifest.json")[1]:
        assert text.tokens[text.answer :].tolist() == text.top_ids[:, 0].tolist()


def test_the_same_seed_writes_the_same_bytes_and_another_one_others(
    target: tuple[CausalLM, TextCodec], tmp_path: Path
) -> None:
    manifests = [write(target, tmp_path / str(i), seed=seed) for i, seed in enumerate((3, 3, 4))]
    assert hashes(tmp_path / "0") == hashes(tmp_path / "1")
    digests = [manifest["data_sha256"] for manifest in manifests]
    assert digests[0] == digests[1] != digests[2]


def test_writing_goes_on_from_whole_shards(target: tuple[CausalLM, TextCodec], tmp_path: Path) -> None:
    """After an end in the middle, of a damaged shard, and for more text; a shard of another recipe is not taken."""
    whole = write(target, tmp_path / "whole")
    expected = hashes(tmp_path / "whole")
    assert len(expected) > 2
    part = tmp_path / "part"
    write(target, part, tokens=20)
    assert 0 < len(hashes(part)) < len(expected)
    first = shard_path(part, 0)
    kept = first.stat().st_mtime_ns
    second = shard_path(part, 1)
    if second.exists():
        second.write_bytes(second.read_bytes()[:100])
    resumed = write(target, part)
    assert first.stat().st_mtime_ns == kept  # was not written again
    assert hashes(part) == expected
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
    write(target, part, seed=9)
    assert not set(hashes(part).values()) & set(expected.values())
    less = write(target, part, seed=9, tokens=10)
    assert set(hashes(part)) == {shard["file"] for shard in less["shards"]}


def test_held_out_prompts_are_never_used(target: tuple[CausalLM, TextCodec], tmp_path: Path) -> None:
    write(target, tmp_path / "all")
    texts = read_texts(tmp_path / "all" / "manifest.json")[1]
    said = [target[1].decode(text.tokens[1 : text.answer - 1].tolist()) for text in texts]
    secret = next(text for text in said if len(plain(text)) > 1)
    manifest = write(target, tmp_path / "less", held_out=(f"  {secret.upper()}\n",))
    assert manifest["left_out"]["held_out"] >= 1
    for text in read_texts(tmp_path / "less" / "manifest.json")[1]:
        assert plain(secret) not in plain(target[1].decode(text.tokens.tolist()[: text.answer]))


def test_a_model_without_a_template_writes_from_the_beginning(
    target: tuple[CausalLM, TextCodec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target[1].tokenizer, "chat_template", None)
    assert chat_template(target[1], (2,)).user == [1]
    write(target, tmp_path)
    texts = read_texts(tmp_path / "manifest.json")[1]
    assert {text.answer for text in texts} == {4}  # the beginning and three tokens


def test_a_template_that_hides_the_user(target: tuple[CausalLM, TextCodec], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target[1].tokenizer, "chat_template", "<s>{{ messages[0]['content'] | length }}:")
    with pytest.raises(UserError, match="does not show the user's words"):
        chat_template(target[1], (2,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_answer_tokens": 300}, "texts of up to 305 tokens; the target holds 256"),
        ({"top_k": 128}, "top_k 128: the target has 128 tokens"),
    ],
)
def test_settings_that_the_target_cannot_take(
    target: tuple[CausalLM, TextCodec], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Writer(*target, WritingSettings.load({**SMALL, **settings}))


def test_a_target_that_says_nothing_new(target: tuple[CausalLM, TextCodec], tmp_path: Path) -> None:
    writer = Writer(*target, WritingSettings.load(SMALL))
    writer.template = type(writer.template)([1], 2, True)
    said_nothing = Answer([2], *(torch.empty(0),) * 3)
    writer._generate = lambda rows, *_: [said_nothing for _ in rows]  # type: ignore[method-assign]
    with pytest.raises(UserError, match="20 batches without a new prompt"):
        write_texts(writer, tmp_path, ABOUT)


# ---- shards, vocabulary, batches


def text(tokens: list[int], answer: int, k: int = 2) -> Text:
    count = len(tokens) - answer
    return Text(torch.tensor(tokens), answer, torch.zeros(count, k), torch.full((count, k), math.log(0.5)))


def test_shards_hold_texts_and_say_what_is_wrong_with_them(tmp_path: Path) -> None:
    path = shard_path(tmp_path, 3)
    texts = [text([5, 6, 7], 1), text([9, 9], 1)]
    write_shard(path, texts, {"recipe_sha256": "x", "count": 2})
    assert shard_header(path) == {"recipe_sha256": "x", "count": 2}
    for found, expected in zip(read_shard(path), texts, strict=True):
        assert found.answer == expected.answer
        assert found.tokens.tolist() == expected.tokens.tolist()
        assert found.top_log_probs.shape == expected.top_log_probs.shape
    assert shard_header(tmp_path / "none") == {}
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": [{"file": path.name, "sha256": "0"}]}))
    with pytest.raises(UserError, match=r"not the file that .*manifest\.json names"):
        read_texts(tmp_path / "manifest.json")
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a shard of training text"):
        read_shard(path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="not a manifest of training text"):
        read_texts(tmp_path / "manifest.json")


def test_the_most_frequent_tokens_are_kept() -> None:
    texts = [text([7, 7, 1, 1, 1, 4], 2), text([7, 3, 1, 4, 5], 2)]
    # In answers: 1 four times, 4 twice, 5 once; 7 and 3 in prompts alone; then by number.
    assert frequent_tokens(texts, 5, 10, always=[]) == [1, 4, 5, 7, 3]
    assert frequent_tokens(texts, 3, 10, always=[9, 4]) == [1, 4, 9]
    assert frequent_tokens(texts, 7, 10, always=[0]) == [1, 4, 5, 7, 3, 0, 2]


def test_batches_hold_every_text_once_and_little_padding() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 1000).tolist()
    first, again, other = (list(batches(lengths, 16, seed=1, epoch=epoch)) for epoch in (0, 0, 1))
    assert first == again != other
    assert Counter(i for batch in first for i in batch) == Counter(range(1000))
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in first)
    assert padded < 1.15 * sum(lengths)
    assert [max(lengths[i] for i in batch) for batch in first] != sorted(max(lengths[i] for i in b) for b in first)
