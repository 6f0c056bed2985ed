"""A prompt, as the measurements take it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """One prompt; `id` is unique in its file.

    system: the system message that goes with it. token_ids: what the model gets, where it was prepared;
    tokens_of: with which tokenizer and template (`TextCodec.key`).
    """

    id: str
    category: str
    prompt: str
    system: str | None = None
    token_ids: tuple[int, ...] | None = None
    tokens_of: str | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """As a chat template takes them."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.prompt}]
