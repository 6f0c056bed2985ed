"""The bodies of requests: what they may say, and the prompt and options that they stand for.

Field names and defaults are those of OpenAI's API and, where it has none, of vLLM's server. A field that would change
the text and is not built is refused unless it has the value that changes nothing.
"""

from __future__ import annotations

import difflib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from specsplit.errors import shortened
from specsplit.serve.failures import ApiError
from specsplit.settings.run import MAX_SEED, Temperature

MOST_STOPS = 16
T = TypeVar("T")
# A list of a body, which is not read on after its first fault: telling of half a million takes seconds.
Several = Annotated[list[T], Field(fail_fast=True)]
# Field -> the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "logprobs": (False,), "top_logprobs": (0,), "prompt_logprobs": (), "echo": (False,),
    "suffix": ("",), "logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,),
    "repetition_penalty": (1,), "min_p": (0,), "length_penalty": (1,), "use_beam_search": (False,),
    "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (), "prediction": (),
    "reasoning_effort": ("none",), "web_search_options": (), "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,), "add_generation_prompt": (True,), "guided_json": (), "guided_regex": (),
    "structured_outputs": (), "include_stop_str_in_output": (False,), "continue_final_message": (False,),
    "chat_template": (), "chat_template_kwargs": ({},), "documents": ([],), "truncate_prompt_tokens": (),
    "allowed_token_ids": (), "bad_words": ([],), "logits_processors": ([],), "thinking_token_budget": (),
    "prompt_embeds": (),
}  # fmt: skip
# What has no effect on the text.
IGNORED = ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
           "prompt_cache_retention", "verbosity", "cache_prompt", "cache_salt", "request_id", "priority",
           "stream_interval", "include_reasoning")  # fmt: skip


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: bool = False


class Part(BaseModel):
    """A piece of a message's content."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Annotated[str, Field(min_length=1)]
    content: str | Several[Part]
    name: str | None = None
    # Of an answer that a client sends back; one that had some cannot be told to a model here.
    tool_calls: Annotated[list[Any], Field(max_length=0)] = []
    annotations: Annotated[list[Any], Field(max_length=0)] = []

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class Body(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    seed: int | None = None
    stop: str | Several[str] | None = None
    stop_token_ids: Several[Annotated[int, Field(ge=0)]] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: bool = False

    def tokens_limit(self) -> int | None:
        return self.max_tokens

    def prompt_of(self) -> Any:
        """The prompt as the Python interface takes it."""
        raise NotImplementedError

    def options(self, eos_token_ids: Sequence[int]) -> dict[str, Any]:
        """The options of the Python interface that this request sets. eos_token_ids: what ends a text by itself.

        A sampled text without a seed gets a random one; with one it is the same each time.
        """
        options: dict[str, Any] = {"seed": secrets.randbelow(MAX_SEED) if self.seed is None else self.seed % MAX_SEED}
        for name in ("temperature", "top_p", "stop", "ignore_eos"):
            if (value := getattr(self, name)) is not None:
                options[name] = value
        if self.stop_token_ids:  # beside the end of text, and obeyed with ignore_eos as well
            options["stop_token_ids"] = [*self.stop_token_ids, *(() if self.ignore_eos else eos_token_ids)]
            options["ignore_eos"] = False
        if self.top_k is not None:
            options["top_k"] = max(self.top_k, 0)  # -1: all tokens, as 0
        if (limit := self.tokens_limit()) is not None:
            options["max_new_tokens"] = limit
        return options


class ChatBody(Body):
    """POST /v1/chat/completions"""

    messages: Annotated[Several[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    def tokens_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def prompt_of(self) -> list[dict[str, str]]:
        return [message.plain() for message in self.messages]


class CompletionBody(Body):
    """POST /v1/completions: one prompt, a string or token ids; 16 tokens unless the request says how many."""

    prompt: str | Several[int] | Several[str] | Several[Several[int]]

    def tokens_limit(self) -> int | None:
        return self.max_tokens or 16

    def prompt_of(self) -> str | list[int]:
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise ApiError(400, "prompt: one text in a request here; send several requests", param="prompt")
            prompt = prompt[0]
        if not prompt:
            raise ApiError(400, "prompt: it is empty; give it some text", param="prompt")
        return prompt

    def options(self, eos_token_ids: Sequence[int]) -> dict[str, Any]:
        return {**super().options(eos_token_ids), "use_chat_template": False}


def read_body(data: bytes, kind: type[Body]) -> Body:
    """The request in a body. Raises ApiError that names the field and what is wanted."""
    try:
        content = _without_nulls(json.loads(data))
    except (ValueError, RecursionError) as error:
        reason = str(error).partition(";")[0]  # after it comes advice to programmers in Python
        raise ApiError(400, f"the body is not JSON: {reason}") from None
    if not isinstance(content, dict):
        raise ApiError(400, "the body is not a JSON object")
    given = {name: value for name, value in content.items() if name not in IGNORED}
    for name, neutral in NEUTRAL.items():
        value = given.pop(name, None)
        if value is not None and not any(value == one and isinstance(value, bool) == isinstance(one, bool)
                                         for one in neutral):  # fmt: skip
            raise ApiError(400, f"{name}: {_shown(value)} is not supported", param=name, code="unsupported_parameter")
    for name in given:
        if name not in kind.model_fields:
            close = difflib.get_close_matches(name, kind.model_fields, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ApiError(400, f"{name}: not a field of this request{hint}", param=name, code="unknown_parameter")
    try:
        body = kind.model_validate(given)
    except ValidationError as error:
        raise _named(error, content) from None
    _check(body)
    return body


def _without_nulls(content: Any) -> Any:
    """An explicit null is what clients send for a field that was not given, and in messages that they send back."""
    if isinstance(content, list):
        return [_without_nulls(item) for item in content]
    if isinstance(content, dict):
        return {name: _without_nulls(value) for name, value in content.items() if value is not None}
    return content


def _check(body: Body) -> None:
    ends = not body.ignore_eos or body.stop or body.stop_token_ids
    if body.min_tokens and (ends or body.min_tokens > (body.tokens_limit() or 0)):
        message = "min_tokens: only with ignore_eos and without stops, and not above max_tokens"
        raise ApiError(400, message, param="min_tokens", code="unsupported_parameter")
    if "stream_options" in body.model_fields_set and not body.stream:
        raise ApiError(400, "stream_options: only with stream", param="stream_options")
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > MOST_STOPS or not all(stops):
        raise ApiError(400, f"stop: at most {MOST_STOPS} strings, none of them empty", param="stop")


def _named(error: ValidationError, content: Mapping[str, Any]) -> ApiError:
    """The first problem, with the place of the field; a union has one problem for each of its members."""
    problems = error.errors()
    field = str(problems[0]["loc"][0])
    # Members of a union are no part of the place.
    kinds = re.compile(r"str|list\[.*|function-wrap.*", re.DOTALL)
    places = [".".join(str(part) for part in p["loc"] if not kinds.fullmatch(str(part))) for p in problems]
    told = " or: ".join(dict.fromkeys(p["msg"] for p in problems if str(p["loc"][0]) == field))
    if field not in content:
        return ApiError(400, f"{field}: it is missing", param=field, code="missing_required_parameter")
    return ApiError(400, f"{places[0]}: {told}", param=field)


def _shown(value: Any) -> str:
    return shortened(json.dumps(value), 80)
