"""The target writes its own training text, as in Magpie (Xu et al. 2024), so no other data is needed.

A chat model that gets its template up to the user's turn writes what a user would say. That text is put into the
template as a prompt, and the model answers it. A model without a template writes a text from its beginning.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from specsplit.distill.decoder import STATES_DTYPE, Answer, BatchDecoder
from specsplit.distill.process import Team
from specsplit.distill.shards import (
    RECIPE,
    Text,
    describe_shard,
    read_shard,
    shard_header,
    shard_path,
    write_manifest,
    write_shard,
)
from specsplit.engines.transformers import CausalLM
from specsplit.errors import UserError
from specsplit.io import json_sha256, read_json_object, write_json
from specsplit.models.head_config import default_layers
from specsplit.models.tokenizer import TextCodec
from specsplit.settings.distill import WritingSettings

MARK = "\u2063specsplit\u2063"  # stands for the user's words while the template is taken apart
USER, ANSWER = 0, 1  # the two draws of a batch have seeds of their own
LEFT_OUT = ("unusable", "repeated", "held_out")
TIMES = "seconds.json"
VERSION = 2  # of the texts that the same settings give; existing shards of another version are not used
EMPTY_BATCHES = 20  # in a row, after which the model is given up


@dataclass(frozen=True)
class Template:
    """user: the tokens up to where the user speaks. around: tokens of a whole prompt beside the user's own."""

    user: list[int]
    around: int
    has_turns: bool


@dataclass
class Written:
    """The texts of a batch, and how many were left out: without a usable prompt (unusable), with the prompt of an
    earlier text (repeated), with a prompt that must not be among them (held_out)."""

    texts: list[Text]
    unusable: int = 0
    repeated: int = 0
    held_out: int = 0

    def counts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in LEFT_OUT}


def chat_template(codec: TextCodec, eos_token_ids: Sequence[int]) -> Template:
    """Where the user speaks in the model's chat template. Raises UserError when that cannot be found."""
    tokenizer = codec.tokenizer
    if not tokenizer.chat_template:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else next(iter(eos_token_ids), None)
        if start is None:
            raise UserError("the target has neither a chat template nor a token that begins a text: choose another one")
        return Template([start], 1, has_turns=False)
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": MARK}], add_generation_prompt=True, tokenize=False
    )
    before, found, _ = whole.partition(MARK)
    if not found:
        raise UserError("the target's chat template does not show the user's words as they are: choose another target")
    user = tokenizer(before, add_special_tokens=False)["input_ids"]
    if not user:
        raise UserError("the target's chat template says nothing before the user's words: choose another target")
    return Template(list(user), len(codec.encode("a")) - 1, has_turns=True)


class Writer:
    """Writes batches of texts; the same number gives the same batch, on a CPU with the same threads bit for bit.

    held_out: prompts, in any spelling of spaces and capitals, that must not be among the texts.
    """

    def __init__(
        self, model: CausalLM, codec: TextCodec, settings: WritingSettings, held_out: Collection[str] = ()
    ) -> None:
        self.model, self.codec, self.settings = model, codec, settings
        self.template = chat_template(codec, model.eos_token_ids)
        self.stop_ids = sorted({*model.eos_token_ids})
        self.decoder, self._team = BatchDecoder(model), Team(model.device)
        self.layers = pick_state_layers(settings, model.num_layers) if settings.kind == "hidden_states" else ()
        self._held_out = {plain(prompt) for prompt in held_out}
        self._seen: set[tuple[int, ...]] = set()
        self._longest_prompt = self.template.around + settings.max_user_tokens
        longest = self._longest_prompt + settings.max_answer_tokens
        if longest > model.max_context:
            raise UserError(
                f"max_user_tokens {settings.max_user_tokens} and max_answer_tokens {settings.max_answer_tokens} make "
                f"texts of up to {longest} tokens; the target holds {model.max_context}"
            )
        if settings.top_k >= model.vocab_size:
            raise UserError(f"top_k {settings.top_k}: the target has {model.vocab_size} tokens, so at most one less")

    @property
    def state_bytes(self) -> int:
        """Bytes of the hidden states of a token; 0 when none are kept."""
        return len(self.layers) * self.model.hidden_size * STATES_DTYPE.itemsize

    @property
    def largest_shard(self) -> int:
        """Bytes of the hidden states of a batch, at most."""
        return self.settings.write_batch * (self._longest_prompt + self.settings.max_answer_tokens) * self.state_bytes

    def remember(self, texts: Sequence[Text]) -> None:
        """Note texts that were written before: their prompts are not used again."""
        self._seen |= {tuple(text.tokens[: text.answer].tolist()) for text in texts}

    def batch(self, number: int) -> Written:
        """Batch `number`, counted from 0. `batch` or `remember` must have had those before it."""
        settings, written = self.settings, Written([])
        fresh: dict[tuple[int, ...], None] = {}
        for said, prompt in self._prompts(number):
            if not prompt:
                written.unusable += 1
            elif any(held in plain(said) for held in self._held_out):
                written.held_out += 1
            elif prompt in self._seen or prompt in fresh:
                written.repeated += 1
            else:
                fresh[prompt] = None
        if fresh:
            temperature = settings.answer_temperature[number % len(settings.answer_temperature)]
            noted = {"top_k": settings.top_k, "layers": self.layers}
            answers = self._generate(list(fresh), settings.max_answer_tokens, temperature, (number, ANSWER), **noted)
            written.texts = [self._text(prompt, answer) for prompt, answer in zip(fresh, answers, strict=True)]
            self.remember(written.texts)
        return written

    def _text(self, prompt: Sequence[int], answer: Answer) -> Text:
        tokens = torch.tensor([*prompt, *answer.tokens])
        return Text(tokens, len(prompt), answer.top_ids, answer.top_log_probs, answer.states if self.layers else None)

    def _prompts(self, number: int) -> list[tuple[str, tuple[int, ...]]]:
        """User turns, as text and as the tokens of the prompt; no tokens for one that cannot be used."""
        settings = self.settings
        rows = [self.template.user] * settings.write_batch
        turns = self._generate(rows, settings.max_user_tokens, settings.user_temperature, (number, USER))
        texts = [self.codec.decode(turn.tokens).strip() for turn in turns]
        if not self.template.has_turns:  # the beginning of a text, which goes on as it began, unless it is over
            return [
                (text, () if turn.tokens[-1] in self.stop_ids else (*self.template.user, *turn.tokens))
                for text, turn in zip(texts, turns, strict=True)
            ]
        # Encoded from text, as a typed prompt is; the tokens may differ from the sampled ones.
        prompts = [tuple(self.codec.encode(text)) if text else () for text in texts]
        return [(text, p if len(p) <= self._longest_prompt else ()) for text, p in zip(texts, prompts, strict=True)]

    def _generate(
        self, rows: Sequence[Sequence[int]], count: int, temperature: float, draw: tuple[int, int], **noted: Any
    ) -> list[Answer]:
        """At most `count` tokens after each row, the end-of-text token included when it came. noted: what of them."""

        def write(number: int, part: Sequence[Sequence[int]]) -> list[Answer]:
            seed = _draw_seed(self.settings.seed, *draw, number)
            return self.decoder.generate(part, count, temperature, self.stop_ids, seed, **noted)

        parts = self._team.split(rows)
        return [answer for written in self._team.map(write, range(len(parts)), parts) for answer in written]


MADE_BY = ("hardware", "code")  # another device or other code may write other text


def pick_state_layers(settings: WritingSettings, num_layers: int) -> tuple[int, ...]:
    """The target's layers whose inputs are kept as hidden states. Raises UserError for those that it does not have."""
    layers = tuple(settings.state_layers or default_layers(num_layers))
    if beyond := [layer for layer in layers if not 0 <= layer < num_layers]:
        raise UserError(f"state_layers: {beyond[0]} is not one of the target's layers, 0 to {num_layers - 1}")
    return layers


def write_texts(
    writer: Writer,
    folder: Path,
    about: dict[str, Any],
    on_batch: Callable[[Written, int, float], None] = lambda written, tokens, seconds: None,
) -> dict[str, Any]:
    """Write batches into `folder` until there are `tokens` tokens of answers; returns the manifest, also written there.

    Shards of the same recipe and target that are there already are kept. about: what the manifest says beside them; it
    must hold `target` and `held_out`, which decide the text as well, as MADE_BY does. on_batch(written, tokens so far,
    seconds that it took; 0 = it was there). Raises UserError when the model writes nothing that can be used.
    """
    settings = writer.settings
    folder.mkdir(parents=True, exist_ok=True)
    decides = {
        "version": VERSION,
        "settings": settings.what_decides(),
        "target": about["target"],
        "held_out": about["held_out"],
        **{key: about.get(key) for key in MADE_BY},
    }
    recipe, tokens, empty = json_sha256(decides), 0, 0
    shards: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter(dict.fromkeys(LEFT_OUT, 0))
    # The seconds that each shard took, in a file of their own: shards are the same bytes however long they took.
    times: dict[str, float] = read_json_object(folder / TIMES) if (folder / TIMES).is_file() else {}
    for number in count():
        if tokens >= settings.tokens:
            break
        path, started, seconds = shard_path(folder, number), time.monotonic(), 0.0
        header = shard_header(path)
        if header.get(RECIPE) == recipe:
            written = Written(read_shard(path), **{name: header[name] for name in LEFT_OUT})
            writer.remember(written.texts)
        else:
            if (free := shutil.disk_usage(folder).free) < writer.largest_shard:
                raise UserError(
                    f"{folder}: {free / 1e9:.1f} GB are free, and the next file may take "
                    f"{writer.largest_shard / 1e9:.1f}: make room and start again, which goes on here, or lower "
                    "tokens or write_batch"
                )
            written = writer.batch(number)
            if written.texts:
                write_shard(path, written.texts, {RECIPE: recipe, **written.counts()})
            seconds = time.monotonic() - started
            times[path.name] = round(seconds, 3)
            write_json(folder / TIMES, times)
        left_out.update(written.counts())
        empty = 0 if written.texts else empty + 1
        if empty == EMPTY_BATCHES:
            raise UserError(
                f"the target wrote {empty} batches without a new prompt: raise user_temperature or write_batch, or "
                "choose another target"
            )
        if written.texts:
            shards.append(describe_shard(path, written.texts))
            tokens += shards[-1]["answer_tokens"]
        on_batch(written, tokens, seconds)
    for path in folder.glob("shard-*.safetensors"):  # of another recipe, or of more text
        if path.name not in {shard["file"] for shard in shards}:
            path.unlink()
    spent = sum(times.get(shard["file"], 0.0) for shard in shards)
    facts = {
        "settings": settings.model_dump(),
        "state_layers": list(writer.layers),
        "left_out": dict(left_out),
        "seconds": spent,
    }
    return write_manifest(folder, shards, {"recipe_sha256": recipe, **facts, **about})


def plain(text: str) -> str:
    """A prompt without capitals and with single spaces, so that other spellings of it are found."""
    return " ".join(text.casefold().split())


def _draw_seed(*parts: int) -> int:
    """A seed for every part of every draw of every batch."""
    return int(json_sha256(list(parts))[:15], 16)
