"""Prompts to tokens, tokens to text that streams."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from specsplit.errors import UserError
from specsplit.models.tokenizer import TextCodec, TextStream, cut_at_stop

from tiny_models import make_tokenizer


def byte_codec() -> TextCodec:
    """One token a byte, so that most characters beyond ASCII are several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


CODEC = byte_codec()


def word_codec(words: list[str], decoder: Any) -> TextCodec:
    words = ["<s>", "<unk>", *words, "[added]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.decoder = decoder
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    fast.add_tokens(["[added]"])
    return TextCodec(fast)


SHIPPED = Path(__file__).parents[2] / "resources/drafts/smollm2-two-layers/tokenizer.json"
BYTES = [f"<0x{byte:02X}>" for byte in "世a😀".encode()]
PIECES = ["▁", "▁▁", "▁a", "b", "\ufffd", "é", ".", "'", "\n"]
TO_SPACES, FUSED = decoders.Replace("▁", " "), decoders.Fuse()
CODECS: dict[str, Callable[[], TextCodec]] = {
    "bytes": lambda: CODEC,
    "llama": lambda: word_codec(
        BYTES + PIECES, decoders.Sequence([TO_SPACES, decoders.ByteFallback(), FUSED, decoders.Strip(" ", 1, 0)])
    ),
    "gemma": lambda: word_codec(BYTES + PIECES, decoders.Sequence([TO_SPACES, decoders.ByteFallback(), FUSED])),
    "sentencepiece": lambda: word_codec(PIECES, decoders.Metaspace()),
    "wordpiece": lambda: word_codec(["a", "##b", ".", "'s", "n't", "##."], decoders.WordPiece()),
    "suffixes": lambda: word_codec(["a</w>", "b", "</w>"], decoders.BPEDecoder()),
    "words": lambda: word_codec(["a", " ", " .", "'", " 's"], FUSED),
    "python": lambda: TextCodec(ByT5Tokenizer()),
    "smollm2": lambda: TextCodec(PreTrainedTokenizerFast(tokenizer_file=str(SHIPPED))),
}


@pytest.mark.parametrize("name", CODECS)
def test_streamed_pieces_are_the_text(name: str) -> None:
    codec = CODECS[name]()

    @settings(max_examples=40, deadline=None, database=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        some = st.lists(st.integers(0, len(codec.tokenizer) - 1), min_size=1, max_size=12, unique=True)
        ids = data.draw(st.lists(st.sampled_from(data.draw(some)), max_size=24))
        if name != "python" and data.draw(st.booleans()):  # characters, some of them broken
            ids = codec.tokenizer(data.draw(st.text("ab é世😀", max_size=8)))["input_ids"] + ids[:2] + ids[3:]
        after, ids = (codec.continued(ids[:2]), ids[2:]) if data.draw(st.booleans()) else ([], ids)
        text = codec.decode(ids, after)
        start, size = data.draw(st.integers(0, 10)), data.draw(st.integers(1, 3))
        stop = [text[start : start + size]] if start < len(text) and data.draw(st.booleans()) else []
        stream, printed, taken, at = TextStream(codec, stop, after), "", None, 0
        while at < len(ids) and taken is None:
            burst = data.draw(st.integers(1, 4))
            piece, taken = stream.take(ids[at : at + burst])
            printed, at = printed + piece, at + burst if taken is None else at + taken
        printed += stream.feed([], last=True)
        assert printed == cut_at_stop(codec.decode(ids[:at], after), stop)
        assert (taken is None) == (printed == codec.decode(ids[:at], after))

    check()


def test_a_completion_begins_with_its_space() -> None:
    codec = CODECS["llama"]()
    space_a, b = codec.tokenizer.convert_tokens_to_ids(["▁a", "b"])
    assert (codec.decode([space_a]), codec.decode([space_a], [b]), codec.decode([space_a], [space_a])) == (
        "a",
        " a",
        " a",
    )


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
    assert stream.feed(CODEC.tokenizer("b")["input_ids"]).strip("\ufffd") == "b"


def test_a_long_text_is_not_decoded_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, decoded = byte_codec(), []
    plain = codec.decode
    monkeypatch.setattr(codec, "decode", lambda ids: decoded.append(len(ids)) or plain(ids))
    TextStream(codec, ["never there"]).feed(CODEC.tokenizer("one text, 世 " * 100)["input_ids"])
    assert max(decoded) <= 8


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
