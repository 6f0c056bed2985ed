"""Drafts that speak another vocabulary than the target, or less of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from specsplit.errors import UserError
from specsplit.models.vocabulary import (
    BYTE_OF,
    ReducedVocabulary,
    SharedVocabulary,
    Vocabulary,
    load_vocabulary,
    read_reduced_map,
    spellings,
)

from tiny_models import VOCAB, make_tokenizer

CORPUS = ["The quick brown fox jumps over the lazy dog. ", "naïve café text, new lines\n\nand 12 numbers."] * 20
SENTENCE = "The quick dog, the café\nand the 🙂 fox."
INFINITY = float("inf")


def byte_level(special: list[str]) -> Any:
    """A byte-level BPE tokenizer, as of GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0])


def metaspace(corpus: list[str] = CORPUS) -> Any:
    """A SentencePiece-like tokenizer with byte fallback and its own BOS, as of Llama 2 and Mistral."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    bytes_first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {piece: i for i, piece in enumerate([*bytes_first, *sorted(learned["vocab"])])}
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TARGET, DRAFT = byte_level(["<|end|>", "</s>"]), metaspace()


def rows_of(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values()) + 1


@pytest.mark.parametrize("target", [TARGET, DRAFT], ids=["byte-level", "metaspace"])
def test_the_same_bytes_are_the_same_token(target):
    """Both ways: every shared token stands for the same text in both vocabularies, whatever its spelling."""
    draft = DRAFT if target is TARGET else TARGET
    shared = SharedVocabulary(target, draft, rows_of(draft))
    assert shared.size == rows_of(target)
    target_bytes, draft_bytes = ({token: key for key, token in spellings(t).items()} for t in (target, draft))
    pairs = list(shared._draft_of.items())
    assert len(pairs) > 100
    assert all(target_bytes[token] == draft_bytes[draft_token] for token, draft_token in pairs)
    spoken = {target_bytes[token][1] for token, _ in pairs}
    assert {b" the", b"The", b"e", b" ", b"\n", "é".encode(), "🙂".encode()[:1]} <= spoken


def test_the_spelling_of_bytes():
    for byte in range(256):
        alone = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("aé中🙂 \n\t~" + chr(byte % 128))
        written = "".join(piece for piece, _ in alone)
        assert bytes(BYTE_OF[c] for c in written) == ("aé中🙂 \n\t~" + chr(byte % 128)).encode()
    assert sorted(BYTE_OF.values()) == list(range(256))


def test_a_text_token_is_taken_before_a_byte_token():
    vocab = DRAFT.get_vocab()
    assert spellings(DRAFT)[False, b"e"] == vocab["e"] != vocab["<0x65>"]
    assert spellings(DRAFT)[False, b"~"] == vocab["<0x7E>"]


def test_special_tokens_are_shared_when_special_in_both():
    shared = SharedVocabulary(TARGET, DRAFT, rows_of(DRAFT))
    vocab = TARGET.get_vocab()
    assert shared.token(vocab["</s>"]) == DRAFT.eos_token_id
    with pytest.raises(KeyError):
        shared.token(vocab["<|end|>"])  # the draft has no such token
    plain = SharedVocabulary(byte_level(["<|end|>"]), DRAFT, rows_of(DRAFT))
    assert DRAFT.eos_token_id not in plain._draft_of.values()


@pytest.mark.parametrize(("target", "draft"), [(TARGET, DRAFT), (DRAFT, TARGET)], ids=["to metaspace", "to bytes"])
def test_a_text_survives_the_way_to_the_draft(target, draft):
    shared = SharedVocabulary(target, draft, rows_of(draft))
    ids = shared.context(target(SENTENCE, add_special_tokens=False)["input_ids"])
    assert draft.decode(ids, skip_special_tokens=True) == SENTENCE
    assert ids == draft(SENTENCE)["input_ids"]  # with the BOS that the draft's tokenizer adds, once
    # A draft's continuation, spoken back, goes on with the text: word by word.
    for word in (" the", " fox", "."):
        (token,) = target(word, add_special_tokens=False)["input_ids"][-1:]
        key = {i: key for key, i in spellings(target).items()}[token]
        if key in spellings(draft):
            assert spellings(draft)[key] == shared.token(token)


def test_a_bos_in_the_text_is_not_doubled():
    target = byte_level(["<|end|>", "<s>"])
    shared = SharedVocabulary(target, DRAFT, rows_of(DRAFT))
    ids = shared.context(target("<s>The fox")["input_ids"])
    assert ids[0] == DRAFT.bos_token_id
    assert ids.count(DRAFT.bos_token_id) == 1


def test_an_unfinished_character_is_held_back():
    shared = SharedVocabulary(TARGET, DRAFT, rows_of(DRAFT))
    whole = TARGET("The fox 🙂")["input_ids"]
    before = DRAFT("The fox ")["input_ids"]
    seen = [shared.context(whole[:end]) for end in range(1, len(whole) + 1)]
    assert seen[-1] == DRAFT("The fox 🙂")["input_ids"]
    assert seen[-2] == seen[-3] == before  # three of its four bytes are there, and two
    for ids in seen:
        assert "\ufffd" not in DRAFT.decode(ids)


def test_there_is_always_a_token_to_feed():
    shared = SharedVocabulary(DRAFT, TARGET, rows_of(TARGET))  # this draft adds no BOS
    assert shared.context([DRAFT.get_vocab()["<0xF0>"]]) == [TARGET.eos_token_id]


def test_logits_go_to_the_tokens_of_the_target():
    rows = rows_of(DRAFT)
    shared = SharedVocabulary(TARGET, DRAFT, rows)
    logits = torch.randn(3, rows + 5)  # a padded output head
    found = shared.outward(logits)
    assert found.shape == (3, rows_of(TARGET))
    for token in range(rows_of(TARGET)):
        draft = shared._draft_of.get(token)
        assert torch.equal(found[:, token], torch.full((3,), -INFINITY) if draft is None else logits[:, draft])
    assert len(shared._draft_of) < rows_of(TARGET)  # so that both cases were there


def test_tokens_beyond_the_output_head_are_not_shared():
    few = SharedVocabulary(TARGET, DRAFT, 200)
    assert max(few._draft_of.values()) < 200
    assert few.outward(torch.zeros(1, 200)).isfinite().sum() == len(few._draft_of)


def test_nothing_shared_is_said():
    greek = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"ψ": 0, "ω": 1}, unk_token="ψ")))
    with pytest.raises(UserError, match="shares no token with the target's"):
        SharedVocabulary(make_tokenizer(), greek, 2)


def test_a_reduced_head_is_spread_over_the_vocabulary():
    reduced = ReducedVocabulary([7, 2, 5], 9)
    found = reduced.outward(torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [[-INFINITY, -INFINITY, 2.0, -INFINITY, -INFINITY, 3.0, -INFINITY, 1.0, -INFINITY]]
    assert (reduced.context([4, 8]), reduced.token(7), reduced.size) == ([4, 8], 7, 9)


def folder_of(tokenizer: Any, path: Path) -> Path:
    tokenizer.save_pretrained(path)
    return path


def test_what_a_folder_gets(tmp_path, tiny_model_folder):
    draft = tiny_model_folder("llama")
    same = load_vocabulary(draft, folder_of(make_tokenizer(), tmp_path / "same"), VOCAB + 2)
    assert type(same) is Vocabulary
    assert same.size == VOCAB + 2
    assert type(load_vocabulary(draft, None, VOCAB)) is Vocabulary
    target = folder_of(TARGET, tmp_path / "target")
    other = load_vocabulary(draft, target, VOCAB)
    assert isinstance(other, SharedVocabulary)
    # The tiny tokenizer has a token for every printable ASCII character, and </s> is special in both.
    assert other.shared == 95 + 1
    assert other.context(TARGET("fox, fox")["input_ids"]) == make_tokenizer()("fox, fox")["input_ids"]
    with pytest.raises(UserError, match="does not hold a tokenizer"):
        load_vocabulary(draft, tmp_path / "none", VOCAB)


def test_a_folder_with_a_map(tmp_path, tiny_model_folder):
    folder = tmp_path / "reduced"
    folder.mkdir()
    for file in tiny_model_folder("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert read_reduced_map(folder) is None
    (folder / "draft_to_target.json").write_text("[5, 90, 3]")
    reduced = load_vocabulary(folder, None, 3)
    assert isinstance(reduced, ReducedVocabulary)
    assert reduced.size == VOCAB
    with pytest.raises(UserError, match="3 entries, but the output head 128 rows"):
        load_vocabulary(folder, None, 128)
    with pytest.raises(UserError, match="another tokenizer than the target"):
        load_vocabulary(folder, folder_of(TARGET, tmp_path / "target"), 3)
    save_file({"draft_to_target": torch.tensor([5, 90])}, folder / "draft_to_target.safetensors")
    with pytest.raises(UserError, match="has both"):
        read_reduced_map(folder)
    (folder / "draft_to_target.json").unlink()
    assert read_reduced_map(folder) == [5, 90]
    save_file({"draft_to_target": torch.tensor([5, 128])}, folder / "draft_to_target.safetensors")
    with pytest.raises(UserError, match="names token 128; the model has 0 to 127"):
        load_vocabulary(folder, None, 2)


@pytest.mark.parametrize("content", ["[]", "{}", '["a"]', "[1, -1]", "[true]", "[[1]]"])
def test_a_map_that_is_none(tmp_path, content):
    (tmp_path / "draft_to_target.json").write_text(content)
    with pytest.raises(UserError, match="wanted a list of token ids"):
        read_reduced_map(tmp_path)


def test_a_map_with_a_token_twice(tmp_path):
    save_file({"draft_to_target": torch.tensor([5, 5])}, tmp_path / "draft_to_target.safetensors")
    with pytest.raises(UserError, match="twice"):
        read_reduced_map(tmp_path)
    save_file({"d2t": torch.tensor([5, 6])}, tmp_path / "draft_to_target.safetensors")
    with pytest.raises(UserError, match="wanted a list of token ids"):
        read_reduced_map(tmp_path)


@pytest.mark.parametrize(("target", "draft"), [(TARGET, DRAFT), (DRAFT, TARGET), (make_tokenizer(), TARGET)])
def test_a_text_that_grows_is_encoded_as_one_that_is_new(target: Any, draft: Any) -> None:
    chance = random.Random(0)
    shared = SharedVocabulary(target, draft, rows_of(draft))
    words = [*"".join(CORPUS).split(" "), "🙂🙂", "é", "\n\n", " ", "12345", "<s>"]
    for _ in range(3):
        tokens: list[int] = target(" ".join(chance.choices(words, k=120)))["input_ids"]
        length = 0
        while length < len(tokens):  # cut anywhere, inside of characters as well
            length += chance.randint(1, 9)
            new = SharedVocabulary(target, draft, rows_of(draft))
            assert shared.context(tokens[:length]) == new.context(tokens[:length])
        shared.context(tokens[: length // 2])  # back, as after a wrong draft
        assert shared.context(tokens) == SharedVocabulary(target, draft, rows_of(draft)).context(tokens)


def test_only_the_end_of_a_long_text_is_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = SharedVocabulary(TARGET, DRAFT, rows_of(DRAFT))
    tokens: list[int] = TARGET("".join(CORPUS) * 4)["input_ids"]
    shared.context(tokens[:-30])
    encoded: list[int] = []
    encode = SharedVocabulary._encode
    monkeypatch.setattr(SharedVocabulary, "_encode", lambda self, text: encoded.append(len(text)) or encode(self, text))
    for length in range(len(tokens) - 29, len(tokens) + 1):
        shared.context(tokens[:length])
    assert len(tokens) > 1000
    assert max(encoded) < 1000
