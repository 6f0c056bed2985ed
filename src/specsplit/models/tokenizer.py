"""Between text and token ids: tokenizer, chat template, text as it streams."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from specsplit.errors import PromptError, UserError, told
from specsplit.io import json_sha256, scratch_folder
from specsplit.models.file_names import CONFIG_FILES, TOKENIZER_EXTRAS, TOKENIZER_FILES, matches
from specsplit.models.fingerprint import load_tokenizer, tokenizer_sha256

PACKED_FILES = (*CONFIG_FILES, *TOKENIZER_FILES, *TOKENIZER_EXTRAS)
_DIRECTIVES = "aAbBcdDeFHIjmMpRSTuUVwWxXyYGzZ%"  # of strftime
CONTINUED = 8  # tokens of a prompt that are decoded with those after it
MOST_PACKED_BYTES, MOST_UNPACKED_BYTES = 12 << 20, 256 << 20


def pack_tokenizer(folder: Path) -> dict[str, bytes]:
    """The files of a tokenizer for a message, compressed; none when they would be over MOST_PACKED_BYTES."""
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and matches(path.name, PACKED_FILES)]
    packed = {path.name: zlib.compress(path.read_bytes()) for path in paths}
    return packed if sum(map(len, packed.values())) <= MOST_PACKED_BYTES else {}


def at_date(template: str, date: datetime) -> str:
    """The chat template, told this date where it calls `strftime_now`.

    transformers hands a template no function of ours, so one is defined in its own language before it.
    """
    forms = [f"%{flag}{sign}" for flag in ("", "-") for sign in _DIRECTIVES if not flag or sign in "dmHIjMSye"]
    told = [(form, date.strftime(form)) for form in forms]
    replaced = "".join(f" | replace({json.dumps(form)}, {json.dumps(text)})" for form, text in told)
    # The line feed after a block is dropped, so the template begins as it did.
    return f"{{%- macro strftime_now(form) -%}}{{{{ form{replaced} }}}}{{%- endmacro %}}\n{template}"


class TextCodec:
    """A tokenizer with the chat template it came with."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.sha256 = tokenizer_sha256(tokenizer)

    @property
    def has_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    @property
    def asks_for_the_date(self) -> bool:
        return "strftime_now" in str(self.tokenizer.chat_template)

    def key(self, chat: bool) -> str:
        """What token ids depend on beside the text: vocabulary and, where it is used, chat template; a hash."""
        return json_sha256([self.sha256, self.tokenizer.chat_template if chat else None])

    @classmethod
    def load(cls, folder: Path, problem: str = "") -> TextCodec:
        """Load the tokenizer of a local model folder; UserError when there is none. problem: how its message begins."""
        return cls(load_tokenizer(folder, problem))

    @classmethod
    def unpack(cls, files: Mapping[str, bytes]) -> TextCodec:
        """The tokenizer that `pack_tokenizer` packed elsewhere. Raises UserError for what is none."""
        with scratch_folder("specsplit-") as folder:
            for name, packed in files.items():
                if not matches(name, PACKED_FILES) or Path(name).name != name:
                    raise UserError(f"a tokenizer has no file {name!r}")
                unpacking = zlib.decompressobj()
                try:
                    data = unpacking.decompress(packed, MOST_UNPACKED_BYTES)
                except zlib.error as error:
                    raise UserError(f"{name} of a tokenizer cannot be read: {error}") from None
                if not unpacking.eof:
                    raise UserError(f"{name} of a tokenizer is cut off, or larger than {MOST_UNPACKED_BYTES} bytes")
                Path(folder, name).write_bytes(data)
            return cls.load(folder, "a tokenizer cannot be loaded")

    def encode(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        *,
        use_chat_template: bool = True,
        date: datetime | None = None,
    ) -> list[int]:
        """Token ids of a prompt: a string, or messages with `role` and `content`.

        A string is one user turn of the chat template when the model has one and it is wanted. date: what a template is
        told that prints the date; None: now. Raises PromptError when
        there are messages and no template, when the template refuses them, or when nothing comes of it.
        """
        template = self.tokenizer.chat_template
        if isinstance(prompt, str) and not (use_chat_template and template):
            try:
                ids = self.tokenizer(prompt)["input_ids"]
            except Exception as error:
                raise PromptError(f"the tokenizer of this model does not take the prompt: {told(error)}") from error
        elif not template:
            raise PromptError("this model has no chat template: give the prompt as one string")
        else:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
            try:
                own = {} if date is None else {"chat_template": at_date(self.tokenizer.get_chat_template(), date)}
                ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **own)
            except Exception as error:  # a template is a program of others, and may raise anything
                raise PromptError(
                    f"the chat template of this model does not take these messages: {told(error)}. Use another prompt, "
                    "or none: use_chat_template false"
                ) from error
            ids = ids["input_ids"]
        if not ids:
            raise PromptError(f"the prompt {prompt!r} has no tokens; give it some text")
        return list(ids)

    def decode(self, token_ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """Text of generated tokens, special tokens left out, and nothing corrected in it: spaces stay as written.

        after: what `continued` gives of the tokens before them, where the text is to continue those.
        """
        text = str(
            self.tokenizer.decode([*after, *token_ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )
        return text[len(self.decode(after)) :] if after else text

    def continued(self, token_ids: Sequence[int]) -> list[int]:
        """The last tokens of a prompt, after which some tokenizers keep a space that they drop where a text begins.

        None when the prompt ends within a character.
        """
        known = range(len(self.tokenizer))  # a prompt of token ids may hold anything
        last = [token for token in token_ids[-CONTINUED:] if token in known]
        ends = next((token for token in reversed(last) if token not in self._special), None)
        return [] if ends in self.unfinished or self.decode(last).endswith("\ufffd") else last

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special)

    @cached_property
    def unfinished(self) -> frozenset[int]:
        """Tokens after which the text may still change: single bytes, for all in a row become U+FFFD when one is wrong
        (decoder ByteFallback), and special ones, which leave no trace between bytes."""
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        found = zip(names, self.tokenizer.convert_tokens_to_ids(names), strict=True)
        known = {i for name, i in found if i is not None and self.tokenizer.convert_ids_to_tokens(i) == name}
        return self._special | known


class TextStream:
    """Turns tokens that arrive in bursts into text that can be printed at once, up to a stop string.

    The bytes of an unfinished character, and what may become a stop string, are held back, so what is printed never has
    to be unprinted. Its pieces joined are what `TextCodec.decode` makes of all tokens. Only the last few tokens are
    decoded: those since the last place where the text before it cannot change any more, after some that come before
    that place, because a decoder treats the first token of a text in its own way.
    """

    def __init__(self, codec: TextCodec, stop: Sequence[str] = (), after: Sequence[int] = ()) -> None:
        """stop: strings that end the text; they are not printed. after: as `TextCodec.decode`."""
        self.codec = codec
        self.stopped = False
        self._stop = stop
        # The tokens that are decoded; how many of them have a final text, and the length of that text.
        self._window, self._final, self._known = list(after), len(after), len(codec.decode(after))
        self._held = ""  # final, but a stop string may begin with its end
        self._open = ""  # text after that, which may change

    def feed(self, token_ids: Sequence[int], *, last: bool = False) -> str:
        """Add tokens; returns the text that is new and final. `last` flushes what is held back."""
        return self.take(token_ids, last=last)[0]

    def take(self, token_ids: Sequence[int], *, last: bool = False) -> tuple[str, int | None]:
        """As `feed`, and how many of the tokens were taken when a stop string ended the text; None while none did.

        The token that completes a stop string is the last one that is taken.
        """
        if self.stopped:
            return "", 0
        for count, token in enumerate(token_ids, 1):
            self._add(token)
            text = self._held + self._open
            if (cut := cut_at_stop(text, self._stop)) != text:
                self.stopped = True
                return cut, count
        text = self._held + self._open if last else self._held[: len(self._held) - self._may_stop(self._held)]
        self._held = self._held[len(text) :]
        return text, None

    def _add(self, token: int) -> None:
        self._window.append(token)
        text = self.codec.decode(self._window)
        self._open = text[self._known :]
        if not self._open or text.endswith("\ufffd") or token in self.codec.unfinished:
            return
        self._held, self._open, self._known = self._held + self._open, "", len(text)
        # What is left of a text without its first token may be empty, and then tells nothing of how it goes on.
        if shorter := self.codec.decode(self._window[self._final :]):
            self._window, self._known = self._window[self._final :], len(shorter)
        self._final = len(self._window)

    def _may_stop(self, text: str) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = max(map(len, self._stop), default=0)
        lengths = range(min(longest - 1, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)


def stops_at(
    codec: TextCodec, stop: Sequence[str], after: Sequence[int] = ()
) -> Callable[[list[int]], int | None] | None:
    """What ends one text at a stop string: told of its new tokens, it says how many are taken when one is complete.

    None without stop strings. after: as `TextCodec.decode`.
    """
    if not stop:
        return None
    stream = TextStream(codec, stop, after)
    return lambda token_ids: stream.take(token_ids)[1]


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings in it."""
    return text[: min((place for one in stop if (place := text.find(one)) >= 0), default=len(text))]
