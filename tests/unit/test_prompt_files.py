"""Prompt files as people have them: every format and shape is read, what is none is named, nothing goes in silence."""

import bz2
import csv
import gzip
import io
import json
import lzma
import math
import re
import string
from dataclasses import fields, replace
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specsplit.analysis.reading import read_records
from specsplit.cli.main import main
from specsplit.errors import UserError
from specsplit.experiment.capacity import CapacityRecord
from specsplit.experiment.columns import RequestRecord, RoundRecord, writing_rows
from specsplit.experiment.dataset import (
    Prompt,
    SkippedLine,
    load_prompts,
    prepare_dataset,
    read_prompt_file,
    write_prompts,
)
from specsplit.experiment.peer_race import PeerRecord
from specsplit.io import csv_reader, refuse_overwriting, write_csv

from prompt_files import FORMATS, documented_shapes, json_lines, parquet

ROWS = [
    {"id": "a", "prompt": "Why is the sky blue?", "category": "science"},
    {"id": "b\u2028c", "prompt": "one\ntwo\u2028three\x85four é 世界", "category": "odd"},
    {"id": "007", "prompt": '"quotes", commas', "category": "NA"},
]
WRONG_NAMES = ("prompts.csv", "prompts.jsonl", "prompts.parquet", "prompts")
WITHIN = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def outcome(path: Path, on_bad_line: str) -> tuple[list[Prompt], list[SkippedLine], str]:
    """Prompts, lines that were left out, and the message where there is none of either."""
    try:
        return *load_prompts(path, on_bad_line), ""
    except UserError as error:
        return [], [], str(error)


# ---- what is read


@pytest.mark.parametrize(
    ("shape", "sample", "columns", "gives"), documented_shapes(), ids=lambda value: str(value)[:20]
)
def test_every_documented_shape_is_read_as_documented(tmp_path, shape, sample, columns, gives):
    file = read_prompt_file(put(tmp_path / "prompts", sample.encode()), columns=yaml.safe_load(columns) or {})
    assert [f"{prompt.id}: {prompt.prompt}" for prompt in file.prompts] == gives
    assert not file.skipped


@pytest.mark.parametrize("name", WRONG_NAMES)
@pytest.mark.parametrize("format_", FORMATS)
def test_every_format_is_recognised_by_its_content(tmp_path, format_, name):
    path = put(tmp_path / name, FORMATS[format_](ROWS))
    assert load_prompts(path) == ([Prompt(row["id"], row["category"], row["prompt"]) for row in ROWS], [])


def test_a_csv_table_keeps_line_ends_and_quotes_in_its_cells(tmp_path):
    path = tmp_path / "p.jsonl"
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["id", "prompt"])
        table.writeheader()
        table.writerows([{"id": "1", "prompt": 'a\r\nb "c", d'}, {"id": "2", "prompt": "x" * 200_000}])
    assert [p.prompt for p in load_prompts(path)[0]] == ['a\r\nb "c", d', "x" * 200_000]


def test_a_folder_that_datasets_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "splits")
    assert [prompt.id for prompt in load_prompts(tmp_path / "one")[0]] == [row["id"] for row in ROWS]
    assert len(load_prompts(tmp_path / "splits" / "test")[0]) == len(ROWS)
    with pytest.raises(UserError, match=r"with the splits train, test; name one of them: .*splits/train"):
        load_prompts(tmp_path / "splits")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "x", "id": None, "task_id": 3}, Prompt("3", "uncategorised", "x")),
        ({"prompt": "x", "id": 1.0, "category": 3}, Prompt("1", "3", "x")),
        ({"Prompt": "x", "ID": "A"}, Prompt("A", "uncategorised", "x")),
        ({"prompt": ["x", "later"]}, Prompt("line-1", "uncategorised", "x")),
        ({"prompt": [{"role": "user", "content": "x"}]}, Prompt("line-1", "uncategorised", "x")),
        ({"turns": "x"}, Prompt("line-1", "uncategorised", "x")),
        ({"conversations": [{"from": "USER", "value": "x"}]}, Prompt("line-1", "uncategorised", "x")),
        (
            {"system": "S", "conversations": [{"from": "human", "value": "x"}]},
            Prompt("line-1", "uncategorised", "x", "S"),
        ),
        ({"body": {"input": "x", "instructions": "S"}}, Prompt("line-1", "uncategorised", "x", "S")),
        ({"system_prompt": "S", "question": "x"}, Prompt("line-1", "uncategorised", "x", "S")),
        (
            {"prompt": "x", "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "x"}]},
            Prompt("line-1", "uncategorised", "x", "S"),
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_spellings_that_people_use(tmp_path, row, expected):
    assert load_prompts(put(tmp_path / "p", json_lines([row])))[0] == [expected]


def table_bytes(table):
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue()


MESSAGES = pyarrow.list_(pyarrow.map_(pyarrow.string(), pyarrow.string()))


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"sep=;\nprompt;id\na, b;1\n", [("1", "a, b")]),
        (b"prompt|id\na|1\n", [("1", "a")]),
        (b"prompt\nHow, then?\n", [("row-1", "How, then?")]),
        (b'\xef\xbb\xbf{"prompt":"a"}\n\xef\xbb\xbf{"prompt":"b"}\n', [("line-1", "a"), ("line-2", "b")]),
        (b'{"prompt":"a"}\r{"prompt":"b"}\r', [("line-1", "a"), ("line-2", "b")]),
        (b'{"features":[{"name":"prompt"}],"rows":[{"row_idx":0,"row":{"prompt":"a"}}]}', [("row-1", "a")]),
        (b'id,messages\n1,"[{""role"":""user"",""content"":""hi""}]"\n', [("1", "hi")]),
        (b'{\n"id":"x",\n"prompt":"a"\n}', [("x", "a")]),
        (
            b'{"prompt":"a"}\r\n{"prompt":"b"}\n{"prompt":"c"}\r{"prompt":"d"}',
            [(f"line-{n + 1}", c) for n, c in enumerate("abcd")],
        ),
        (b"id,prompt,,\n1,a,,\n", [("1", "a")]),
        (table_bytes(pyarrow.table({"prompt": [b"a"], "id": [b"1"]})), [("1", "a")]),
        (json_lines([{"messages": json.dumps([{"role": "user", "content": "a"}])}]), [("line-1", "a")]),
        (b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstandard.compress(b'{"prompt":"a"}'), [("line-1", "a")]),
        (lzma.compress(b'{"prompt":"a"}', format=lzma.FORMAT_ALONE), [("line-1", "a")]),
        (
            table_bytes(pyarrow.table({"prompt": pyarrow.array(["a"]).dictionary_encode(), "x": [[["y"]]]})),
            [("row-1", "a")],
        ),
        (table_bytes(pyarrow.table({"prompt": pyarrow.array(["a"], pyarrow.large_string())})), [("row-1", "a")]),
        (table_bytes(pyarrow.table({"prompt": ["a"], "id": [datetime(2024, 1, 2)]})), [("2024-01-02 00:00:00", "a")]),
        (table_bytes(pyarrow.table({"prompt": ["a"], "id": [Decimal("1.50")]})), [("1.50", "a")]),
        (json_lines([{"turns": [{"role": "user", "content": "a"}]}]), [("line-1", "a")]),
        *(
            (pack(b'{"prompt":"a"}\n') + between + pack(b'{"prompt":"b"}') + after, [("line-1", "a"), ("line-2", "b")])
            for pack, between, after in [
                (gzip.compress, b"", bytes(512)),
                (zstandard.compress, b"\x5a\x2a\x4d\x18\x01\0\0\0x", b""),
                (bz2.compress, b"", bytes(3)),
                (lzma.compress, bytes(4), bytes(8)),
            ]
        ),
        (b"\x5f\x2a\x4d\x18\0\0\0\0" + zstandard.compress(b'{"prompt":"a"}'), [("line-1", "a")]),
        *(
            (gzip.compress('{"prompt":"caf\u00e9"}\n'.encode(name)), [("line-1", "caf\u00e9")])
            for name in ("utf-16-be", "utf-32-le", "utf-32-be", "utf-32", "utf-8-sig")
        ),
        (b'"prompt";"a,b,c"\n"x;y";1\n', [("row-1", "x;y")]),
        (b'"a\nb",prompt\n1,x\n', [("row-1", "x")]),
        (json_lines([{"prompt": [{"role": "user", "content": "a"}], "chosen": [{"content": "b"}]}]), [("line-1", "a")]),
        (table_bytes(pyarrow.table({"messages": [[{"role": "user", "content": b"a"}]]})), [("row-1", "a")]),
        (
            table_bytes(pyarrow.table({"messages": pyarrow.array([[[("role", "user"), ("content", "a")]]], MESSAGES)})),
            [("row-1", "a")],
        ),
    ],
)
def test_other_files_that_people_have(tmp_path, content, prompts):
    assert [(p.id, p.prompt) for p in load_prompts(put(tmp_path / "p", content))[0]] == prompts


# ---- what is named


TWICE = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"])
FAR = pyarrow.table({"prompt": ["a"], "at": pyarrow.array([1 << 60], pyarrow.timestamp("ms"))})
NAMED = [
    ("empty file", b"", "empty"),
    ("blank lines", b"\n \n", "empty"),
    (
        "LFS pointer",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 1\n",
        "Git LFS pointer.*git lfs pull",
    ),
    ("annex pointer", b"/annex/objects/SHA256E-s1--0", "git-annex pointer.*annex get"),
    ("HTML page", b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "an HTML page.*raw file"),
    ("HTML page 2", b'<html lang="en">', "an HTML page"),
    ("XML", b'<?xml version="1.0"?><Error/>', "an XML document"),
    ("plain text", b"Why is the sky blue?\nWrite a haiku.\n", "plain text, not a table.*prompt"),
    ("Hub's answer", b"Entry not found", "plain text.*Entry not found"),
    ("Latin-1", '{"prompt":"café"}'.encode("latin-1"), "not UTF-8 .byte 15 of the line is 0xe9, 'é' in Latin-1.*iconv"),
    ("Latin-1 CSV", "prompt\ncafé\n".encode("latin-1"), "not UTF-8 .byte 11 of the file.*iconv"),
    ("odd UTF-16", b"\xff\xfe" + '{"prompt": "x"}'.encode("utf-16-le") + b"\x00", "UTF-16.*cut off"),
    ("truncated gzip", gzip.compress(json_lines(ROWS))[:-20], "gzip file that is cut off"),
    ("damaged gzip", gzip.compress(json_lines(ROWS))[:-8] + b"\x00" * 8, "damaged gzip file"),
    (
        "truncated Zstandard",
        zstandard.compress(json_lines(ROWS))[:-9],
        "Zstandard file that is (cut off|damaged)|damaged Zsta",
    ),
    ("truncated Parquet", parquet(ROWS)[:-40], "Parquet file that is cut off"),
    ("rubbish after bzip2", bz2.compress(json_lines(ROWS)) + b"rubbish", "damaged bzip2 file"),
    ("rubbish after xz", lzma.compress(json_lines(ROWS)) + b"rubbish", "damaged xz file"),
    ("truncated bzip2", bz2.compress(json_lines(ROWS))[:-4], "bzip2 file that is cut off"),
    ("truncated xz", lzma.compress(json_lines(ROWS))[:-9], "xz file that is cut off"),
    ("damaged Parquet", b"PAR1" + b"\x15\x04" * 40 + b"PAR1", "Parquet file that is damaged"),
    ("truncated Arrow", FORMATS["Arrow"](ROWS)[:200], "Arrow file that is damaged or cut off"),
    ("ZIP", b"PK\x03\x04" + b"\x00" * 40, "ZIP archive.*unpack"),
    ("tar", b"a" + b"\x00" * 256 + b"ustar\x0000" + b"\x00" * 200, "tar archive.*unpack"),
    ("PDF", b"%PDF-1.7\n1 0 obj", "a PDF document"),
    ("pickle", b"\x80\x04\x95\x10\x00\x00\x00", "pickle"),
    ("weights", b"GGUF\x03\x00\x00\x00", "weights of a model"),
    ("binary", bytes(range(1, 32)) * 9, "binary file"),
    ("truncated array", b'[\n {"prompt": "a"},\n {"prompt": "b"}', "line 3, column 17: the JSON array is cut off"),
    ("array cut in a string", b'[\n {"prompt": "a"},\n {"prom', "line 3, column \\d+: the JSON array is cut off"),
    ("no brackets", b'{"prompt": "a"},\n{"prompt": "b"}\n', ":1: the object ends with a comma .column 16.*brackets"),
    ("comma at the end", b'[\n{"prompt": "a"},\n]\n', "line 3, column 1: a comma before the end"),
    ("comment in array", b'[\n// mine\n{"prompt": "a"}]', "line 2, column 1: .*a comment"),
    ("Python list", b"[{'prompt': 'a'}]", "line 1, column 3: not valid JSON.*single quotes"),
    ("Python dict", b"{'prompt': 'a'}", "Python dictionary"),
    ("object cut off", b'{\n "prompt": "a",\n "id": "b', "line 3, column 8: not valid JSON.*cut off"),
    ("empty array", b"[]", "empty JSON array"),
    ("comment line", b'// mine\n{"prompt": 3}\n', ":1: a comment, which JSON does not have|:1: a comment"),
    ("raw NUL", b'{"prompt":"a\x00b"}', "NUL character at column 13"),
    ("key twice", b'{"prompt":"a","prompt":"b"}', "'prompt' stands twice"),
    ("long number", b'{"prompt":"x","id":' + b"9" * 5000 + b"}", "a number of 5000 digits; write it in quotes"),
    ("other columns", b"name,text\nx,Why?\ny,How?\n", "CSV table with the columns 'name', 'text'.*columns.*prompt"),
    ("column twice", b"prompt,prompt\na,b\n", "'prompt' stands twice"),
    ("open quote", b'prompt,id\n"never closed,1\nb,2\n', "line 2: not CSV"),
    ("short row", b"prompt,id\na,1\nb\n", ":3: 1 cell, the header has 2"),
    ("other keys", b'{"text": "Why is the sky blue?"}', "none of the keys prompt.*there are 'text'.*prompt: text"),
    ("an error", b'{"error": "Repository not found"}', "error message of a server.*Repository not found"),
    ("one column", b"text\nWhy?\nHow?\n", "the one column 'text'.*prompt=text"),
    ("texts", b'["a", "b"]', "not a JSON object but text; write"),
    ("Shift-JIS", '{"prompt":"こんにちは"}'.encode("shift-jis"), r"not UTF-8 \(byte 12 .*from its encoding"),
    ("cut in a character", '{"prompt":"café'.encode()[:-1], "cut off .truncated. within a character"),
    ("cut line", b'{"prompt":"a', ":1: not valid JSON: Unterminated string at column 11; the line is cut off"),
    ("LZ4", b"\x04\x22\x4d\x18\x64\x40", "an LZ4 file; unpack it"),
    ("tar in gzip", gzip.compress(b"a" + bytes(256) + b"ustar\x0000" + bytes(300)), "tar archive.*unpack"),
    ("picture part", b'{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}', "part of type 'image_url'"),
    ("a number", b'{"prompt": 3}', "the prompt is not text but a number; write it in quotes"),
    ("an object", b'{"prompt": {"a": 1}}', "the prompt is not text but an object"),
    ("typographic quotes", "{“prompt”: “a”}".encode(), "typographic quotes: JSON has straight ones"),
    ("a tab in a text", b'{"prompt":"a\tb"}', "Invalid control character at column 13; write a tab as"),
    ("messages that are an object", b'{"messages":{"role":"user"}}', "'messages' is not a list of messages but an obj"),
    ("an empty object", b"{}\n{}\n", "an empty object"),
    ("splits", b'{"train":[{"prompt":"a"}],"test":[{"prompt":"b"}]}', "several splits .'train', 'test'"),
    ("a date beyond Python's", table_bytes(FAR), "the column 'at' .timestamp.ms.. holds what Python has no value for"),
    ("compress", b"\x1f\x9d\x90abc", "a .Z file"),
    (
        "comment in an object",
        b'{\n  // mine\n  "prompt": "a"}',
        "line 2, column 3.*a comment, which JSON does not have",
    ),
    (
        "another sign",
        b'{"prompt": "a"}\x0c\n',
        "column 16: not valid JSON: E[^.]*$",
    ),
    ("comma in an object", b'{"prompt": "a",}', "comma before the end of the object"),
    ("comma in an object of an array", b'[{"prompt": "a",}]', "comma before the end of the object"),
    ("JSON5", b'{prompt: "a"}', "a key without quotes.*JSON5"),
    ("Python words", b'{"prompt": "a", "id": None}', "a Python word: JSON has true"),
    ("record separators", b'\x1e{"prompt":"a"}\n\x1e{"prompt":"b"}\n', "RFC 7464"),
    ("Rich Text", b"{\\rtf1\\ansi hello}", "Rich Text Format"),
    ("TOML", b'[[prompts]]\nprompt = "a"\n', "line 1: a TOML or INI file"),
    ("YAML", b"- prompt: a\n- prompt: b\n", "line 1: a YAML file"),
    ("Markdown", b"| id | prompt |\n|----|:-----|\n| 1 | a |\n", "line 1: a Markdown table"),
    ("columns", b'{"id": ["1", "2"], "prompt": ["a", "b"]}', "object of columns.*records"),
    ("columns of pandas", b'{"id": {"0": 1}, "prompt": {"0": "a"}}', "object of columns.*records"),
    ("compressed too often", gzip.compress(gzip.compress(gzip.compress(gzip.compress(b"{}")))), "more than 3 times"),
    ("backslashes", b'id,prompt\n1,"say \\"hi\\", ok"\n', "line 2: not CSV.*not doubled"),
    ("key not in UTF-8", b'{"rows": [{"prompt": "a", "cat\x80": 1}]}', "not UTF-8 .byte [0-9]+ of the file"),
    ("header alone", b"id,prompt\n", "CSV without a row"),
    ("no rows", table_bytes(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())})), "Parquet without a row"),
    ("no text", table_bytes(pyarrow.table({"prompt": [b"\xff\xfe"]})), "bytes that are not UTF-8"),
    ("column of Parquet twice", table_bytes(TWICE), "the column 'prompt' stands twice"),
    ("no columns", table_bytes(pyarrow.table({})), "Parquet without a row"),
]


@pytest.mark.parametrize("on_bad_line", ["stop", "skip"])
@pytest.mark.parametrize(("content", "message"), [case[1:] for case in NAMED], ids=[case[0] for case in NAMED])
def test_what_is_no_prompt_file_is_named_as_what_it_is(tmp_path, content, message, on_bad_line):
    path = put(tmp_path / "prompts.jsonl", content)
    if on_bad_line == "skip" and message.startswith(":"):
        message = message.lstrip(":0123456789").strip()
    prompts, skipped, error = outcome(path, on_bad_line)
    if error:
        assert str(path) in error
        assert re.search(message, error, re.S), error
    else:  # a line that is left out is listed
        assert on_bad_line == "skip"
        assert prompts
        assert skipped


# What a message about a file advises, and the file when that was done; flags in the message are given as they stand.
ADVICE = [
    (b'{"text": "Why?"}\n', r"--columns prompt=text", None),
    (b"text\nWhy?\nHow?\n", r"--columns prompt=text", None),
    (b"name,text\nx,Why?\ny,How?\n", r"--columns prompt=text", None),
    (b'{"prompt": "a"}\n{"prompt": 3}\n', r"--on-bad-line skip", None),
    (b'{"prompt": 3}\n', "write it in quotes", b'{"prompt": "3"}\n'),
    ('{"prompt": "café"}\n'.encode("cp1252"), "iconv -f WINDOWS-1252 -t UTF-8", '{"prompt": "café"}\n'.encode()),
    (b"{'prompt': 'a'}\n", "write it with json.dumps", json.dumps({"prompt": "a"}).encode()),
    (b'{"prompt": "a"},\n{"prompt": "b"}\n', "put \\[ before the first", b'[{"prompt": "a"},\n{"prompt": "b"}\n]'),
    (b'{"prompt": "a",}\n', "remove it", b'{"prompt": "a"}\n'),
    (b'{prompt: "a"}\n', "write it in double quotes", b'{"prompt": "a"}\n'),
    (b'\x1e{"prompt": "a"}\n', r"tr -d '\\036'", b'{"prompt": "a"}\n'),
    (b"prompt,prompt\na,b\n", "rename one of them", b"prompt,other\na,b\n"),
    (b'id,prompt\n1,"a \\"b\\", c"\n', "not doubled", b'id,prompt\n1,"a ""b"", c"\n'),
    (b"prompt,id\na, b,1\n", "put texts with the separator in quotes", b'prompt,id\n"a, b",1\n'),
    (b'{"prompt": ["a"], "id": ["1"]}', "write rows", b'[{"prompt": "a", "id": "1"}]'),
    (b'{"id": "x", "prompt": "a"}\n{"id": "x", "prompt": "b"}\n', "give each its own id", json_lines(ROWS)),
    (gzip.compress(json_lines(ROWS))[:-20], "fetch it again", gzip.compress(json_lines(ROWS))),
]


@pytest.mark.parametrize(("content", "advice", "mended"), ADVICE, ids=[case[1] for case in ADVICE])
def test_advice_that_is_followed_helps(tmp_path, capsys, content, advice, mended):
    source = put(tmp_path / "p", content)
    command = ["prepare-dataset", "--source", source, "--output", tmp_path / "o", "--manifest", tmp_path / "m"]
    with pytest.raises(SystemExit):
        main(list(map(str, command)))
    found = re.search(advice, capsys.readouterr().err)
    assert found
    if mended is not None:
        put(source, mended)
    main([*map(str, command), *(found[0].split() if mended is None else [])])
    assert load_prompts(tmp_path / "o")[0]


def test_folders_and_missing_files(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="a folder, not a file of prompts; it is empty"):
        load_prompts(tmp_path / "data")
    put(tmp_path / "data" / "train.jsonl", b"")
    with pytest.raises(UserError, match=r"a folder.*holds train\.jsonl.*Name the file"):
        load_prompts(tmp_path / "data")
    with pytest.raises(UserError, match=r"No such file.*dataset\.path"):
        load_prompts(tmp_path / "none")


def test_what_was_not_taken_is_counted(tmp_path):
    rows = [
        {
            "messages": [
                {"role": "assistant", "content": "Hello"},
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "One"},
                {"role": "assistant", "content": "1"},
                {"role": "tool", "content": "{}"},
                {"role": "user", "content": "Two"},
            ],
            "model": "m",
        },
        {"prompt": "the preamble", "conversations": [{"from": "human", "value": "the question"}]},
    ]
    source = put(tmp_path / "p.jsonl", json_lines(rows) + b'{"prompt": "x", "score": NaN}\n{"prompt": 1}\n')
    outputs = {"output": tmp_path / "o.jsonl", "manifest": tmp_path / "m.json"}
    manifest = prepare_dataset(source, **outputs, limit=None, on_bad_line="skip")
    assert manifest["later_turns_not_used"] == manifest["prompts_with_later_turns"] == 1
    assert manifest["other_messages_not_used"] == 2
    assert manifest["system_messages"] == 1
    assert manifest["generated_ids"] == 3
    assert manifest["columns_not_used"] == ["model", "conversations", "score"]
    assert manifest["skipped"] == [{"line": 4, "reason": "the prompt is not text but a number; write it in quotes"}]
    assert [note["line"] for note in manifest["notes"]] == [2, 3]
    assert load_prompts(outputs["output"])[0][0].system == "Be brief."


# ---- properties


@given(format_=st.sampled_from(sorted(FORMATS)), share=st.floats(0, 1), on_bad_line=st.sampled_from(["stop", "skip"]))
@WITHIN
def test_a_file_that_is_cut_off_gives_its_first_prompts_or_a_message(tmp_path, format_, share, on_bad_line):
    whole = FORMATS[format_](ROWS)
    path = put(tmp_path / "p", whole[: math.floor(share * len(whole))])
    prompts, _, error = outcome(path, on_bad_line)
    assert str(path) in error or [p.id for p in prompts] == [row["id"] for row in ROWS[: len(prompts)]]
    assert bool(prompts) != bool(error)


@given(
    format_=st.sampled_from(sorted(FORMATS)),
    changes=st.lists(st.tuples(st.floats(0, 0.999), st.binary(max_size=3)), min_size=1, max_size=4),
)
@WITHIN
def test_a_damaged_file_is_never_a_traceback(tmp_path, format_, changes, capsys):
    content = FORMATS[format_](ROWS)
    for share, put_in in changes:
        place = math.floor(share * len(content))
        content = content[:place] + put_in + content[place + 1 :]
    _refused_or_read(put(tmp_path / "p", content), tmp_path, capsys)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "from", "content", "value", "text", "type"]), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = [
    "prompt",
    "conversations",
    "messages",
    "turns",
    "id",
    "task_id",
    "category",
    "system",
    "body",
    "items",
    "instruction",
]


@given(rows=st.lists(st.dictionaries(st.sampled_from([*KEYS, "input", "token_ids", "tokens_of"]), JSON), max_size=4))
@WITHIN
def test_rows_of_any_content_are_never_a_traceback(tmp_path, rows, capsys):
    _refused_or_read(put(tmp_path / "p", "\n".join(json.dumps(row) for row in rows).encode()), tmp_path, capsys)


@given(content=st.binary(max_size=60) | st.text(string.printable, max_size=60).map(str.encode))
@WITHIN
def test_any_bytes_are_never_a_traceback(tmp_path, content, capsys):
    _refused_or_read(put(tmp_path / "p", content), tmp_path, capsys)


def _refused_or_read(path, folder, capsys):
    """The command ends with 0, or with 2 and one message that names the file."""
    outputs = ["--output", str(folder / "o.jsonl"), "--manifest", str(folder / "m.json"), "--on-bad-line", "skip"]
    code = 0
    try:
        main(["prepare-dataset", "--source", str(path), *outputs])
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert (code, error) == (0, "") or (code == 2 and error.startswith(f"specsplit prepare-dataset: error: {path}"))
    assert "Traceback" not in error
    assert code or load_prompts(folder / "o.jsonl")[0]


@given(prompts=st.lists(st.builds(Prompt, TEXT, TEXT, TEXT, st.none() | TEXT), min_size=1, max_size=4))
@WITHIN
def test_prompts_are_read_back_as_they_were_written(tmp_path, prompts):
    every = [
        replace(
            prompt, id=f"{number}{prompt.id}", prompt=f"x{prompt.prompt}", system=prompt.system and f"s{prompt.system}"
        )
        for number, prompt in enumerate(prompts)
    ]
    write_prompts(every, tmp_path / "p.jsonl")
    assert load_prompts(tmp_path / "p.jsonl") == (every, [])


TABLES = {"requests": RequestRecord, "rounds": RoundRecord, "peers": PeerRecord, "capacity": CapacityRecord}
VALUES = {
    "int": 3,
    "float": 1.5,
    "bool": True,
    "int | None": None,
    "float | None": 2.5,
    "bool | None": None,
    "int | str": 4,
}


@pytest.mark.parametrize("record", TABLES.values(), ids=TABLES)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=9) | st.sampled_from(["\r", "a\r\nb", "\x00", "NA"])
)
@WITHIN
def test_every_table_of_rows_is_read_back_with_any_text(tmp_path, record, text):
    row = record(**{f.name: VALUES.get(str(f.type), text) for f in fields(record)})
    with writing_rows(tmp_path / "rows.csv", record) as write:
        write(row)
        write(row)
    table = read_records(tmp_path / "rows.csv", record, "a test")
    assert len(table) == 2
    for field in fields(record):
        if str(field.type) == "str":
            assert list(table[field.name]) == [text, text], field.name
    write_csv(table.reset_index(drop=True), tmp_path / "again.csv")
    with (tmp_path / "again.csv").open(newline="", encoding="utf-8") as file:
        assert len(list(csv_reader(file))) == 3
    again = read_records(tmp_path / "again.csv", record, "a test")
    for field in fields(record):
        if str(field.type) == "str":
            assert list(again[field.name]) == [text, text], field.name


def test_a_cell_of_any_length_is_read_back(tmp_path):
    row = RequestRecord(**{f.name: VALUES.get(str(f.type), "i" * 200_000) for f in fields(RequestRecord)})
    with writing_rows(tmp_path / "rows.csv", RequestRecord) as write:
        write(row)
    assert read_records(tmp_path / "rows.csv", RequestRecord, "a test")["request_id"][0] == "i" * 200_000


# ---- what is never overwritten


@pytest.mark.parametrize("link", ["same", "relative", "hard"])
@pytest.mark.parametrize("output", ["--output", "--manifest"])
def test_a_source_is_never_overwritten(tmp_path, monkeypatch, capsys, output, link):
    source = put(tmp_path / "p.jsonl", json_lines(ROWS))
    before = source.read_bytes()
    monkeypatch.chdir(tmp_path)
    other = {"same": str(source), "relative": "x/../p.jsonl", "hard": str(tmp_path / "link")}[link]
    (tmp_path / "x").mkdir()
    (tmp_path / "link").hardlink_to(source)
    flags = {"--output": "o.jsonl", "--manifest": "m.json", output: other}
    with pytest.raises(SystemExit):
        main(["prepare-dataset", "--source", str(source), *[word for pair in flags.items() for word in pair]])
    assert f"{output} {other} is the source itself" in capsys.readouterr().err
    assert source.read_bytes() == before


P = "p.jsonl"
OVERWRITING = [
    ("prepare-dataset --source p.jsonl --output o --manifest o", "--manifest and --output are one file"),
    ("context-curve --prompts p.jsonl --output p.jsonl", "--output p.jsonl is the source itself"),
    ("context-curve --prompts p.png --output o.csv --figure p.png", "--figure p.png is the source itself"),
    ("report --results-dir . --output requests.csv", "--output requests.csv: a table of --results-dir"),
    ("pick-layers --model . --prompts p.jsonl --output p.jsonl", "--output p.jsonl is the source itself"),
    (
        "distill measure --target . --draft . --prompts p.jsonl --output o --rounds p.jsonl --report r",
        "--rounds p.jsonl is",
    ),
    ("distill train --target . --data p.jsonl --name x --output f --losses l --report p.jsonl", "--report p.jsonl is"),
    (
        "distill card --draft . --training t --losses l --acceptance a --measured p.jsonl --figure p.jsonl",
        "--figure p.jsonl",
    ),
    ("bench --prompts requests.csv --results-dir .", "--prompts requests.csv: a table of --results-dir"),
    ("capacity --prompts capacity_requests.csv --results-dir .", "a table of --results-dir"),
]


@pytest.mark.parametrize(("command", "message"), OVERWRITING, ids=lambda value: value.split(" --")[0])
def test_no_command_writes_over_what_it_reads(tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / P, json_lines(ROWS))
    with pytest.raises(SystemExit) as end:
        main(command.split())
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / P).read_bytes() == json_lines(ROWS)


def test_two_outputs_are_two_files(tmp_path):
    with pytest.raises(UserError, match="--manifest and --output are one file"):
        refuse_overwriting({"--output": tmp_path / "o", "--manifest": tmp_path / "." / "o"}, {})
