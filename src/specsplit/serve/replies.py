"""The bodies of replies, whole and in pieces, as OpenAI's API has them.

What speculative decoding did stands in `metrics.speculative_decoding`, in the shape of vLLM's per-request acceptance
metrics.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter
from typing import Any

from specsplit.api.generated import GeneratedText
from specsplit.decoding.measures import acceptance_length

FINISH = {"eos": "stop", "stop": "stop", "length": "length", "context": "length", "max_rounds": "length"}


def usage(text: GeneratedText) -> dict[str, int]:
    prompt, written = len(text.prompt_token_ids), len(text.token_ids)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def metrics(text: GeneratedText, gamma: int | str) -> dict[str, Any] | None:
    """Acceptance of one text; None when nothing was drafted. gamma: the most tokens of a draft.

    acceptance_histogram: entry k counts the verifications that accepted k tokens.
    """
    verified = [r for r in text.rounds if r.tree_nodes or r.drafted]
    if not verified:
        return None
    drafted, accepted = sum(r.drafted for r in verified), sum(r.accepted for r in verified)
    counts = Counter(r.accepted for r in verified)
    deepest = max(r.gamma_asked or r.drafted for r in verified)
    return {
        "speculative_decoding": {
            "mean_acceptance_length": acceptance_length(text.rounds),
            "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
            "acceptance_histogram": [counts[k] for k in range(max(deepest, *counts) + 1)],
            "num_spec_steps": len(verified),
            "num_accepted_draft_tokens": accepted,
            "num_draft_tokens": drafted,
            "num_spec_tokens": gamma if isinstance(gamma, int) else deepest,
        }
    }


class Reply:
    """One reply. chat: of a chat, else of a completion."""

    def __init__(self, model: str, *, chat: bool) -> None:
        self._chat = chat
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        kind = "chat.completion" if chat else "text_completion"
        self._head = {"id": self.id, "object": kind, "created": int(time.time()), "model": model}

    def whole(self, text: GeneratedText, gamma: int | str) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": str(text)}} if self._chat else {"text": str(text)}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": FINISH[text.finish_reason]}
        return {**self._head, "choices": [choice], "usage": usage(text), "metrics": metrics(text, gamma)}

    def piece(self, piece: str, *, first: bool = False, finish: str | None = None, with_usage: bool = False) -> str:
        """An event of a stream."""
        if self._chat:
            role = {"role": "assistant"} if first else {}
            said: dict[str, Any] = {"delta": {**role, **({"content": piece} if piece or first else {})}}
        else:
            said = {"text": piece}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish and FINISH[finish]}
        return self._event({"choices": [choice], **({"usage": None} if with_usage else {})})

    def ending(self, text: GeneratedText, gamma: int | str) -> str:
        """The event with the usage, which has no choice."""
        return self._event({"choices": [], "usage": usage(text), "metrics": metrics(text, gamma)})

    def _event(self, content: dict[str, Any]) -> str:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return event({**self._head, "object": kind, **content})


def event(content: Any) -> str:
    """A server-sent event."""
    return f"data: {content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)}\n\n"
