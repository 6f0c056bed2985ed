"""From a row of a table to a conversation: the shapes that data sets of prompts have.

docs/prompts.md has the table of them, with a sample of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specsplit.errors import listed, shortened
from specsplit.experiment.prompt_json import parse_cell
from specsplit.experiment.prompt_table import kind_of

ID_KEYS = (
    *("id", "question_id", "prompt_id", "task_id", "custom_id"),
    *("conversation_id", "conversation_hash", "unique_id", "uuid", "uid"),
)
CHAT_KEYS = ("conversations", "messages", "conversation", "items")
SYSTEM_KEYS = ("system", "system_prompt")
PROMPT_KEYS = ("prompt", *CHAT_KEYS, "body", "turns", "instruction", "question")
# What people call a prompt elsewhere, and what may be something else: named in the message, not taken.
LIKELY_KEYS = ("text", "input", "inputs", "query", "problem", "instruction", "content", "user", "dialog", "dialogue")
FORMS = "prompt, conversations, messages, turns, instruction, question"
HUMAN, SYSTEM, ASSISTANT = "user", "system", "assistant"
ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), HUMAN),
    **dict.fromkeys(("system", "developer"), SYSTEM),
    **dict.fromkeys(("gpt", "assistant", "bot", "model", "chatgpt", "bing", "bard"), ASSISTANT),
}


class RowError(ValueError):
    """A row that gives no prompt; the message says why."""


@dataclass(frozen=True)
class Conversation:
    """What a row says. turns: of the human, one at least. used: the columns that something was taken from.

    others: messages that are no turn of the two and no system message before the first turn.
    """

    id: str | None
    category: str | None
    system: str | None
    turns: tuple[str, ...]
    used: frozenset[str]
    others: int = 0
    notes: tuple[str, ...] = ()


def read_conversation(data: Mapping[str, Any], columns: Mapping[str, str]) -> Conversation:
    """The conversation of a row. columns: names that the user gave to prompt, id, category, system; a.b is inside a.

    Raises RowError that says what is wrong with it.
    """
    names: dict[str, str] = {}
    notes: list[str] = []
    for spelled in data:
        if (first := names.setdefault(spelled.lower(), spelled)) != spelled and data[first] != data[spelled]:
            notes.append(f"has {first!r} and {spelled!r}; {first!r} is taken")
    used: set[str] = set()

    def take(part: str, known: Sequence[str]) -> tuple[str, Any]:
        """The column that the user named, or the first of the known ones that is there and not null."""
        name = next((names[key] for key in known if key in names and data[names[key]] is not None), "")
        name = columns.get(part, name)
        used.update({name.partition(".")[0]} - {""})
        return name, _inside(data, name) if name else None

    key, value = take("prompt", PROMPT_KEYS)
    if key == "":
        raise RowError(_no_prompt(data, names))
    if "prompt" not in columns:
        if key.lower() == "body":
            key, value = _body(key, value)
        elif key.lower() == "prompt" and isinstance(value, str):
            key, value = _chat_beside(key, value, data, names, notes)
            used.add(key)
        elif key.lower() == "instruction":
            value, more = _alpaca(value, data, names)
            used |= more
    system, turns, others = _turns(key, value)
    if system is None:
        name, system = take("system", SYSTEM_KEYS)
        if system is None and key.lower().startswith("body."):
            name, system = "body.instructions", data[key[:4]].get("instructions")
        system = _content(system)
        if system is not None and not isinstance(system, str):
            raise RowError(f"{name!r} is not text")
    _, prompt_id = take("id", ID_KEYS)
    _, category = take("category", ("category",))
    conversation = Conversation(
        _text_of("id", prompt_id),
        _text_of("category", category),
        system if system and system.strip() else None,
        tuple(turns),
        frozenset(used),
        others,
        tuple(notes),
    )
    _check_characters(conversation)
    return conversation


def _inside(data: Mapping[str, Any], name: str) -> Any:
    if name in data:
        return data[name]
    value: Any = data
    for part in name.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
            continue
        if not isinstance(value, Mapping) or part not in value:
            raise RowError(f"no column {name!r}, which dataset.columns (--columns) names; there are {_listed(data)}")
        value = value[part]
    return value


def _no_prompt(data: Mapping[str, Any], names: Mapping[str, str]) -> str:
    if null := [names[key] for key in PROMPT_KEYS if key in names]:
        return f"the prompt is not text: {null[0]!r} is null"
    if not data:
        return "an empty object; give it a prompt"
    likely = next((names[key] for key in LIKELY_KEYS if key in names), None)
    if likely is None:
        likely = next((key for key, value in data.items() if isinstance(value, str) and len(value) > 20), "COLUMN")
    return (
        f"none of the keys {FORMS}; there are {_listed(data)}. If one holds the prompt, name it: "
        f"dataset.columns: {{prompt: {likely}}} (--columns prompt={likely})"
    )


def _listed(data: Mapping[str, Any]) -> str:
    return listed((repr(shortened(name, 40)) for name in data), 12) or "no keys at all"


def _body(key: str, value: Any) -> tuple[str, Any]:
    """A request of OpenAI's batch files."""
    for name in ("messages", "prompt", "input"):
        if isinstance(value, Mapping) and value.get(name) is not None:
            return f"{key}.{name}", value[name]
    raise RowError("'body' is no request: it has neither messages nor prompt nor input")


def _chat_beside(
    key: str, value: str, data: Mapping[str, Any], names: Mapping[str, str], notes: list[str]
) -> tuple[str, Any]:
    """`prompt` beside a conversation (as UltraChat has it): the conversation when it begins with that prompt."""
    chat = next((names[name] for name in CHAT_KEYS if name in names and isinstance(data[names[name]], list)), None)
    if chat is None:
        return key, value
    try:
        if _turns(chat, data[chat])[1][0].strip() == value.strip():
            return chat, data[chat]
    except RowError:
        return key, value
    notes.append(
        f"has {key!r} and {chat!r} with another text; {key!r} is taken. For the other: dataset.columns: "
        f"{{prompt: {chat}}}"
    )
    return key, value


def _alpaca(value: Any, data: Mapping[str, Any], names: Mapping[str, str]) -> tuple[Any, set[str]]:
    """An instruction with its input (Alpaca) or context (Dolly), where it has one."""
    found = [names[name] for name in ("input", "context") if name in names]
    if isinstance(value, str):
        value = "\n\n".join([value, *(more for name in found if isinstance(more := data[name], str) and more.strip())])
    return value, set(found)


def _turns(key: str, value: Any) -> tuple[str | None, list[str], int]:
    """(system message, turns of the human, other messages) of a text or a list of either kind."""
    if isinstance(value, str) and key.lower() not in CHAT_KEYS:
        _check_text(value)
        return None, [value], 0
    if isinstance(value, str):
        value = parse_cell(value)  # as some tables have it
    if not isinstance(value, list) or not value:
        if key.lower() == "turns":
            raise RowError("'turns' is not a list with at least one turn")
        if key.lower() in CHAT_KEYS:
            why = "has no turn of a human" if value == [] else f"is not a list of messages but {kind_of(value)}"
            raise RowError(f"{key!r} {why}")
        raise RowError(_no_text("prompt", value))
    if not any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value, start=1):
            _check_text(item, f"turn {number}" if len(value) > 1 else "prompt")
        return None, list(value), 0
    system: list[str] = []
    turns: list[str] = []
    others = 0
    for number, message in enumerate(value, start=1):
        role, content, _ = _message(message)
        if role == SYSTEM and not turns:
            text = _content(content)
            system += [text] if isinstance(text, str) and text.strip() else []
        elif role == HUMAN:
            text = _content(content)
            _check_text(text, "prompt" if not turns else f"message {number}")
            turns.append(text)
        elif role != ASSISTANT or not turns:
            others += 1
    if not turns:
        roles = dict.fromkeys(str(_message(message)[2])[:40] for message in value)
        raise RowError(f"{key!r} has no turn of a human (roles: {', '.join(roles)})")
    return "\n\n".join(system) or None, turns, others


def _message(message: Any) -> tuple[str, Any, Any]:
    """(role in our words, content, role as it is written)"""
    if not isinstance(message, Mapping):
        return "", None, kind_of(message)
    role = next((message[key] for key in ("role", "from", "user", "speaker") if message.get(key) is not None), "none")
    content = next((message[key] for key in ("content", "value", "text") if message.get(key) is not None), None)
    return ROLES.get(role.strip().lower(), "") if isinstance(role, str) else "", content, role


def _content(content: Any) -> Any:
    """The text of a message; of a list of parts their texts. Raises RowError for a part that is no text."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type", "unknown") if isinstance(part, Mapping) else kind_of(part)
            raise RowError(f"a message has a part of type {kind!r}, which is not text")
        texts.append(text)
    return "\n".join(texts)


def _check_text(text: Any, what: str = "prompt") -> None:
    if not isinstance(text, str):
        raise RowError(_no_text(what, text))
    if not text.strip():
        raise RowError(f"the {what} is empty")


def _no_text(what: str, value: Any) -> str:
    mend = "; write it in quotes" if isinstance(value, bool | int | float) else ""
    return f"the {what} is not text but {kind_of(value)}{mend}"


def _text_of(key: str, value: Any) -> str | None:
    """An id or category as text; None when there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)  # pandas makes such floats of whole numbers in a column with gaps
    if isinstance(value, bool) or not isinstance(value, str | int):
        wanted = "text or a whole number" if key == "id" else "text"
        raise RowError(f"{key} {shortened(repr(value))} is not {wanted}")
    if value == "":
        raise RowError(f"{key} '' is not text")
    return str(value)


def _check_characters(conversation: Conversation) -> None:
    """JSON can write half of a surrogate pair ("\\ud83d"); no tokenizer and no UTF-8 file can take it."""
    texts = [("id", conversation.id), ("category", conversation.category), ("system message", conversation.system)]
    for key, value in [*texts, *(("prompt", turn) for turn in conversation.turns)]:
        try:
            (value or "").encode()
        except UnicodeEncodeError:
            raise RowError(f"the {key} holds half of a surrogate pair, which is not a character") from None
