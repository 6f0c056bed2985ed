"""Prompt files: formats, bad lines, slices, manifest."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from specsplit.errors import UserError
from specsplit.experiment.dataset import Prompt, load_prompts, prepare_dataset, select_prompts
from specsplit.io import sha256_file

SHIPPED = Path(__file__).parents[2] / "resources" / "prompts" / "specsplit-48.jsonl"


def write_lines(path: Path, *lines: object) -> Path:
    encoded = [line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"prompt": "Hi"}, Prompt("line-1", "uncategorised", "Hi")),
        ({"prompt": "Hi", "id": "a", "category": "chat"}, Prompt("a", "chat", "Hi")),
        ({"prompt": "Grüße, 世界", "id": 7}, Prompt("7", "uncategorised", "Grüße, 世界")),
        (
            {
                "id": "s",
                "conversations": [
                    {"from": "system", "value": "Be kind"},
                    {"from": "human", "value": "First"},
                    {"from": "gpt", "value": "Answer"},
                    {"from": "human", "value": "Second"},
                ],
            },
            Prompt("s", "uncategorised", "First", "Be kind"),
        ),
        (
            {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "Q"}]},
            Prompt("line-1", "uncategorised", "Q", "x"),
        ),
        (
            {"question_id": 81, "category": "writing", "turns": ["One", "Two"]},
            Prompt("81", "writing", "One"),
        ),
    ],
)
def test_every_format(tmp_path, line, expected):
    assert load_prompts(write_lines(tmp_path / "p.jsonl", line)) == ([expected], [])


BAD_LINES = [
    (b"{not json", "not valid JSON"),
    (b'{"prompt": "\xff"}', "not UTF-8"),
    (["a", "list"], "not a JSON object"),
    ({"text": "x"}, "none of the keys"),
    ({"prompt": "  "}, "empty"),
    ({"prompt": 5}, "not text"),
    ({"prompt": "x", "id": 1.5}, "id 1.5"),
    ({"prompt": "x", "id": True}, "id True"),
    ({"prompt": "x", "category": 3.5}, "category 3.5"),
    ({"prompt": "x", "category": ["a"]}, "category \\['a'\\] is not text"),
    ({"conversations": [{"from": "gpt", "value": "x"}]}, "no turn of a human"),
    ({"conversations": "x"}, "not a list of messages but text"),
    ({"conversations": [{"from": "human"}]}, "not text"),
    ({"turns": []}, "at least one turn"),
    ({"turns": [["nested"]]}, "not text"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "no turn of a human"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "not text"),
    ({"prompt": "x", "id": ["a"]}, "id \\['a'\\] is not text"),
    ({"prompt": "x", "category": ""}, "category ''"),
    (b'{"prompt": "\\ud83d"}', "prompt holds half of a surrogate pair"),
    (b'{"prompt": "x", "id": "\\ud83d"}', "id holds half of a surrogate pair"),
    (b'{"prompt": "x", "id": ' + b"1" * 5000 + b"}", "5000 digits"),
    (b'{"prompt": ' + b"[" * 200_000, "nested too deeply"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=lambda value: value if isinstance(value, str) else "line")
def test_bad_line_stops_with_number_and_reason_or_is_skipped(tmp_path, line, reason):
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "good", "id": "g"}, b"", line)
    with pytest.raises(UserError, match=rf"p\.jsonl:3: .*{reason}"):
        load_prompts(path)
    prompts, skipped = load_prompts(path, "skip")
    assert [p.id for p in prompts] == ["g"]
    assert [(s.line, bool(re.search(reason, s.reason))) for s in skipped] == [(3, True)]


def test_many_bad_lines_are_listed_once_each_up_to_ten(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", *[{"prompt": ""}] * 13)
    with pytest.raises(UserError) as caught:
        load_prompts(path)
    message = str(caught.value)
    assert "p.jsonl:10:" in message
    assert "p.jsonl:11:" not in message
    assert "and 3 more" in message


def test_duplicate_ids_are_an_error_even_when_skipping(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"})
    with pytest.raises(UserError, match=r"p\.jsonl:2: id 'x' stands in line 1"):
        load_prompts(path, "skip")


def test_missing_and_useless_files(tmp_path):
    with pytest.raises(UserError, match=r"dataset\.path"):
        load_prompts(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="no usable prompt"):
        load_prompts(write_lines(tmp_path / "p.jsonl", {"prompt": ""}), "skip")


def test_byte_order_mark_and_windows_line_ends_are_no_problem(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n')
    assert [(p.id, p.prompt) for p in load_prompts(path)[0]] == [("line-1", "a"), ("line-3", "b")]


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", b'{"prompt": "\\ud83d\\ude00"}')
    assert load_prompts(path)[0][0].prompt == "\U0001f600"


@pytest.mark.parametrize("overwritten", ["output", "manifest"])
def test_the_source_is_never_overwritten(tmp_path, overwritten):
    source = write_lines(tmp_path / "p.jsonl", {"prompt": "a", "extra": 1})
    before = source.read_bytes()
    paths = {"output": tmp_path / "o.jsonl", "manifest": tmp_path / "m.json", overwritten: source}
    with pytest.raises(UserError, match="is the source itself"):
        prepare_dataset(source, **paths, limit=None, on_bad_line="stop")
    assert source.read_bytes() == before


def test_a_failed_write_leaves_the_old_output_and_no_part(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "p.jsonl", {"prompt": "a"})
    folder = tmp_path / "out"
    folder.mkdir()
    output = folder / "prompts.jsonl"
    output.write_text("old")

    def disk_full(*args: object, **kwargs: object) -> str:
        raise OSError("No space left on device")

    monkeypatch.setattr("specsplit.experiment.dataset.json.dumps", disk_full)
    with pytest.raises(OSError, match="No space"):
        prepare_dataset(source, output, folder / "manifest.json", limit=None, on_bad_line="stop")
    assert [path.name for path in folder.iterdir()] == ["prompts.jsonl"]
    assert output.read_text() == "old"


def test_slice_is_stratified_and_keeps_file_order():
    prompts = [Prompt(f"{c}{i}", c, "x") for c, n in (("a", 5), ("b", 1), ("c", 3)) for i in range(n)]
    assert [p.id for p in select_prompts(prompts, 6)] == ["a0", "a1", "a2", "b0", "c0", "c1"]
    assert [p.id for p in select_prompts(prompts, 2)] == ["a0", "b0"]
    assert select_prompts(prompts, None) == select_prompts(prompts, 99) == prompts


def test_manifest_says_what_was_taken(tmp_path):
    source = write_lines(
        tmp_path / "p.jsonl",
        {"prompt": "a", "category": "x"},
        {"bad": 1},
        {"prompt": "b", "category": "y"},
        {"prompt": "c", "category": "x"},
    )
    output, manifest = tmp_path / "out" / "prompts.jsonl", tmp_path / "out" / "manifest.json"
    content = prepare_dataset(source, output, manifest, limit=2, on_bad_line="skip")
    assert json.loads(manifest.read_text()) == content
    assert content["source_sha256"] == sha256_file(source)
    assert content["output_sha256"] == sha256_file(output)
    assert (content["count"], content["available"], content["limit"]) == (2, 3, 2)
    assert content["categories"] == {"x": 1, "y": 1}
    assert [bad["line"] for bad in content["skipped"]] == [2]
    assert [p.id for p in load_prompts(output)[0]] == ["line-1", "line-3"]


def test_shipped_set():
    prompts, skipped = load_prompts(SHIPPED)
    assert not skipped
    assert len(prompts) == len({p.prompt for p in prompts}) == 48
    assert set(Counter(p.category for p in prompts).values()) == {6}
    assert len({p.category for p in prompts}) == 8
    assert Counter(p.category for p in select_prompts(prompts, 16)) == dict.fromkeys({p.category for p in prompts}, 2)
