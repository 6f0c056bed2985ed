"""Prompts: reading a file of them, slicing it evenly, and saying exactly what was taken and what was not."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

from specsplit.errors import UserError, counted, listed, shortened
from specsplit.experiment.containers import read_source
from specsplit.experiment.fetching import fetched_facts
from specsplit.experiment.prompt import Prompt as Prompt
from specsplit.experiment.prompt_rows import read_rows
from specsplit.experiment.prompt_shapes import (
    FORMS,
    PROMPT_KEYS,
    Conversation,
    RowError,
    read_conversation,
)
from specsplit.experiment.prompt_table import Row
from specsplit.experiment.prompt_tokens import tokenize_prompts
from specsplit.io import json_sha256, refuse_overwriting, replace_file, sha256_file, write_json
from specsplit.models.tokenizer import TextCodec

LISTED_PROBLEMS = 10
LISTED_COLUMNS = 100
OURS = ("token_ids", "tokens_of", "after", "date")  # keys that `write_prompts` writes and no other file has


@dataclass(frozen=True)
class SkippedLine:
    """A line (or row, counted from 1) that gave no prompt, and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class PromptFile:
    """What a file holds. unit: what lines count. facts: for the manifest, of all that was not taken."""

    prompts: list[Prompt]
    skipped: list[SkippedLine]
    source_sha256: str
    unit: str
    facts: dict[str, Any] = field(default_factory=dict)


def load_prompts(path: Path, on_bad_line: str = "stop") -> tuple[list[Prompt], list[SkippedLine]]:
    """The prompts of a file, with the lines that were skipped: `read_prompt_file` without a mapping of columns."""
    file = read_prompt_file(path, on_bad_line)
    return file.prompts, file.skipped


def read_prompt_file(
    path: Path, on_bad_line: str = "stop", columns: Mapping[Any, str] | None = None, turns: str = "first"
) -> PromptFile:
    """Read a file of prompts of any format (`prompt_rows`) and shape (`prompt_shapes`); docs/prompts.md lists them.

    columns: the names of the columns that hold prompt, id, category and system message, where they are not the usual
    ones. turns: "first" takes the first turn of a conversation and counts the later ones; "all" makes a prompt of each.
    on_bad_line: "stop" raises UserError that lists the bad lines with number and reason; "skip" returns them.
    Duplicate ids, a missing file and a file without any usable prompt are always a UserError.
    """
    columns = columns or {}
    content, digest = read_source(path)
    table = read_rows(path, content, [columns["prompt"]] if "prompt" in columns else PROMPT_KEYS)
    prompts: list[Prompt] = []
    skipped: list[SkippedLine] = []
    line_of: dict[str, int] = {}
    read: list[tuple[Row, Conversation]] = []

    def at(line: int) -> str:
        return f"{path}:{line}" if table.unit == "line" else f"{path}, row {line}"

    for index, row in enumerate(table.rows):
        if row.data is None:
            skipped.append(SkippedLine(row.line, row.problem))
            continue
        try:
            said = read_conversation(row.data, columns)
            prompt = _prompt(said, row, table.generated_id(index, row))
        except RowError as error:
            skipped.append(SkippedLine(row.line, str(error)))
            continue
        several = [prompt, *_later_turns(said, prompt)] if turns == "all" else [prompt]
        if twice := next((each.id for each in several if each.id in line_of), None):
            raise UserError(
                f"{at(row.line)}: id {shortened(repr(twice), 80)} stands in {table.unit} {line_of[twice]} already; "
                "give each its own id"
            )
        if prompt.after is not None and prompt.after not in line_of:
            skipped.append(
                SkippedLine(row.line, f"'after' {shortened(repr(prompt.after), 80)} is no id of an earlier prompt")
            )
            continue
        line_of |= {each.id: row.line for each in several}
        prompts += several
        read.append((row, said))
    if skipped and on_bad_line == "stop":
        problems = listed([f"{at(bad.line)}: {bad.reason}" for bad in skipped], LISTED_PROBLEMS, "\n")
        raise UserError(
            f"{problems}\nMend what is listed, or leave bad lines out with dataset.on_bad_line: skip "
            f"(--on-bad-line skip)."
        )
    if not table.rows:
        raise UserError(f"{path}: {table.format} without a row; give it a prompt")
    if not prompts:
        why = f"; the first bad {table.unit} is {skipped[0].line}: {skipped[0].reason}" if skipped else ""
        raise UserError(f"{path}: no usable prompt{why}. Each {table.unit} wants one of {FORMS}")
    return PromptFile(prompts, skipped, digest, table.unit, {"format": table.format, **_facts(read, turns)})


def _prompt(said: Conversation, row: Row, generated_id: str) -> Prompt:
    prompt = Prompt(said.id or generated_id, said.category or "uncategorised", said.turns[0], said.system)
    assert row.data is not None
    if {"token_ids", "tokens_of"} <= row.data.keys():  # as `write_prompts` writes them
        tokens, made_with = row.data["token_ids"], row.data["tokens_of"]
        if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens) or not tokens:
            raise RowError("'token_ids' is not a list of token ids, which are whole numbers")
        return replace(prompt, token_ids=tuple(tokens), tokens_of=str(made_with))
    turn, after, date = (row.data.get(key) for key in ("turn", "after", "date"))
    if type(turn) is not int or turn < 2 or not isinstance(after, str):  # as well
        return prompt
    try:
        if date is not None:
            datetime.fromisoformat(date)
    except (TypeError, ValueError):
        raise RowError(f"'date' {date!r} is not a date") from None
    return replace(prompt, turn=turn, after=after, date=date)


def _later_turns(said: Conversation, first: Prompt) -> list[Prompt]:
    """The turns after the first, each after the one before it."""
    later: list[Prompt] = []
    for number, text in enumerate(said.turns[1:], start=2):
        before = later[-1].id if later else first.id
        later.append(Prompt(f"{first.id}-turn-{number}", first.category, text, turn=number, after=before))
    return later


def _facts(read: Sequence[tuple[Row, Conversation]], turns: str) -> dict[str, Any]:
    """What was taken from where, and what was not."""
    used = Counter(name for _, said in read for name in said.used)
    every = dict.fromkeys(name for row, _ in read if row.data for name in row.data)
    unused = [name for name in every if name not in used and name not in OURS]
    return {
        "columns": dict(used),
        "columns_not_used": unused[:LISTED_COLUMNS],
        "generated_ids": sum(said.id is None for _, said in read),
        "system_messages": sum(said.system is not None for _, said in read),
        "turns": turns,
        "later_turns_not_used": 0 if turns == "all" else sum(len(said.turns) - 1 for _, said in read),
        "prompts_with_later_turns": sum(len(said.turns) > 1 for _, said in read),
        "other_messages_not_used": sum(said.others for _, said in read),
        "notes": [{"line": row.line, "note": note} for row, said in read for note in (*row.notes, *said.notes)],
    }


def tell(path: Path, skipped: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> list[str]:
    """What was not taken of a file, a sentence each: skipped lines and the facts of its manifest."""
    said = [f"skipped {path}:{bad['line']}: {bad['reason']}" for bad in skipped]
    if notes := [f"{path}:{note['line']}: {note['note']}" for note in facts["notes"]]:
        said.append(listed(notes, LISTED_PROBLEMS, "\n"))
    if later := facts["later_turns_not_used"]:
        said.append(
            f"{counted(later, 'later turn')} of {counted(facts['prompts_with_later_turns'], 'conversation')} not used"
        )
    if others := facts["other_messages_not_used"]:
        said.append(f"{counted(others, 'message')} not used: neither a system message at the start nor a turn")
    tokens = facts.get("tokens") or {}
    if left_out := tokens.get("system_messages_left_out"):
        why = "the chat template has no place for them" if tokens["chat_template"] else "no chat template is used"
        names = listed(name[:80] for name in left_out)
        said.append(f"{counted(len(left_out), 'system message')} left out, for {why}: {names}")
    if tokens.get("date"):
        said.append(f"the chat template prints the date: {tokens['date']}")
    if tokens.get("template_varies"):
        said.append("the chat template says something else each time; all runs get the token ids of this one")
    return said


def select_prompts(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """A slice of at most `limit` prompts (None = all) that takes from every category in turn.

    A conversation counts as one: its later turns are taken with its first.
    Always the same for the same file: categories in the order of their first prompt, prompts in file order, and
    the slice in file order as well.
    """
    categories: dict[str, list[str]] = {}
    for prompt in first_turns(prompts):
        categories.setdefault(prompt.category, []).append(prompt.id)
    in_turn = [one for several in zip_longest(*categories.values()) for one in several if one is not None]
    taken = set(in_turn[:limit])
    chosen = []
    for prompt in prompts:
        if prompt.id in taken or prompt.after in taken:
            taken.add(prompt.id)
            chosen.append(prompt)
    return chosen


def first_turns(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Without the later turns of conversations, whose text is known only in a run."""
    return [prompt for prompt in prompts if prompt.after is None]


def write_prompts(prompts: Sequence[Prompt], output: Path) -> None:
    """Write prompts as normalised JSON lines, which `load_prompts` reads back as they are."""
    rows = [
        {key: value for key, value in asdict(prompt).items() if value is not None and (key, value) != ("turn", 1)}
        for prompt in prompts
    ]
    replace_file(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def prepare_dataset(
    source: Path,
    output: Path,
    manifest: Path,
    *,
    limit: int | None,
    on_bad_line: str,
    columns: Mapping[Any, str] | None = None,
    turns: str = "first",
    codec: TextCodec | None = None,
    use_chat_template: bool = True,
    date: datetime | None = None,
) -> dict[str, Any]:
    """Write the prompts to run as normalised JSON lines and a manifest of where they came from; returns the manifest.

    codec: also write the token ids that the models get, so that every run gets the same ones. date: what a chat
    template that prints the date is told; None: now.

    Manifest: source, source_sha256, output_sha256, prompts_sha256 (of ids, categories and texts, whatever the
    tokenizer), count, available (usable prompts before the limit), limit, categories {name: count}, on_bad_line,
    unit (what lines count), skipped [{line, reason}], tokens (None, or what they were made with), fetched (None, or
    where from), and what `read_prompt_file` says of all usable prompts: format, columns and columns_not_used,
    generated_ids, system_messages, turns, later_turns_not_used,
    other_messages_not_used, notes.
    Raises UserError as read_prompt_file and select_prompts do, and when an output would overwrite one of these files.
    """
    refuse_overwriting({"--output": output, "--manifest": manifest}, {"--source": source})
    file = read_prompt_file(source, on_bad_line, columns, turns)
    taken = select_prompts(file.prompts, limit)
    tokens = None
    if codec is not None:
        taken, tokens = tokenize_prompts(taken, codec, chat=use_chat_template, date=date)
    write_prompts(taken, output)
    content = {
        "source": str(source),
        "source_sha256": file.source_sha256,
        "output_sha256": sha256_file(output),
        "prompts_sha256": json_sha256([[p.id, p.category, p.system, p.prompt, p.after] for p in taken]),
        "count": len(taken),
        "available": len(file.prompts),
        "limit": limit,
        "categories": dict(Counter(prompt.category for prompt in taken)),
        "on_bad_line": on_bad_line,
        "unit": file.unit,
        "skipped": [asdict(bad) for bad in file.skipped],
        **file.facts,
        "tokens": tokens,
        "fetched": fetched_facts(source, file.source_sha256),
    }
    write_json(manifest, content)
    return content


def write_calibration_prompts(
    source: Path,
    measured: Path,
    output: Path,
    *,
    limit: int,
    on_bad_line: str,
    columns: Mapping[Any, str] | None = None,
) -> None:
    """Write a stratified slice of `limit` prompts of `source` to `output` as JSONL, without those in `measured`.

    A draft that was fitted to the prompts on which it is measured would look better than it is. A prompt counts as
    measured when its id or its text is. on_bad_line, columns: as `read_prompt_file`.
    Raises UserError when fewer than `limit` prompts are left.
    """
    taken, _ = load_prompts(measured)
    excluded = {prompt.id for prompt in taken} | {prompt.prompt for prompt in taken}
    refuse_overwriting({"the output": output}, {"the dataset": source, "the measured prompts": measured})
    every = read_prompt_file(source, on_bad_line, columns).prompts
    left = [prompt for prompt in every if not excluded & {prompt.id, prompt.prompt}]
    if len(left) < limit:
        raise UserError(
            f"{source} has {counted(len(every), 'prompt')}, {len(every) - len(left)} measured and {len(left)} left, "
            f"but draft.calibration_prompts asks for {limit}. Lower it or dataset.limit, add prompts, or name the "
            "layers in draft.skip_layers"
        )
    write_prompts(select_prompts(left, limit), output)
