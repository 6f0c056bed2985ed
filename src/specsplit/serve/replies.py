"""The bodies of replies, whole and in pieces, as OpenAI's API has them.

What speculative decoding did stands in `metrics.speculative_decoding`, in the shape of vLLM's per-request acceptance
metrics.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from specsplit.api.generated import GeneratedText
from specsplit.decoding.measures import acceptance_length
from specsplit.serve.bodies import Body, ChatBody

FINISH = {"eos": "stop", "stop": "stop", "length": "length", "context": "length", "max_rounds": "length"}


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
    """The reply to one request."""

    def __init__(self, model: str, body: Body, prompt_token_ids: Sequence[int]) -> None:
        self._body, self._prompt = body, prompt_token_ids
        self._chat = isinstance(body, ChatBody)
        self._sent = 0  # tokens in the events so far
        kind = "chat.completion" if self._chat else "text_completion"
        name = f"{'chatcmpl' if self._chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._head = {"id": name, "object": kind, "created": int(time.time()), "model": model}

    def whole(self, text: GeneratedText, gamma: int | str) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": str(text)}} if self._chat else {"text": str(text)}
        chosen = self._chosen(said, text.token_ids, FINISH[text.finish_reason], first=True)
        return {**self._head, **chosen, "usage": self._usage(len(text.token_ids)), "metrics": metrics(text, gamma)}

    def piece(self, piece: str, token_ids: Sequence[int], *, first: bool = False, finish: str | None = None) -> str:
        """An event of a stream. token_ids: the tokens since the event before."""
        self._sent += len(token_ids)
        if self._chat:
            role = {"role": "assistant"} if first else {}
            said: dict[str, Any] = {"delta": {**role, **({"content": piece} if piece or first else {})}}
        else:
            said = {"text": piece}
        wanted, used = self._body.stream_options, {}
        if wanted.include_usage:
            used = {"usage": self._usage(self._sent) if wanted.continuous_usage_stats else None}
        return self._event({**self._chosen(said, token_ids, finish, first=first), **used})

    def ending(self, text: GeneratedText, gamma: int | str) -> Iterator[str]:
        """The events after the last piece; that with the usage has no choice."""
        yield self.piece("", text.token_ids[self._sent :], finish=FINISH[text.finish_reason])
        if self._body.stream_options.include_usage:
            yield self._event({"choices": [], "usage": self._usage(self._sent), "metrics": metrics(text, gamma)})
        yield event("[DONE]")

    def _chosen(
        self, said: dict[str, Any], token_ids: Sequence[int], finish: str | None, *, first: bool
    ) -> dict[str, Any]:
        """The choice, with the token ids where vLLM has them: those of a chat's prompt stand outside of it."""
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
        if not self._body.return_token_ids:
            return {"choices": [choice]}
        prompt = {"prompt_token_ids": list(self._prompt)} if first else {}
        choice = {**choice, "token_ids": list(token_ids), **({} if self._chat else prompt)}
        return {"choices": [choice], **(prompt if self._chat else {})}

    def _usage(self, written: int) -> dict[str, int]:
        prompt = len(self._prompt)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def _event(self, content: dict[str, Any]) -> str:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return event({**self._head, "object": kind, **content})


def event(content: Any) -> str:
    """A server-sent event, in ASCII: some clients take other characters than SSE does, as U+2028, for ends of lines."""
    return f"data: {content if isinstance(content, str) else json.dumps(content)}\n\n"
