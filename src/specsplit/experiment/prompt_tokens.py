"""Token ids of prompts, made once: a chat template may print the date, the time or something random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from specsplit.errors import PromptError
from specsplit.experiment.prompt import Prompt
from specsplit.models.tokenizer import TextCodec

TRIED_TWICE = 8  # prompts on which it is seen whether the template says the same again
ANOTHER_TIME = timedelta(days=432, hours=5, minutes=4, seconds=3)  # nothing of a date is the same after that


def tokenize_prompts(
    prompts: Sequence[Prompt], codec: TextCodec, *, chat: bool, date: datetime | None
) -> tuple[list[Prompt], dict[str, Any]]:
    """The prompts with their token ids, and what these were made with, for the manifest.

    date: what a template is told that asks for it; None: now. Facts: tokens_of (`TextCodec.key`), tokenizer_sha256,
    chat_template (whether one was used), date (what the template was told; None when it does not print it),
    template_varies (it says something else each time), system_messages_left_out (ids of prompts: the template has no
    place for them, or there is none).
    Raises PromptError that names the prompt.
    """
    now = datetime.now().replace(microsecond=0) if date is None else date
    key, left_out, made = codec.key(chat), [], []
    for prompt in prompts:
        if prompt.after is None:
            ids, whole = _encode(prompt, codec, chat=chat, date=now)
            left_out += [] if whole else [prompt.id]
            prompt = replace(prompt, token_ids=tuple(ids), tokens_of=key)
        made.append(prompt)
    tried = [prompt for prompt in made if prompt.after is None][:TRIED_TWICE]

    def differs(date: datetime) -> bool:
        return any(tuple(_encode(prompt, codec, chat=chat, date=date)[0]) != prompt.token_ids for prompt in tried)

    varies = differs(now)
    asked = differs(now + ANOTHER_TIME) and (not varies or codec.asks_for_the_date)
    told = now.isoformat() if asked else None  # else two runs would differ by it alone
    if later := next((prompt for prompt in made if prompt.after), None):
        if varies:
            raise PromptError(
                f"prompt {later.id[:80]!r}: the chat template says something else each time, so a later turn is not "
                "the same in every run; write dataset.turns: first (--turns first)"
            )
        made = [replace(prompt, date=told) if prompt.after else prompt for prompt in made]
    return made, {
        "tokens_of": key,
        "tokenizer_sha256": codec.sha256,
        "chat_template": codec.has_template and chat,
        "date": told,
        "template_varies": varies,
        "system_messages_left_out": left_out,
    }


def prompt_tokens(prompt: Prompt, codec: TextCodec, *, chat: bool) -> list[int]:
    """Token ids of a prompt: those that were prepared for this tokenizer and template, else made now."""
    if prompt.token_ids is not None and prompt.tokens_of == codec.key(chat):
        return list(prompt.token_ids)
    return _encode(prompt, codec, chat=chat)[0]


def later_turn_tokens(
    prompt: Prompt, before: Sequence[tuple[Prompt, str]], codec: TextCodec, *, chat: bool
) -> list[int]:
    """Token ids of a later turn. before: the prompts before it in order, each with the answer that was written."""
    date = None if prompt.date is None else datetime.fromisoformat(prompt.date)
    said = [
        message
        for turn, answer in before
        for message in ({"role": "user", "content": turn.prompt}, {"role": "assistant", "content": answer})
    ]
    whole = replace(prompt, system=before[0][0].system)
    return _encode(whole, codec, chat=chat, date=date, before=said)[0]


def _encode(
    prompt: Prompt,
    codec: TextCodec,
    *,
    chat: bool,
    date: datetime | None = None,
    before: Sequence[dict[str, str]] = (),
) -> tuple[list[int], bool]:
    """Token ids, and whether the system message is in them. Raises PromptError that names the prompt.

    before: the turns before. Without a template texts are put together, an empty line between two.
    """
    messages = [*before, {"role": "user", "content": prompt.prompt}]
    system = [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
    try:
        if not (chat and codec.has_template):
            text = "\n\n".join(message["content"] for message in messages)
            return codec.encode(text, use_chat_template=False), not system
        whole = _try([*system, *messages], codec, date) if system else None
        without = _try(messages, codec, date) if whole else codec.encode(messages, date=date)
        if whole is None:
            assert without is not None
            return without, not system
        return whole, whole != without
    except PromptError as error:
        raise PromptError(f"prompt {prompt.id[:80]!r}: {error}") from None


def _try(messages: Sequence[dict[str, str]], codec: TextCodec, date: datetime | None) -> list[int] | None:
    try:
        return codec.encode(messages, date=date)
    except PromptError:
        return None
