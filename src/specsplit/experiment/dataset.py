"""Prompts: reading the formats that people have, slicing them evenly, and saying exactly what was taken."""

from __future__ import annotations

import codecs
import json
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specsplit.errors import UserError
from specsplit.io import replace_file, sha256_file, write_json

LISTED_PROBLEMS = 10
HUMAN_ROLES = ("human", "user")
FORMS = "prompt, conversations, messages, turns"


@dataclass(frozen=True)
class Prompt:
    """One prompt; `id` is unique in its file."""

    id: str
    category: str
    prompt: str


@dataclass(frozen=True)
class SkippedLine:
    """A line (counted from 1) that gave no prompt, and why."""

    line: int
    reason: str


def load_prompts(path: Path, on_bad_line: str = "stop") -> tuple[list[Prompt], list[SkippedLine]]:
    """Read a JSONL file of prompts; returns them with the lines that were skipped.

    A line is one JSON object with one of: `prompt` (text); `conversations` (ShareGPT: the first human turn);
    `messages` (chat: the first user turn); `turns` (MT-bench, Spec-Bench: the first turn). `id` (or `question_id`)
    and `category` are optional. Blank lines are ignored.

    on_bad_line: "stop" raises UserError that lists the bad lines with number and reason; "skip" returns them.
    Duplicate ids, a missing file and a file without any usable prompt are always a UserError.
    """
    if on_bad_line not in ("stop", "skip"):
        raise UserError(f"dataset.on_bad_line (--on-bad-line) is {on_bad_line!r}: take stop or skip")
    try:
        # Editors on Windows begin a file with a byte order mark.
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; set dataset.path (--prompts) to a JSONL file of prompts") from None
    prompts: list[Prompt] = []
    skipped: list[SkippedLine] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompt = _parse(line, number)
        except ValueError as error:
            skipped.append(SkippedLine(number, str(error)))
            continue
        if prompt.id in line_of:
            raise UserError(
                f"{path}:{number}: id {prompt.id!r} stands in line {line_of[prompt.id]} already; give each its own id"
            )
        line_of[prompt.id] = number
        prompts.append(prompt)
    if skipped and on_bad_line == "stop":
        listed = "\n".join(f"{path}:{bad.line}: {bad.reason}" for bad in skipped[:LISTED_PROBLEMS])
        more = f"\n... and {len(skipped) - LISTED_PROBLEMS} more" if len(skipped) > LISTED_PROBLEMS else ""
        raise UserError(
            f"{listed}{more}\nMend what is listed, or leave bad lines out with dataset.on_bad_line: skip "
            f"(--on-bad-line skip)."
        )
    if not prompts:
        why = f"; the first bad line is {skipped[0].line}: {skipped[0].reason}" if skipped else ""
        raise UserError(f"{path}: no usable prompt{why}. Each line wants a JSON object with one of the keys {FORMS}")
    return prompts, skipped


def _parse(line: bytes, number: int) -> Prompt:
    try:
        data = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not usable JSON: nested too deeply") from None
    if not isinstance(data, dict):
        raise ValueError(f"not a JSON object but {type(data).__name__}")
    text = _prompt_text(data)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the prompt is {'empty' if isinstance(text, str) else 'not text'}")
    prompt_id = data.get("id", data.get("question_id", f"line-{number}"))
    category = data.get("category", "uncategorised")
    if isinstance(prompt_id, bool) or not isinstance(prompt_id, str | int) or prompt_id == "":
        raise ValueError(f"id {prompt_id!r} is not text or a whole number")
    if not isinstance(category, str) or not category:
        raise ValueError(f"category {category!r} is not text")
    for key, value in (("id", str(prompt_id)), ("category", category), ("prompt", text)):
        # JSON can write half of a surrogate pair ("\ud83d"); no tokenizer and no UTF-8 file can take it.
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"the {key} holds half of a surrogate pair, which is not a character")
    return Prompt(str(prompt_id), category, text)


def _prompt_text(data: dict[str, Any]) -> Any:
    if "prompt" in data:
        return data["prompt"]
    for key, role_key, text_key in (("conversations", "from", "value"), ("messages", "role", "content")):
        if key in data:
            turns = data[key] if isinstance(data[key], list) else []
            for turn in turns:
                if isinstance(turn, dict) and turn.get(role_key) in HUMAN_ROLES:
                    return turn.get(text_key)
            raise ValueError(f"{key!r} has no turn of a human")
    if "turns" in data:
        if not isinstance(data["turns"], list) or not data["turns"]:
            raise ValueError("'turns' is not a list with at least one turn")
        return data["turns"][0]
    raise ValueError(f"none of the keys {FORMS}")


def select_prompts(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """A slice of at most `limit` prompts (None = all) that takes from every category in turn.

    Always the same for the same file: categories in the order of their first prompt, prompts in file order, and
    the slice in file order as well.
    """
    if limit is None:
        return list(prompts)
    if limit < 1:
        raise UserError(f"dataset.limit (--limit) is {limit}: take at least one prompt, or null for all")
    queues: dict[str, deque[int]] = {}
    for index, prompt in enumerate(prompts):
        queues.setdefault(prompt.category, deque()).append(index)
    taken: list[int] = []
    while len(taken) < min(limit, len(prompts)):
        for queue in queues.values():
            if queue and len(taken) < limit:
                taken.append(queue.popleft())
    return [prompts[index] for index in sorted(taken)]


def write_prompts(prompts: Sequence[Prompt], output: Path) -> None:
    """Write prompts as normalised JSONL."""
    replace_file(output, "".join(json.dumps(asdict(prompt), ensure_ascii=False) + "\n" for prompt in prompts))


def prepare_dataset(
    source: Path, output: Path, manifest: Path, *, limit: int | None, on_bad_line: str
) -> dict[str, Any]:
    """Write the prompts to run as normalised JSONL and a manifest of where they came from; returns the manifest.

    Manifest: source, source_sha256, output_sha256, count, available (usable prompts before the limit), limit,
    categories {name: count}, on_bad_line, skipped [{line, reason}]. Raises UserError as load_prompts and
    select_prompts do, and when an output would overwrite the source.
    """
    for written in (output, manifest):
        if written.resolve() == source.resolve():
            raise UserError(f"{written} is the source itself (--source): write to another file")
    prompts, skipped = load_prompts(source, on_bad_line)
    taken = select_prompts(prompts, limit)
    write_prompts(taken, output)
    content = {
        "source": str(source),
        "source_sha256": sha256_file(source),
        "output_sha256": sha256_file(output),
        "count": len(taken),
        "available": len(prompts),
        "limit": limit,
        "categories": dict(Counter(prompt.category for prompt in taken)),
        "on_bad_line": on_bad_line,
        "skipped": [asdict(bad) for bad in skipped],
    }
    write_json(manifest, content)
    return content
