"""Prompts to tokens, tokens to text that streams."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specsplit.errors import UserError
from specsplit.models.tokenizer import TextCodec, TextStream

from tiny_models import make_tokenizer


def byte_codec() -> TextCodec:
    """One token a byte, so that most characters beyond ASCII are several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


CODEC = byte_codec()


@given(st.text(alphabet="ab é世😀", max_size=20), st.data())
def test_streamed_pieces_are_the_text(text, data):
    ids = CODEC.tokenizer(text)["input_ids"]
    stream, printed = TextStream(CODEC), ""
    while ids:
        count = data.draw(st.integers(1, 3))
        piece = stream.feed(ids[:count])
        assert "\ufffd" not in piece
        printed, ids = printed + piece, ids[count:]
    assert printed + stream.feed([], last=True) == text


def test_only_the_unfinished_character_is_held_back():
    ids = CODEC.tokenizer("aé😀")["input_ids"]
    stream = TextStream(CODEC)
    assert stream.feed(ids[:-1]) == "aé"
    assert stream.feed(ids[-1:]) == "😀"


def test_what_never_becomes_a_character_is_shown_once_that_is_certain():
    cut = CODEC.tokenizer("a😀")["input_ids"][:-1]
    stream = TextStream(CODEC)
    assert stream.feed(cut) == "a"
    assert stream.feed([], last=True).strip("\ufffd") == ""
    stream = TextStream(CODEC)
    stream.feed(cut)
    piece = stream.feed(CODEC.tokenizer("b")["input_ids"])
    assert piece.strip("\ufffd") == "b"
    assert stream.printed == CODEC.decode(stream.token_ids)


def test_chat_template_when_there_is_one_and_it_is_wanted():
    codec = TextCodec(make_tokenizer())
    plain = codec.encode("hi", use_chat_template=False)
    assert codec.encode("hi") == [1, *plain, *codec.encode(":", use_chat_template=False)]
    assert codec.decode([1, *plain, 2]) == "hi"
    assert CODEC.encode("hi") == CODEC.tokenizer("hi")["input_ids"]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="has no tokens"):
        CODEC.encode("")
    with pytest.raises(UserError, match="does not hold a tokenizer"):
        TextCodec.load(tmp_path)
