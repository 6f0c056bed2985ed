"""Later turns of conversations: requests of their own, after the answers that the target wrote."""

import csv
import json
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specsplit.client.result import Round, SpeculativeResult
from specsplit.client.writer import TextWriter
from specsplit.errors import PromptError, UserError, WorkerError
from specsplit.experiment.dataset import Prompt, prepare_dataset, read_prompt_file, select_prompts, write_prompts
from specsplit.experiment.prompt_tokens import tokenize_prompts
from specsplit.experiment.records import encode_prompts
from specsplit.experiment.run import Run
from specsplit.experiment.runner import run_requests
from specsplit.models.tokenizer import TextCodec
from specsplit.rpc.connection import Connection
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import OrchestratorConfig

from prompt_files import json_lines
from tiny_models import make_tokenizer

TALKS = [
    {"question_id": 81, "category": "writing", "turns": ["One", "Two", "Three"]},
    {"id": "chat", "messages": [{"role": "system", "content": "Sys"}, {"role": "user", "content": "Hi"}]},
    {
        "id": "old",
        "conversations": [
            {"from": "human", "value": "A"},
            {"from": "gpt", "value": "recorded"},
            {"from": "human", "value": "B"},
        ],
    },
]
ORDER = ["81", "81-turn-2", "81-turn-3", "chat", "old", "old-turn-2"]
CODEC = TextCodec(make_tokenizer())
CODEC.tokenizer.chat_template = "{% for m in messages %}({{ m.role }} {{ m['content'] }}){% endfor %}:"


def source(folder: Path) -> Path:
    path = folder / "talks.jsonl"
    path.write_bytes(json_lines(TALKS))
    return path


def test_every_turn_is_a_prompt_and_a_conversation_is_taken_whole(tmp_path):
    first = read_prompt_file(source(tmp_path))
    every = read_prompt_file(source(tmp_path), turns="all")
    assert [prompt.id for prompt in first.prompts] == ["81", "chat", "old"]
    assert first.facts["later_turns_not_used"] == 3
    assert [prompt.id for prompt in every.prompts] == ORDER
    assert [(p.turn, p.after) for p in every.prompts[:3]] == [(1, None), (2, "81"), (3, "81-turn-2")]
    assert every.facts["later_turns_not_used"] == 0
    assert [prompt.id for prompt in select_prompts(every.prompts, 1)] == ORDER[:3]
    assert select_prompts(every.prompts, 3) == every.prompts
    write_prompts(every.prompts, tmp_path / "again.jsonl")
    assert read_prompt_file(tmp_path / "again.jsonl").prompts == every.prompts


def test_an_id_that_a_later_turn_gets_is_not_given_twice(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(json_lines([{"id": "a-turn-2", "prompt": "x"}, {"id": "a", "turns": ["y", "z"]}]))
    with pytest.raises(UserError, match=r":2: id 'a-turn-2' stands in line 1 already"):
        read_prompt_file(path, turns="all")


@pytest.mark.parametrize(
    ("change", "message"), [({"after": "none"}, "no id of an earlier"), ({"date": "x"}, "not a date")]
)
def test_a_prepared_turn_that_cannot_be(tmp_path, change, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(
        json_lines([{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y", "turn": 2, "after": "a", **change}])
    )
    with pytest.raises(UserError, match=rf"p\.jsonl:2: .*{message}"):
        read_prompt_file(path)


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """What the target was asked, as text. Its answers are answer1, answer2, ..."""
    seen: list[str] = []

    def write(self: TextWriter, prompt_ids: list[int], config: OrchestratorConfig, **options: Any) -> SpeculativeResult:
        seen.append(str(CODEC.tokenizer.decode(prompt_ids)))
        if FAILING in seen[-1]:
            raise WorkerError("it broke", code="INTERNAL", result=SpeculativeResult())
        one = Round(1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        return SpeculativeResult(CODEC.tokenizer(f"answer{len(seen)}")["input_ids"], "eos", [one], 1.0, 2.0)

    monkeypatch.setattr(TextWriter, "write", write)
    return seen


FAILING = "(user Two)"


def run(folder: Path, prompts: list[Prompt], limit: int = 999, **options: Any) -> list[dict[str, str]]:
    nobody: Any = SimpleNamespace(Describe=lambda *_, **__: pb.DescribeReply())
    described = pb.DescribeReply(role="target", max_context=limit, environment={"PYTHONHASHSEED": "0"})
    target = Connection("target", "127.0.0.1:1", nobody, nobody, described)
    requests = encode_prompts(prompts, CODEC, chat=True, limit=limit, later_turns=True)
    config = OrchestratorConfig(gamma=0)
    run_requests(Run(requests, {"target": target}, CODEC, config, **{"warmup": 0, **options}), folder)
    with (folder / "requests.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_turn_gets_the_answers_that_were_written_before_it(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(f"{__name__}.FAILING", "nothing")
    prompts = read_prompt_file(source(tmp_path), turns="all").prompts
    rows = run(tmp_path / "run", prompts, warmup=2)
    assert [(row["request_id"], row["turn"], row["status"]) for row in rows] == [
        (id_, turn, "ok") for id_, turn in zip(ORDER, "123112", strict=True)
    ]
    assert asked[:2] == ["(user One):", "(system Sys)(user Hi):"]  # the warm-up: first turns
    assert asked[2:] == [
        "(user One):",
        "(user One)(assistant answer3)(user Two):",
        "(user One)(assistant answer3)(user Two)(assistant answer4)(user Three):",
        "(system Sys)(user Hi):",
        "(user A):",
        "(user A)(assistant answer7)(user B):",  # its own answer, not the recorded one
    ]
    assert [int(row["prompt_length"]) for row in rows] == [
        len(CODEC.tokenizer(text)["input_ids"]) for text in asked[2:]
    ]


def test_a_turn_after_one_that_failed_says_so_and_is_tried_again(tmp_path, asked, monkeypatch):
    prompts = read_prompt_file(source(tmp_path), turns="all").prompts
    rows = run(tmp_path / "run", prompts)
    assert [row["status"] for row in rows] == ["ok", "failed", "failed", "ok", "ok", "ok"]
    assert rows[2]["error_message"] == "turn 2 of this conversation, 81-turn-2, has no answer"
    monkeypatch.setattr(f"{__name__}.FAILING", "nothing")
    asked.clear()
    assert {row["status"] for row in run(tmp_path / "run", prompts)} == {"ok"}
    assert asked[0] == "(user One)(assistant answer1)(user Two):"
    assert len(asked) == 2


def test_a_turn_without_room_is_a_row_that_says_so(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(f"{__name__}.FAILING", "nothing")
    rows = run(tmp_path / "run", read_prompt_file(source(tmp_path), turns="all").prompts, limit=25)
    assert [row["status"] for row in rows] == ["ok", "failed", "failed", "ok", "ok", "failed"]
    assert "tokens with the text so far do not fit into the target's context of 25" in rows[1]["error_message"]


def test_measurements_other_than_runs_take_first_turns():
    prompts = [Prompt("a", "x", "One"), Prompt("a-turn-2", "x", "Two", turn=2, after="a")]
    assert [request.id for request in encode_prompts(prompts, CODEC, chat=True, limit=99)] == ["a"]


def test_the_date_of_the_preparation_goes_with_later_turns(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(f"{__name__}.FAILING", "nothing")
    monkeypatch.setattr(CODEC.tokenizer, "chat_template", "{{ strftime_now('%Y') }}" + CODEC.tokenizer.chat_template)
    outputs = (tmp_path / "o.jsonl", tmp_path / "m.json")
    date = datetime(1999, 12, 31)
    prepare_dataset(
        source(tmp_path),
        *outputs,
        limit=1,
        on_bad_line="stop",
        turns="all",
        codec=CODEC,
        use_chat_template=True,
        date=date,
    )
    assert json.loads(outputs[0].read_text().splitlines()[1])["date"] == "1999-12-31T00:00:00"
    run(tmp_path / "run", read_prompt_file(outputs[0]).prompts)
    assert [text[:4] for text in asked] == ["1999"] * 3


def test_a_template_that_varies_has_no_later_turns(monkeypatch):
    monkeypatch.setattr(CODEC.tokenizer, "chat_template", "{{ range(9999) | random }}x")
    prompts = [Prompt("a", "x", "One"), Prompt("a-turn-2", "x", "Two", turn=2, after="a")]
    with pytest.raises(PromptError, match=r"'a-turn-2'.*something else each time.*dataset\.turns: first"):
        tokenize_prompts(prompts, CODEC, chat=True, date=None)
