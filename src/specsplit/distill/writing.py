"""The target writes its own training text, as Magpie does (Xu et al. 2024): no data from elsewhere.

A chat model that is given its template up to where the user speaks goes on as a user would. What it writes there is
put into the template as a prompt is, and answered. A model without a template writes a text from its beginning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

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
from specsplit.models.tokenizer import TextCodec
from specsplit.settings.distill import WritingSettings

MARK = "\u2063specsplit\u2063"  # stands for what the user says while the template is taken apart
LABEL_TOKENS = 1 << 13  # of a pass that asks for the probabilities: its logits are [tokens, vocabulary]
USER, ANSWER = 0, 1  # the two draws of a batch have seeds of their own
LEFT_OUT = ("unusable", "repeated", "held_out")
TIMES = "seconds.json"
VERSION = 1  # of what is written by the same settings: another one, and shards that are there are not taken
EMPTY_BATCHES = 20  # in a row, after which the model is given up


@dataclass(frozen=True)
class Template:
    """user: the tokens up to where the user speaks. around: tokens of a whole prompt beside the user's own."""

    user: list[int]
    around: int
    has_turns: bool


@dataclass
class Written:
    """Of one batch the texts, and how many were left out, and why: nothing said or nothing left to say (unusable), said
    before (repeated), a prompt that must not be among them (held_out)."""

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
        # Plain sampling: no repetition penalty or the like that the model's authors recommend.
        model.model.generation_config = GenerationConfig()
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

    def remember(self, texts: Sequence[Text]) -> None:
        """Take note of texts that were written: their prompts are not taken again."""
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
            answers = self._generate(list(fresh), settings.max_answer_tokens, temperature, (number, ANSWER))
            written.texts = self._label([(list(p), answer) for p, answer in zip(fresh, answers, strict=True)])
            self.remember(written.texts)
        return written

    def _prompts(self, number: int) -> list[tuple[str, tuple[int, ...]]]:
        """What users say, as text and as the model is given it; no tokens for what is of no use."""
        settings = self.settings
        rows = [self.template.user] * settings.write_batch
        turns = self._generate(rows, settings.max_user_tokens, settings.user_temperature, (number, USER))
        texts = [self.codec.decode(turn).strip() for turn in turns]
        if not self.template.has_turns:  # the beginning of a text, which goes on as it began, unless it is over
            return [
                (text, () if turn[-1] in self.stop_ids else (*self.template.user, *turn))
                for text, turn in zip(texts, turns, strict=True)
            ]
        # Encoded anew, as a prompt that is typed: perhaps not with the tokens that were sampled.
        prompts = [tuple(self.codec.encode(text)) if text else () for text in texts]
        return [(text, p if len(p) <= self._longest_prompt else ()) for text, p in zip(texts, prompts, strict=True)]

    @torch.inference_mode()
    def _generate(
        self, rows: Sequence[Sequence[int]], count: int, temperature: float, draw: tuple[int, int]
    ) -> list[list[int]]:
        """At most `count` tokens after each row, the end-of-text token included when it came."""
        width = max(map(len, rows))
        pad = self.stop_ids[0] if self.stop_ids else 0
        device = self.model.device
        ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        torch.manual_seed(_draw_seed(self.settings.seed, *draw))
        chosen: dict[str, Any] = {"do_sample": False}
        if temperature:
            chosen = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        output = self.model.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=count,
            eos_token_id=self.stop_ids or None,
            pad_token_id=pad,
            **chosen,
        )
        return [self._until_end(row) for row in output[:, width:].tolist()]

    def _until_end(self, row: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(row) if token in self.stop_ids), len(row) - 1)
        return row[: end + 1]

    @torch.inference_mode()
    def _label(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Text]:
        """The target's likeliest tokens at every position of the answers, by plain passes over the whole texts."""
        device, k = self.model.device, self.settings.top_k
        texts: list[Text] = []
        width = max(len(prompt) + len(answer) for prompt, answer in pairs)
        at_once = max(1, LABEL_TOKENS // width)
        for start in range(0, len(pairs), at_once):
            part = pairs[start : start + at_once]
            rows = [prompt + answer for prompt, answer in part]
            longest = max(map(len, rows))
            # Padded at the right: no token of a text sees what comes after it.
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
            logits = self.model.model(input_ids=ids, use_cache=False).logits
            for i, (prompt, answer) in enumerate(part):
                own = logits[i, len(prompt) - 1 : len(prompt) + len(answer) - 1].float()
                top = own.topk(k, dim=-1)
                log_probs = top.values - own.logsumexp(-1, keepdim=True)
                texts.append(Text(torch.tensor(rows[i]), len(prompt), top.indices.cpu(), log_probs.cpu()))
        return texts


def write_texts(
    writer: Writer,
    folder: Path,
    about: dict[str, Any],
    on_batch: Callable[[Written, int, float], None] = lambda written, tokens, seconds: None,
) -> dict[str, Any]:
    """Write batches into `folder` until there are `tokens` tokens of answers; returns the manifest, also written there.

    Shards of the same recipe and target that are there already are kept. about: what the manifest says beside them; it
    must hold `target` and `held_out`, which decide the text as well. on_batch(written, tokens so far, seconds that it
    took; 0 = it was there). Raises UserError when the model writes nothing that can be used.
    """
    settings = writer.settings
    decides = {
        "version": VERSION,
        "settings": settings.what_decides(),
        "target": about["target"],
        "held_out": about["held_out"],
    }
    recipe, tokens, number, useless = json_sha256(decides), 0, 0, 0
    shards: list[dict[str, Any]] = []
    left_out = dict.fromkeys(LEFT_OUT, 0)
    took = _Times(folder / TIMES)
    while tokens < settings.tokens:
        path, started = shard_path(folder, number), time.monotonic()
        found = shard_header(path)
        if found.get(RECIPE) == recipe:
            written = Written(read_shard(path), **{name: found[name] for name in LEFT_OUT})
            writer.remember(written.texts)
            seconds = 0.0
        else:
            written = writer.batch(number)
            if written.texts:
                write_shard(path, written.texts, {RECIPE: recipe, **written.counts()})
            seconds = time.monotonic() - started
            took.note(path.name, seconds)
        number += 1
        for name, count in written.counts().items():
            left_out[name] += count
        useless = 0 if written.texts else useless + 1
        if useless == EMPTY_BATCHES:
            raise UserError(
                f"the target wrote {useless} batches without a new prompt: raise user_temperature or write_batch, or "
                "choose another target"
            )
        if written.texts:
            shards.append(describe_shard(path, written.texts))
            tokens += shards[-1]["answer_tokens"]
        on_batch(written, tokens, seconds)
    for path in folder.glob("shard-*.safetensors"):  # of another recipe, or of more text
        if path.name not in {shard["file"] for shard in shards}:
            path.unlink()
    facts = {"settings": settings.model_dump(), "left_out": left_out, "seconds": took.total(shards)}
    return write_manifest(folder, shards, {"recipe_sha256": recipe, **facts, **about})


class _Times:
    """Seconds that each shard took. In a file of their own: shards are the same bytes however long they took."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seconds: dict[str, float] = read_json_object(path) if path.is_file() else {}

    def note(self, name: str, seconds: float) -> None:
        self._seconds[name] = round(seconds, 3)
        write_json(self._path, self._seconds)

    def total(self, shards: Sequence[dict[str, Any]]) -> float:
        return sum(self._seconds.get(shard["file"], 0.0) for shard in shards)


def plain(text: str) -> str:
    """A prompt without what does not make it another one: capitals, and how its words are spaced."""
    return " ".join(text.casefold().split())


def _draw_seed(seed: int, number: int, which: int) -> int:
    """A seed for every draw of every batch."""
    return int(json_sha256([seed, number, which])[:15], 16)
