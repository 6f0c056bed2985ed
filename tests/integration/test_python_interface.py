"""specsplit.load and specsplit.connect: prompts, options, figures, streams, mistakes; in this process and over gRPC."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import shutil
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

import specsplit
from specsplit.api import named_models
from specsplit.client import recovery
from specsplit.models.tokenizer import TextCodec
from specsplit.settings.configuration import load_pipeline_config

from grpc_fixtures import Reference, Worker, noisy_copy, serving
from waiting import wait_until

PROMPT = "Why?"
LENGTH = 24
WAYS = ("loaded", "connected")


@pytest.fixture(scope="module")
def folders(tiny_model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    target = tiny_model_folder("llama")
    return {"target": target, "draft": noisy_copy(target, tmp_path_factory.mktemp("draft"), noise=0.05)}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> Iterator[specsplit.Pair]:
    draft = specsplit.Model(folders["draft"], dtype="float32")
    with specsplit.load(folders["target"], draft, gamma=4, max_new_tokens=LENGTH, ignore_eos=True) as pair:
        yield pair


@pytest.fixture(scope="module")
def workers(folders: dict[str, Path]) -> Iterator[dict[str, Worker]]:
    with serving("draft", folders["draft"]) as draft, serving("target", folders["target"]) as target:
        yield {"draft": draft, "target": target}


@pytest.fixture(scope="module")
def connected(workers: dict[str, Worker], folders: dict[str, Path]) -> Iterator[specsplit.Pair]:
    addresses = {role: worker.address for role, worker in workers.items()}
    options: dict[str, Any] = {"gamma": 4, "max_new_tokens": LENGTH, "ignore_eos": True}
    with specsplit.connect(**addresses, tokenizer=folders["target"], **options) as pair:
        yield pair


@pytest.fixture(params=WAYS)
def pair(request: pytest.FixtureRequest) -> specsplit.Pair:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def codec(folders: dict[str, Path]) -> TextCodec:
    return TextCodec.load(folders["target"])


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path], codec: TextCodec) -> Callable[[str], list[int]]:
    reference = Reference(folders["target"])
    return lambda prompt: reference.text(codec.encode(prompt), LENGTH)


# ---- the text


def test_the_text_is_that_of_the_target_alone(pair: specsplit.Pair, codec: TextCodec, expected: Any) -> None:
    text = pair.generate(PROMPT)
    assert isinstance(text, str)
    assert text.token_ids == expected(PROMPT)
    assert text == codec.decode(text.token_ids)
    assert text.prompt_token_ids == codec.encode(PROMPT)
    for options in (
        {"gamma": 0}, {"gamma": "auto"}, {"mode": "overlap"}, {"mode": "lookahead", "fan_out": 3}, {"tree": "3x2"},
        {"tree": "dynamic-8x3", "mode": "lookahead"}, {"temperature": 1.0, "top_k": 1}, {"gamma": 9},
    ):  # fmt: skip
        assert pair.generate(PROMPT, **options) == text, options


def test_sampled_text_is_the_same_in_every_way(loaded: specsplit.Pair, connected: specsplit.Pair) -> None:
    texts = set()
    for seed in (1, 2):
        options: dict[str, Any] = {"temperature": 1.0, "seed": seed}
        alone = connected.generate(PROMPT, gamma=0, **options)
        assert loaded.generate(PROMPT, **options) == alone
        assert loaded.generate(PROMPT, **options, tree="2x2", mode="lookahead") == alone
        rejection = {**options, "sampling": "rejection"}
        assert loaded.generate(PROMPT, **rejection) == connected.generate(PROMPT, **rejection)
        texts.add(alone)
    assert len(texts) == 2


def test_every_kind_of_prompt(pair: specsplit.Pair, codec: TextCodec, expected: Any) -> None:
    text = pair.generate(PROMPT)
    token_ids = codec.encode(PROMPT)
    assert pair.generate([{"role": "user", "content": PROMPT}]) == text
    assert pair.generate(token_ids) == pair.generate(torch.tensor(token_ids)) == text
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert pair.generate(turns).prompt_token_ids != token_ids
    plain = pair.generate(PROMPT, use_chat_template=False)
    assert plain.prompt_token_ids == codec.encode(PROMPT, use_chat_template=False) != token_ids
    prompts = [f"{i}?" for i in range(12)]  # more than are written at once
    assert [t.token_ids for t in pair.generate(prompts)] == [expected(prompt) for prompt in prompts]
    assert pair.generate([token_ids, [5]])[0] == text
    assert pair.generate([[{"role": "user", "content": PROMPT}]]) == [text]


def test_figures(loaded: specsplit.Pair) -> None:
    text = loaded.generate(PROMPT, tree="2x2")
    assert text.finish_reason == "length"
    assert len(text.rounds) < LENGTH
    assert text.acceptance_rate is not None
    assert 0 < text.acceptance_rate < 1
    verified = [r.accepted for r in text.rounds if r.tree_nodes]
    assert text.acceptance_length == 1 + sum(verified) / len(verified) > 1
    assert text.tokens_per_second > 0
    assert text.ttft_ms is not None
    assert 0 < text.ttft_ms <= text.total_ms
    reached = [r for r in text.rounds if r.drafted > 0]
    assert text.acceptance_by_position[0] == sum(r.accepted > 0 for r in reached) / len(reached)
    assert f"[{text.summary()}]".startswith(f"[{LENGTH} tokens in {len(text.rounds)} rounds, ended by length, accepted")
    alone = loaded.generate(PROMPT, gamma=0)
    assert (alone.acceptance_rate, alone.acceptance_by_position, alone.acceptance_length) == (None, [], None)
    for same in (pickle.loads(pickle.dumps(text)), copy.copy(text)):
        assert (same, same.rounds, same.token_ids) == (text, text.rounds, text.token_ids)


def test_a_text_ends_where_it_is_told_to(loaded: specsplit.Pair) -> None:
    whole = loaded.generate(PROMPT)
    stop = whole.token_ids[5]
    text = loaded.generate(PROMPT, stop_token_ids=(stop,), ignore_eos=False)
    assert text.finish_reason == "eos"
    assert text.token_ids == whole.token_ids[: whole.token_ids.index(stop)]
    assert loaded.generate(PROMPT, max_new_tokens=3).token_ids == whole.token_ids[:3]
    assert loaded.generate(PROMPT, max_rounds=2).finish_reason == "max_rounds"


# ---- streams, asyncio, threads


def test_a_stream_gives_the_pieces_of_the_text(pair: specsplit.Pair) -> None:
    text = pair.generate(PROMPT)
    stream = pair.stream(PROMPT)
    pieces = list(stream)
    assert len(pieces) > 3
    assert "".join(pieces) == text == stream.text
    assert list(stream) == []


@pytest.mark.parametrize("leave", ["break", "with", "drop"])
def test_a_stream_that_is_left_stops(
    loaded: specsplit.Pair, workers: Any, connected: specsplit.Pair, leave: str
) -> None:
    stream = connected.stream(PROMPT, max_new_tokens=100)
    if leave == "with":
        with stream:
            next(stream)
        assert list(stream) == []
    else:
        next(stream)
        if leave == "break":
            stream.close()
        del stream
    assert wait_until(lambda: all(len(worker.servicer.sessions) == 0 for worker in workers.values()))


def test_a_running_event_loop_is_no_error(pair: specsplit.Pair) -> None:
    """As in a notebook, where every cell runs inside one."""
    text = pair.generate(PROMPT)

    async def cell() -> None:
        assert pair.generate(PROMPT) == text  # blocks, but works
        assert "".join(pair.stream(PROMPT)) == text
        assert "".join([piece async for piece in pair.stream(PROMPT)]) == text
        both = await asyncio.gather(pair.agenerate(PROMPT, gamma=2), pair.agenerate([PROMPT, "a"]))
        assert (both[0], both[1][0]) == (text, text)
        with pytest.raises(specsplit.OptionError):
            await pair.agenerate(PROMPT, gamma=-1)

    asyncio.run(cell())


def test_a_cancelled_text_stops(connected: specsplit.Pair, workers: dict[str, Worker]) -> None:
    async def cancel() -> None:
        writing = asyncio.create_task(connected.agenerate([PROMPT] * 3, max_new_tokens=100))
        await asyncio.sleep(0.02)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing

    asyncio.run(cancel())
    assert wait_until(lambda: all(len(worker.servicer.sessions) == 0 for worker in workers.values()))


def test_calls_from_several_threads(pair: specsplit.Pair) -> None:
    text = pair.generate(PROMPT)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(pair.generate(PROMPT))) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [text] * 10


# ---- loading and connecting


def test_a_target_alone(folders: dict[str, Path], expected: Any) -> None:
    with specsplit.load(str(folders["target"]), max_new_tokens=LENGTH, ignore_eos=True) as pair:
        text = pair.generate(PROMPT)
        assert (text.token_ids, len(text.rounds)) == (expected(PROMPT), LENGTH)
        with pytest.raises(specsplit.OptionError, match="gamma=3: this pair has no draft model"):
            pair.generate(PROMPT, gamma=3)
        looked_up = pair.generate(PROMPT, gamma=3, lookup=1)
        assert looked_up == text
        assert any(r.draft_source == "lookup" for r in looked_up.rounds)


def test_how_each_model_runs_can_be_said(folders: dict[str, Path], loaded: specsplit.Pair) -> None:
    target = specsplit.Model(folders["target"], engine="transformers", threads=1, device="cpu", max_context=64)
    draft = specsplit.Model(folders["target"], dtype="float32", skip_layers=[1])
    threads = torch.get_num_threads()
    with specsplit.load(target, draft, max_new_tokens=LENGTH, ignore_eos=True) as pair:
        text = pair.generate(PROMPT)
        assert text == loaded.generate(PROMPT)
        assert pair.generate(PROMPT, max_new_tokens=1000).finish_reason == "context"
    assert torch.get_num_threads() == threads
    with pytest.raises(specsplit.UserError, match="this pair is closed"):
        pair.generate(PROMPT)
    pair.close()  # once more does nothing


def test_a_draft_with_another_tokenizer_is_translated(folders: dict[str, Path], tmp_path: Path, expected: Any) -> None:
    other = tmp_path / "other"
    shutil.copytree(folders["draft"], other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with specsplit.load(folders["target"], other, gamma=3, max_new_tokens=LENGTH, ignore_eos=True) as pair:
        assert pair.generate(PROMPT).token_ids == expected(PROMPT)


def test_a_target_worker_brings_its_tokenizer(
    workers: dict[str, Worker], codec: TextCodec, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = workers["target"]
    with specsplit.connect(target.address, max_new_tokens=LENGTH, ignore_eos=True) as pair:
        text = pair.generate(PROMPT)
    assert (text.token_ids, text) == (expected(PROMPT), codec.decode(text.token_ids))
    # A tokenizer that is too large for a message.
    monkeypatch.setattr(target.servicer, "tokenizer_files", dict)
    with specsplit.connect(target.address, max_new_tokens=LENGTH, ignore_eos=True) as pair:
        text = pair.generate(codec.encode(PROMPT))
        assert (text.token_ids, text) == (expected(PROMPT), "")
        with pytest.raises(specsplit.PromptError, match="the target worker gave no tokenizer: send token ids"):
            pair.generate(PROMPT)
        with pytest.raises(specsplit.OptionError, match="the target worker gave no tokenizer"):
            pair.stream([5])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"../tokenizer.json": b""}, "a tokenizer has no file '../tokenizer.json'"),
        ({"model.safetensors": b""}, "a tokenizer has no file"),
        ({"tokenizer.json": b"plain"}, "tokenizer.json of a tokenizer cannot be read"),
        ({"tokenizer.json": zlib.compress(bytes(2000))[:-5]}, "is cut off, or larger than"),
        ({"tokenizer.json": zlib.compress(b"{}")}, "a tokenizer cannot be loaded"),
    ],
)
def test_a_tokenizer_from_a_worker_is_not_trusted(files: dict[str, bytes], message: str) -> None:
    with pytest.raises(specsplit.UserError, match=message):
        TextCodec.unpack(files)


def test_connecting_with_a_token(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("a-token-that-is-long-enough")
    file.chmod(0o600)
    with serving("target", folders["target"], token_file=file, access=specsplit_access(file)) as target:
        with specsplit.connect(target.address, tokenizer=folders["target"], token_file=file, max_new_tokens=2) as pair:
            assert len(pair.generate(PROMPT, ignore_eos=True).token_ids) == 2
        with pytest.raises(specsplit.WorkerError, match="asks for a token and no token was sent"):
            specsplit.connect(target.address, tokenizer=folders["target"])


def specsplit_access(file: Path) -> Any:
    from specsplit.rpc.credentials import Access

    return Access(token=file.read_text())


# ---- models by name


def test_a_model_of_the_hub_is_asked_for_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client, which may not go online here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(
        specsplit.ModelError, match=r"org/tiny@main on Hugging Face cannot be reached and is not in the"
    ):
        specsplit.load("org/tiny")
    with pytest.raises(specsplit.ModelError, match="org/tiny@v2 on Hugging Face"):
        specsplit.load(specsplit.Model("org/tiny", revision="v2"))


def test_what_was_fetched_is_found_again(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    snapshot = tmp_path / "hub" / ("a" * 40)
    shutil.copytree(folders["target"], snapshot)
    asked: list[str] = []

    def download(repo: str, *, revision: str, allow_patterns: object) -> str:
        asked.append(f"{repo}@{revision}")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for _ in range(2):
        with specsplit.load("org/tiny", max_new_tokens=LENGTH, ignore_eos=True) as pair:
            assert pair.generate(PROMPT).token_ids == expected(PROMPT)
    specsplit.Model("org/tiny@other").folder()
    assert asked == ["org/tiny@main", "org/tiny@other"]


def test_the_embedded_model_is_that_of_the_configuration() -> None:
    assert {name: load_pipeline_config({})["models"][name] for name in named_models.EMBEDDED} == named_models.EMBEDDED


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gama": 3}, "gama is not an option of a text; did you mean gamma?"),
        ({"gamma": 65}, "gamma=65: "),
        ({"max_new_tokens": 0}, "max_new_tokens=0: "),
        ({"mode": "fast"}, "mode='fast': Input should be 'sync', 'overlap' or 'lookahead'"),
        ({"tree": "bush"}, "tree='bush': .*write chain, 3x2"),
        ({"temperature": 1.0, "tree": "dynamic-8x2", "sampling": "rejection"}, "biases rejection sampling"),
        ({"temperature": 1.0, "p_min": 0.2, "sampling": "rejection"}, "use sampling coupled, or p_min 0"),
        ({"p_min": 1}, "p_min=1: "),
    ],
)
def test_an_option_that_cannot_be_is_named(loaded: specsplit.Pair, options: Any, message: str) -> None:
    with pytest.raises(specsplit.OptionError, match=message):
        loaded.generate(PROMPT, **options)
    with pytest.raises(specsplit.OptionError, match=message):
        loaded.stream(PROMPT, **options)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", ".*"),
        ([], "the prompt has no tokens"),
        ([5] * 4000, "shorten the prompt"),
        ([5, "a"], "a prompt is a string, a list of messages"),
        ([{"content": "x"}, 3], "a prompt is a string, a list of messages"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused(loaded: specsplit.Pair, prompt: Any, message: str) -> None:
    options: dict[str, Any] = {"use_chat_template": False}
    with pytest.raises(specsplit.PromptError, match=message):
        loaded.generate(prompt, **options)


def test_models_that_are_not_there(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(specsplit.ModelError, match=r"\./none: no such folder"):
        specsplit.load("./none")
    with pytest.raises(specsplit.ModelError, match="a b: no such folder, and no model id"):
        specsplit.load("a b")
    with pytest.raises(specsplit.ModelError, match=f"target: .*{tmp_path.name}"):
        specsplit.load(tmp_path)
    with pytest.raises(specsplit.OptionError, match="target: dtype='float1': "):
        specsplit.load(specsplit.Model(folders["target"], dtype="float1"))
    with pytest.raises(specsplit.OptionError, match="which has none"):
        specsplit.load(specsplit.Model(folders["target"], revision="main"))
    with pytest.raises(specsplit.OptionError, match="gamma=3: this pair has no draft"):
        specsplit.load(folders["target"], gamma=3)


def test_nobody_at_an_address() -> None:
    with pytest.raises(specsplit.WorkerError, match=r"no target worker answers at 127\.0\.0\.1:1 within 0\.2 s"):
        specsplit.connect("127.0.0.1:1", connect_timeout_s=0.2)


def test_a_worker_that_fails_is_told_where_the_stream_ends(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "LAST_CHANCE_S", 0.2)
    monkeypatch.setenv("SPECSPLIT_ORCH_RECOVERY_TIMEOUT_S", "0.2")
    with serving("target", folders["target"], drain_s=0.1) as target:
        pair = specsplit.connect(target.address, tokenizer=folders["target"], max_new_tokens=100, ignore_eos=True)
        with pair, pair.stream(PROMPT) as stream:
            next(stream)
            target.before_pass = lambda: target.server.stop() if target.passes == 20 else None
            threading.Thread(target=target.server.stop).start()
            with pytest.raises(specsplit.WorkerError) as caught:
                list(stream)
    assert caught.value.result is not None
    assert caught.value.result.output_tokens


# ---- the package


def test_the_package_is_light_until_it_is_used() -> None:
    code = "import sys, specsplit; print('torch' in sys.modules, 'pydantic' in sys.modules, len(specsplit.__all__))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[:2] == ["False", "False"]
    assert all(getattr(specsplit, name) is not None for name in specsplit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = specsplit.nothing


def test_the_types_name_what_the_package_has() -> None:
    stub = Path(specsplit.__file__).with_suffix(".pyi").read_text()
    assert all(f" as {name}\n" in stub or f"{name}: " in stub for name in specsplit.__all__)
