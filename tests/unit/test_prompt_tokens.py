"""Token ids of prompts are made once: whatever a chat template prints, every run gets the same."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from specsplit.cli.main import main
from specsplit.errors import PromptError, UserError
from specsplit.experiment.dataset import Prompt, load_prompts, prepare_dataset
from specsplit.experiment.prompt_tokens import prompt_tokens, tokenize_prompts
from specsplit.experiment.records import encode_prompts
from specsplit.models.tokenizer import TextCodec

from tiny_models import make_tokenizer

MESSAGES = "{% for m in messages %}<s>{{ m.role }}|{{ m['content'] }}{% endfor %}:"
USER_ONLY = "{% for m in messages if m.role == 'user' %}<s>{{ m['content'] }}{% endfor %}:"
REFUSES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + MESSAGES
)
DATE = "{{ strftime_now('%d %b %Y %H:%M') }}" + MESSAGES
LLAMA = (
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}{{ date_string }}"
) + MESSAGES
RANDOM = "{{ range(99999) | random }}" + MESSAGES
PROMPTS = [Prompt("a", "x", "Hi"), Prompt("b", "x", "Bye", "Be kind")]


def codec(template: str | None) -> TextCodec:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return TextCodec(tokenizer)


def text(prompt: Prompt, own: TextCodec) -> str:
    assert prompt.token_ids is not None
    return str(own.tokenizer.decode(list(prompt.token_ids)))


@pytest.mark.parametrize("template", [DATE, LLAMA])
def test_a_template_that_prints_the_date_is_told_one(template):
    own = codec(template)
    prompts, facts = tokenize_prompts(PROMPTS, own, chat=True, date=datetime(2024, 7, 26, 14, 5))
    assert facts["date"] == "2024-07-26T14:05:00"
    assert text(prompts[0], own).startswith("26 Jul 2024")
    assert own.tokenizer.decode(own.encode("Hi")).startswith(f"{datetime.now():%d %b %Y}")  # only then
    assert encode_prompts(prompts, own, chat=True, limit=99)[0].token_ids == list(prompts[0].token_ids or ())


def test_without_a_date_it_is_that_of_the_preparation():
    before = datetime.now().replace(microsecond=0)
    _, facts = tokenize_prompts(PROMPTS, codec(DATE), chat=True, date=None)
    assert before <= datetime.fromisoformat(facts["date"]) <= datetime.now()
    assert not facts["template_varies"]
    # Two preparations without a date in the template are the same.
    assert tokenize_prompts(PROMPTS, codec(MESSAGES), chat=True, date=None)[1]["date"] is None


def test_what_is_random_is_drawn_once():
    own = codec(RANDOM)
    prompts, facts = tokenize_prompts(PROMPTS, own, chat=True, date=None)
    assert facts["template_varies"]
    assert prompt_tokens(prompts[0], own, chat=True) == prompt_tokens(prompts[0], own, chat=True)
    assert prompt_tokens(PROMPTS[0], own, chat=True) != prompt_tokens(PROMPTS[0], own, chat=True)


@pytest.mark.parametrize(
    ("template", "chat", "left_out"),
    [
        (MESSAGES, True, []),
        (USER_ONLY, True, ["b"]),
        (REFUSES, True, ["b"]),
        (MESSAGES, False, ["b"]),
        (None, True, ["b"]),
    ],
    ids=["takes it", "passes over it", "refuses it", "not wanted", "no template"],
)
def test_a_system_message_is_used_or_said_to_be_left_out(template, chat, left_out):
    own = codec(template)
    prompts, facts = tokenize_prompts(PROMPTS, own, chat=chat, date=None)
    assert facts["system_messages_left_out"] == left_out
    assert ("Be kind" in text(prompts[1], own)) == (not left_out)
    assert "Bye" in text(prompts[1], own)


def test_a_template_that_raises_is_told_with_the_prompt():
    with pytest.raises(PromptError, match=r"prompt 'a': the chat template .*no such thing"):
        tokenize_prompts(PROMPTS, codec("{{ raise_exception('no such thing') }}"), chat=True, date=None)
    with pytest.raises(PromptError, match=r"prompt 'a': the chat template .*division"):
        tokenize_prompts(PROMPTS, codec("{{ 1 // 0 }}"), chat=True, date=None)


def test_token_ids_of_another_tokenizer_template_or_way_are_made_anew():
    own, other = codec(MESSAGES), codec(USER_ONLY)
    (prompt, _), _ = tokenize_prompts(PROMPTS, own, chat=True, date=None)
    assert prompt_tokens(prompt, other, chat=True) == other.encode("Hi")
    assert prompt_tokens(prompt, own, chat=False) == own.encode("Hi", use_chat_template=False)


def test_prepared_prompts_are_written_and_read_with_their_token_ids(tmp_path: Path):
    source = tmp_path / "p.jsonl"
    source.write_text('{"prompt": "Hi", "id": "a", "category": "x"}\n{"prompt": "Bye", "id": "b"}\n')
    output, plain = tmp_path / "o.jsonl", tmp_path / "plain.jsonl"
    more = {"limit": None, "on_bad_line": "stop"}
    manifest = prepare_dataset(source, output, tmp_path / "m.json", codec=codec(DATE), **more)
    without = prepare_dataset(source, plain, tmp_path / "m2.json", **more)
    prompts = load_prompts(output)[0]
    assert [prompt.token_ids for prompt in prompts] == [
        tuple(prompt.token_ids or ())
        for prompt in tokenize_prompts(
            load_prompts(plain)[0], codec(DATE), chat=True, date=datetime.fromisoformat(manifest["tokens"]["date"])
        )[0]
    ]
    # The prompts are the same whatever the tokenizer; the file is not.
    assert manifest["prompts_sha256"] == without["prompts_sha256"]
    assert manifest["output_sha256"] != without["output_sha256"]


@pytest.mark.parametrize("tokens", ["x", [], [1.5], [-1], [True], None])
def test_token_ids_that_are_none_are_refused(tmp_path: Path, tokens: object):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "Hi", "token_ids": tokens, "tokens_of": "x"}) + "\n")
    with pytest.raises(UserError, match=r"p\.jsonl:1: 'token_ids' is not a list of token ids"):
        load_prompts(path)


def test_the_command_takes_a_folder_with_a_tokenizer_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = DATE
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = tmp_path / "p.jsonl"
    source.write_text('{"prompt": "Hi"}\n')
    flags = ["prepare-dataset", "--source", str(source), "--output", str(tmp_path / "o.jsonl")]
    flags += ["--manifest", str(tmp_path / "m.json"), "--tokenizer", str(tmp_path / "tokenizer")]
    main([*flags, "--date", "2025-12-31"])
    assert "the chat template prints the date: 2025-12-31T00:00:00" in capsys.readouterr().out
    ids = load_prompts(tmp_path / "o.jsonl")[0][0].token_ids
    assert str(tokenizer.decode(list(ids or ()))).startswith("31 Dec 2025")
    with pytest.raises(SystemExit):
        main([*flags, "--date", "2025-13-31"])
    assert "--date = '2025-13-31'" in capsys.readouterr().err
