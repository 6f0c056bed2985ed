"""A prompt, as the measurements take it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """One prompt; `id` is unique in its file.

    system: the system message that goes with it. token_ids: what the model gets, where it was prepared;
    tokens_of: with which tokenizer and template (`TextCodec.key`).
    Of a later turn of a conversation, whose text so far is known only in a run: turn, from 2; after: the id of the
    prompt whose answer comes before it; date: what a chat template is told that prints it.
    """

    id: str
    category: str
    prompt: str
    system: str | None = None
    token_ids: tuple[int, ...] | None = None
    tokens_of: str | None = None
    turn: int = 1
    after: str | None = None
    date: str | None = None
