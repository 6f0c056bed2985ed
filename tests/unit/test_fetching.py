"""Standard sets and datasets of the Hub: fetched, checked, cached; with made-up files of the same shape."""

import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from specsplit.cli.main import main
from specsplit.errors import UserError, counted
from specsplit.experiment import fetching
from specsplit.experiment.dataset import load_prompts, prepare_dataset
from specsplit.experiment.fetching import fetch_hub, fetch_standard
from specsplit.experiment.standard_sets import MT_BENCH, SPEED_BENCH_PLACEHOLDER, STANDARD_SETS
from specsplit.io import sha256_file
from specsplit.settings.configuration import load_pipeline_config
from specsplit.settings.measure import StandardName

from prompt_files import DOCS, json_lines

TURNS = [
    {"question_id": 81, "category": "writing", "turns": ["Compose a post.", "Rewrite it."]},
    {"question_id": 82, "category": "coding", "turns": ["Write a program.", "Now in C."]},
]
MBPP = {"code": "pass", "test_setup_code": "", "challenge_test_list": []}
# name -> (its file as the publishers have it, made up; the id, category and text of the prompts)
FILES: dict[str, tuple[bytes, list[tuple[str, str, str]]]] = {
    "spec-bench": (
        json_lines([*TURNS, {"question_id": 161, "category": "qa", "turns": ["Who was it?"]}]),
        [("81", "mt_bench", "Compose a post."), ("82", "mt_bench", "Write a program."), ("161", "qa", "Who was it?")],
    ),
    "mt-bench": (json_lines(TURNS), [("81", "writing", "Compose a post."), ("82", "coding", "Write a program.")]),
    "gsm8k": (
        json_lines([{"question": "How many?", "answer": "#### 7"}]),
        [("gsm8k-1", "math_reasoning", "How many?")],
    ),
    "humaneval": (
        gzip.compress(
            json_lines([{"task_id": "HumanEval/0", "prompt": "def f():\n", "test": "x", "entry_point": "f"}])
        ),
        [("HumanEval/0", "coding", "def f():\n")],
    ),
    "mbpp": (
        json_lines(
            [
                {"text": "An example.", "task_id": 2, "test_list": ["assert x"], **MBPP},
                {"text": "Add two numbers.", "task_id": 11, "test_list": ["assert f(1)", "assert f(2)"], **MBPP},
            ]
        ),
        [
            (
                "11",
                "coding",
                "You are an expert Python programmer, and here is your task: Add two numbers. Your code should pass "
                "these tests:\n\nassert f(1)\nassert f(2)\n",
            )
        ],
    ),
    "math-500": (
        json_lines(
            [
                {
                    "problem": "Solve.",
                    "solution": "1",
                    "answer": "1",
                    "subject": "Algebra",
                    "level": 2,
                    "unique_id": "t/1",
                }
            ]
        ),
        [("t/1", "Algebra", "Solve.")],
    ),
    "alpaca": (
        json.dumps([{"instruction": "Add.", "input": "1 and 2", "output": "3"}], indent=4).encode(),
        [("alpaca-1", "instruction", "Add.\n\n1 and 2")],
    ),
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **more: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def unpinned(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The set without the hash of the real file."""
    changed = {**STANDARD_SETS, name: replace(STANDARD_SETS[name], sha256=None)}
    monkeypatch.setattr(fetching, "STANDARD_SETS", changed)


def put(folder: Path, name: str) -> Path:
    file = folder / "downloads" / name / STANDARD_SETS[name].file
    file.parent.mkdir(parents=True)
    file.write_bytes(FILES[name][0])
    return file


def test_every_set_is_documented_has_a_test_and_a_name_in_the_settings():
    assert set(STANDARD_SETS) == set(StandardName.__args__) == {*FILES, "speed-bench"}
    table = DOCS.read_text(encoding="utf-8").partition("## Standard sets")[2]
    for known in STANDARD_SETS.values():
        (line,) = [line for line in table.splitlines() if line.startswith(f"| `{known.name}` |")]
        assert str(known.count) in line
        assert known.licence in line
        assert ("sha256" in line) == (known.sha256 is not None)
        assert known.revision in known.url or known.hub


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_shape_becomes_prompts(tmp_path, monkeypatch, name):
    unpinned(monkeypatch, name)
    file = put(tmp_path, name)
    facts = fetch_standard(name, tmp_path / "set.jsonl", tmp_path / "downloads")
    prompts = load_prompts(tmp_path / "set.jsonl")[0]
    assert [(p.id, p.category, p.prompt) for p in prompts] == FILES[name][1]
    assert facts["sha256"] == sha256_file(file)
    assert facts["licence"] == STANDARD_SETS[name].licence
    assert facts["note"] == f"{counted(len(prompts), 'prompt')}, {STANDARD_SETS[name].count} are known"
    assert json.loads((tmp_path / "set.json").read_text()) == facts
    outputs = (tmp_path / "o.jsonl", tmp_path / "m.json")
    manifest = prepare_dataset(tmp_path / "set.jsonl", *outputs, limit=None, on_bad_line="stop")
    assert manifest["fetched"] == facts
    (tmp_path / "set.jsonl").write_bytes((tmp_path / "set.jsonl").read_bytes() + b"\n")
    assert prepare_dataset(tmp_path / "set.jsonl", *outputs, limit=None, on_bad_line="stop")["fetched"] is None


def test_spec_bench_counts_the_categories_of_mt_bench_as_one_task(tmp_path, monkeypatch):
    unpinned(monkeypatch, "spec-bench")
    rows = [{"question_id": n, "category": category, "turns": ["x"]} for n, category in enumerate(MT_BENCH)]
    put(tmp_path, "spec-bench").write_bytes(json_lines([*rows, {"question_id": 99, "category": "rag", "turns": ["y"]}]))
    fetch_standard("spec-bench", tmp_path / "s.jsonl", tmp_path / "downloads")
    assert Counter(p.category for p in load_prompts(tmp_path / "s.jsonl")[0]) == {"mt_bench": 8, "rag": 1}


def test_without_a_network_the_message_says_where_to_put_the_file(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["fetch-dataset", "--name", "mt-bench", "--output", str(tmp_path / "mt.jsonl")])
    error = capsys.readouterr().err
    url = STANDARD_SETS["mt-bench"].url
    assert f"cannot be fetched from {url} (Network is unreachable)" in error
    assert f"curl -L -o question.jsonl {url}" in error
    assert f"bring that file to {tmp_path / 'downloads' / 'mt-bench' / 'question.jsonl'}" in error
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_file_that_is_another_one_is_refused(tmp_path):
    put(tmp_path, "spec-bench")  # not the real one
    with pytest.raises(UserError, match=r"not the file of spec-bench: its sha256 is .*wanted 4b6d33e7.*Delete it"):
        fetch_standard("spec-bench", tmp_path / "s.jsonl", tmp_path / "downloads")


def test_the_hash_of_the_first_download_is_recorded_and_checked_afterwards(tmp_path, monkeypatch):
    file = put(tmp_path, "math-500")
    for _ in range(2):
        fetch_standard("math-500", tmp_path / "s.jsonl", tmp_path / "downloads")
    assert file.with_name("test.jsonl.sha256").read_text() == f"{sha256_file(file)}  test.jsonl\n"
    file.write_bytes(file.read_bytes() * 2)
    with pytest.raises(UserError, match=r"not the file of math-500.*test\.jsonl\.sha256"):
        fetch_standard("math-500", tmp_path / "s.jsonl", tmp_path / "downloads")


def test_a_file_is_fetched_once(tmp_path, monkeypatch):
    fetched = []

    def reply(request, timeout):
        fetched.append(request.full_url)
        return gzip.open(tmp_path / "reply.gz")

    (tmp_path / "reply.gz").write_bytes(gzip.compress(FILES["math-500"][0]))
    monkeypatch.setattr("urllib.request.urlopen", reply)
    for _ in range(2):
        fetch_standard("math-500", tmp_path / "s.jsonl", tmp_path / "downloads")
    assert fetched == [STANDARD_SETS["math-500"].url]


def test_rows_that_cannot_be_read_are_told_with_their_line(tmp_path):
    odd = [{"text": None, "test_list": ["a"]}, {"text": " ", "test_list": ["a"]}, {"text": "x", "test_list": "abc"}]
    file = put(tmp_path, "mbpp")
    rows = json_lines([{**row, "task_id": 20} for row in odd])
    file.write_bytes(rows)
    with pytest.raises(
        UserError, match=r"none of 3 rows is a prompt \(the first: not of the shape of mbpp: text is not"
    ):
        fetch_standard("mbpp", tmp_path / "s.jsonl", tmp_path / "downloads")
    file.write_bytes(rows + FILES["mbpp"][0] + b'{"text": "cut of')
    recorded = file.with_name("mbpp.jsonl.sha256")
    recorded.write_text("")
    with pytest.raises(UserError, match="not the file of mbpp"):
        fetch_standard("mbpp", tmp_path / "s.jsonl", tmp_path / "downloads")
    recorded.unlink()
    facts = fetch_standard("mbpp", tmp_path / "s.jsonl", tmp_path / "downloads")
    assert [row["row"] for row in facts["left_out"]] == [1, 2, 3, 4, 6]
    assert "not valid JSON" in facts["left_out"][-1]["reason"]


def test_speed_bench_leaves_out_what_only_its_publishers_may_pass_on(tmp_path, monkeypatch):
    more = {"sub_category": "x", "source": "s", "src_id": "1", "difficulty": "easy", "multiturn": False}
    rows = [
        {"question_id": "q1", "category": "coding", "turns": ["Write it.", "Again."], **more},
        {"question_id": "q2", "category": "math", "turns": [f"{SPEED_BENCH_PLACEHOLDER} USING SPECDEC_BENCH"], **more},
    ]
    monkeypatch.setattr(fetching, "_load_hub", lambda *args: (rows, {"url": "", "revision": "abc123"}))
    facts = fetch_standard("speed-bench", tmp_path / "s.jsonl", tmp_path / "downloads")
    assert [(p.id, p.category, p.prompt) for p in load_prompts(tmp_path / "s.jsonl")[0]] == [
        ("q1", "coding", "Write it.")
    ]
    assert facts["revision"] == "abc123"
    assert [row["row"] for row in facts["left_out"]] == [2]


def test_datasets_of_the_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(fetching, "_commit", lambda repo, revision: "")
    for split in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.jsonl").write_bytes(json_lines([{"question": f"Of {split}?", "answer": "a"}]))
    repo = str(tmp_path / "data")  # `datasets` takes a folder of files as it takes an id
    assert fetch_hub(repo, None, "train", None, tmp_path / "a.jsonl")["count"] == 1
    assert load_prompts(tmp_path / "a.jsonl")[0][0].prompt == "Of train?"
    fetch_hub(repo, None, None, None, tmp_path / "b.jsonl")
    assert load_prompts(tmp_path / "b.jsonl")[0][0].prompt == "Of test?"
    with pytest.raises(UserError, match=r"nobody/none: cannot be loaded.*Without a\s+network.*save_to_disk"):
        fetch_hub("nobody/none", None, None, None, tmp_path / "c.jsonl")


def test_the_configuration_names_one_source_of_prompts():
    def path(dataset):
        return load_pipeline_config({"dataset": dataset})["dataset"]["path"]

    hub = {"id": "openai/gsm8k", "config": "main", "split": "test"}
    assert path({}) == "resources/prompts/specsplit-48.jsonl"
    assert path({"name": "spec-bench"}) == "resources/datasets/spec-bench.jsonl"
    assert path({"huggingface": hub}) == "resources/datasets/openai-gsm8k-main-test.jsonl"
    resolved = load_pipeline_config({"dataset": {"name": "gsm8k"}})
    assert load_pipeline_config(resolved) == resolved
    for wrong, message in [
        ({"name": "spec-bench", "path": "mine.jsonl"}, "dataset.path and dataset.name: two sources"),
        ({"name": "spec-bench", "huggingface": hub}, "dataset.name and dataset.huggingface: two sources"),
        ({"name": "specbench"}, 'dataset.name: "specbench"; wanted one of spec-bench, '),
        ({"huggingface": {"config": "main"}}, "dataset.huggingface.id: missing"),
        ({"huggingface": {"id": "a/b", "splitt": "x"}}, "did you mean dataset.huggingface.split"),
        ({"columns": {"promt": "question"}}, "dataset.columns.promt: unknown key; did you mean dataset.columns.prompt"),
        ({"columns": {"prompt": 3}}, "dataset.columns.prompt: 3; wanted a string"),
        ({"date": "2026-13-45"}, "dataset.date: "),
    ]:
        with pytest.raises(UserError) as caught:
            path(wrong)
        assert message in str(caught.value)
