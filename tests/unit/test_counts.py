"""Counts in messages, reports and captions: one is not `1 prompts`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import specsplit
from specsplit.api.generated import GeneratedText
from specsplit.client.result import Round, SpeculativeResult
from specsplit.errors import counted

PACKAGE = Path(specsplit.__file__).parent
# What people read as a result; messages of workers and engines about limits count what is seldom one.
READ = ("analysis", "api", "cli", "experiment", "provenance", "settings")
NOUNS = (
    "calls categories cells clients columns configurations conversations cores curves differences drafts entries "
    "epochs files GPUs hashes keys lines messages mistakes models packages panels peers prompts repeats requests "
    "rounds rows runs sessions steps texts threads tokens turns verifications workers"
)
COUNT = re.compile(rf" (?:(?:more|other|later|new|source|system) )?(?:{NOUNS.replace(' ', '|')})\b(?!/)")
# Limits and lengths that are never 1, and what is no count.
ALLOWED = {
    *("cli/context_curve.py limit", "cli/context_curve.py row.context_tokens", "experiment/records.py limit"),
    *("cli/distill/write_data.py manifest['answer_tokens']", "cli/openai_load.py found.limit"),
    *("cli/stop_worker.py endpoint.address", "experiment/containers.py kind", "cli/distill/train.py target.vocab_size"),
    *("experiment/runner.py len(token_ids)", "provenance/crate.py rule"),
    "provenance/reproduce.py len(software['packages'])",
}


@pytest.mark.parametrize(
    ("number", "words", "said"),
    [
        (0, ["prompt"], "0 prompts"),
        (1, ["prompt"], "1 prompt"),
        (2, ["prompt"], "2 prompts"),
        (1, ["entry"], "1 entry"),
        (2, ["entry"], "2 entries"),
        (2, ["key"], "2 keys"),
        (2, ["batch"], "2 batches"),
        (2, ["hash"], "2 hashes"),
        (1, ["text differs", "texts differ"], "1 text differs"),
        (2, ["text differs", "texts differ"], "2 texts differ"),
        (None, ["prompt"], "None prompts"),  # not recorded
    ],
)
def test_one_and_many(number: object, words: list[str], said: str) -> None:
    assert counted(number, *words) == said


def uncounted() -> Iterator[tuple[str, int]]:
    """Numbers in f-strings before a plural: file and expression, line."""
    for path in (path for name in READ for path in (PACKAGE / name).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.JoinedStr):
                continue
            for part, after in zip(node.values, node.values[1:], strict=False):
                if not isinstance(part, ast.FormattedValue) or part.format_spec or not isinstance(after, ast.Constant):
                    continue
                constant = isinstance(part.value, ast.Name) and part.value.id.isupper()
                if not constant and COUNT.match(str(after.value)):
                    yield f"{path.relative_to(PACKAGE)} {ast.unparse(part.value)}", node.lineno


def test_every_count_has_its_plural() -> None:
    found = dict(uncounted())
    wrong = {name: line for name, line in found.items() if name not in ALLOWED}
    assert not wrong, "use specsplit.errors.counted"
    assert not ALLOWED - set(found), "no longer there"


def test_a_text_of_one_token() -> None:
    text = GeneratedText("a", [1], SpeculativeResult([2], "length", [Round(1)], ttft_ms=5.0, total_ms=5.0))
    assert text.summary() == "1 token in 1 round, ended by length, TTFT 5 ms"
