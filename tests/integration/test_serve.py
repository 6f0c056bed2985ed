"""The OpenAI-compatible server over real workers, called by OpenAI's own client and by hand."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import uvicorn
from starlette.testclient import TestClient

from specsplit.api.pair import Pair, connect
from specsplit.errors import UserError, shortened
from specsplit.launch.process import ProcessIdentity
from specsplit.models.tokenizer import TextCodec
from specsplit.serve.app import application
from specsplit.serve.bodies import IGNORED, NEUTRAL, CompletionBody
from specsplit.serve.failures import LONGEST_MESSAGE
from specsplit.serve.listening import HalfOpenProtocol, read_keys, without_broken_requests
from specsplit.settings.serve import ServeSettings

from grpc_fixtures import Gate, Reference, Worker, noisy_copy, serving
from waiting import wait_until

MODEL = "tiny"
KEYS = ("none", "other")
QUESTION: list[Any] = [{"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def target_folder(tiny_model_folder: Callable[..., Path]) -> Path:
    return tiny_model_folder("llama")


@pytest.fixture(scope="module")
def workers(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Worker]]:
    draft_folder = noisy_copy(target_folder, tmp_path_factory.mktemp("draft"), noise=0.05)
    with serving("draft", draft_folder) as draft, serving("target", target_folder) as target:
        yield {"draft": draft, "target": target}


@pytest.fixture(scope="module")
def pair(workers: dict[str, Worker], target_folder: Path) -> Iterator[Pair]:
    addresses = {role: worker.address for role, worker in workers.items()}
    with connect(**addresses, tokenizer=target_folder, gamma=4) as pair:
        yield pair


def an_application(pair: Pair, keys: tuple[str, ...] = (), **settings: Any) -> Any:
    return application(pair, ServeSettings(**settings), model=MODEL, max_context=128, gamma=4, keys=keys)


@pytest.fixture(scope="module")
def base_url(pair: Pair) -> Iterator[str]:
    app = without_broken_requests(an_application(pair, keys=KEYS))
    server = uvicorn.Server(uvicorn.Config(app, http=HalfOpenProtocol, port=0, log_level="warning", lifespan="off"))
    listening = server.config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def client(base_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=base_url, api_key=KEYS[0], max_retries=0)


@pytest.fixture(scope="module")
def http(pair: Pair) -> Iterator[TestClient]:
    with TestClient(an_application(pair), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def expected(target_folder: Path) -> Callable[[int], str]:
    codec, reference = TextCodec.load(target_folder), Reference(target_folder)
    return lambda tokens: codec.decode(reference.text(codec.encode(QUESTION), tokens))


def test_a_chat_has_the_text_of_the_target_alone(client: openai.OpenAI, expected: Callable[[int], str]) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=20, temperature=0, extra_body={"ignore_eos": True}
    )
    assert reply.choices[0].message.content == expected(20)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 20
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 20
    said: Any = reply.model_extra
    figures = said["metrics"]["speculative_decoding"]
    histogram = figures["acceptance_histogram"]
    assert sum(histogram) == figures["num_spec_steps"]
    assert sum(k * count for k, count in enumerate(histogram)) == figures["num_accepted_draft_tokens"]
    length = 1 + figures["num_accepted_draft_tokens"] / figures["num_spec_steps"]
    assert figures["mean_acceptance_length"] == pytest.approx(length)
    assert figures["num_spec_tokens"] == 4


def test_a_stream_has_the_same_text_its_usage_and_one_end(
    client: openai.OpenAI, expected: Callable[[int], str]
) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_completion_tokens=20, temperature=0, stream=True,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected(20)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20
    last: Any = chunks[-1].model_extra
    assert last["metrics"]["speculative_decoding"]["num_spec_steps"] > 0
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions_take_strings_and_token_ids(client: openai.OpenAI, pair: Pair) -> None:
    written = [
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=12, temperature=0).choices[0].text
        for prompt in ("one two one", [pair.codec.encode("one two one", use_chat_template=False)])  # type: ignore[union-attr, list-item]
    ]
    assert written[0] == written[1] == pair.generate("one two one", max_new_tokens=12, use_chat_template=False)


def test_many_async_clients_get_the_text_of_one(base_url: str, expected: Callable[[int], str]) -> None:
    async def ask(client: openai.AsyncOpenAI, streamed: bool) -> str:
        options: dict[str, Any] = {"max_tokens": 16, "temperature": 0, "extra_body": {"ignore_eos": True}}
        if not streamed:
            reply = await client.chat.completions.create(model=MODEL, messages=QUESTION, **options)
            return reply.choices[0].message.content or ""
        stream = await client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True, **options)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=base_url, api_key=KEYS[1], max_retries=0) as client:
            return await asyncio.gather(*(ask(client, bool(i % 2)) for i in range(24)))

    assert set(asyncio.run(all_of_them())) == {expected(16)}


def test_stop_strings_cut_exactly(client: openai.OpenAI, expected: Callable[[int], str]) -> None:
    text = expected(20)
    for start in (3, 7):
        stop = text[start : start + 2]
        options: dict[str, Any] = {"max_tokens": 20, "temperature": 0, "stop": [stop, "never there"]}
        options["extra_body"] = {"ignore_eos": True}
        reply = client.chat.completions.create(model=MODEL, messages=QUESTION, **options)
        chunks = list(client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True, **options))
        before = text[: text.index(stop)]
        assert reply.choices[0].message.content == before
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == before
        assert reply.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "stop"
        assert reply.usage is not None
        assert 0 < reply.usage.completion_tokens < 20


def test_a_seed_repeats_a_sampled_text_and_none_does_not(client: openai.OpenAI) -> None:
    def sample(**options: Any) -> str | None:
        options = {"max_tokens": 12, "temperature": 1.5, "extra_body": {"ignore_eos": True}, **options}
        return client.chat.completions.create(model=MODEL, messages=QUESTION, **options).choices[0].message.content

    assert sample(seed=7) == sample(seed=7)
    assert len({sample() for _ in range(4)}) > 1


def test_models_health_and_metrics(client: openai.OpenAI, http: TestClient) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    assert http.get("/health").json() == {"status": "ok"}
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    figures = http.post("/v1/chat/completions", json=body).json()["metrics"]["speculative_decoding"]
    lines = http.get("/metrics").text.splitlines()
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
    labels = f'{{model_name="{MODEL}"}}'
    assert values[f"vllm:spec_decode_num_drafts_total{labels}"] == figures["num_spec_steps"]
    assert values[f"vllm:spec_decode_num_draft_tokens_total{labels}"] == figures["num_draft_tokens"]
    assert values[f"vllm:spec_decode_num_accepted_tokens_total{labels}"] == figures["num_accepted_draft_tokens"]
    by_position = [v for name, v in values.items() if name.startswith("vllm:spec_decode_num_accepted_tokens_per_pos_t")]
    assert sum(by_position) == figures["num_accepted_draft_tokens"]
    assert values[f"vllm:generation_tokens_total{labels}"] == 16
    assert values[f"vllm:num_requests_running{labels}"] == 0


# ---- what is refused


def error_of(reply: Any) -> dict[str, Any]:
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["message"][0] != ":"  # after the name of a field
    assert len(error["message"]) <= LONGEST_MESSAGE
    return error


GOOD: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "max_tokens": 4}


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": None}, 400, "messages"),
        ({"messages": [{"role": "user"}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "messages"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "warm"}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"temperature": 1e-9}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 2.5}, 400, "max_tokens"),
        ({"max_completion_tokens": 0}, 400, "max_completion_tokens"),
        ({"n": 2}, 400, "n"),
        ({"n": True}, 400, "n"),
        ({"best_of": 2}, 400, "best_of"),
        ({"echo": True}, 400, "echo"),
        ({"suffix": "end"}, 400, "suffix"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"presence_penalty": -0.5}, 400, "presence_penalty"),
        ({"repetition_penalty": 1.1}, 400, "repetition_penalty"),
        ({"reasoning_effort": "low"}, 400, "reasoning_effort"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, 400, "chat_template_kwargs"),
        ({"structured_outputs": {"regex": "a"}}, 400, "structured_outputs"),
        ({"skip_special_tokens": False}, 400, "skip_special_tokens"),
        ({"seed": 1.5}, 400, "seed"),
        ({"top_k": -2}, 400, "top_k"),
        ({"stop_token_ids": [-1]}, 400, "stop_token_ids"),
        ({"return_token_ids": "yes"}, 400, "return_token_ids"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"min_tokens": 3}, 400, "min_tokens"),
        ({"min_tokens": 9, "ignore_eos": True}, 400, "min_tokens"),
        ({"min_tokens": 3, "ignore_eos": True, "stop": "a"}, 400, "min_tokens"),
        ({"min_tokens": 3, "ignore_eos": True, "stop_token_ids": [5]}, 400, "min_tokens"),
        ({"stop": ""}, 400, "stop"),
        ({"stop": ["a", ""]}, 400, "stop"),
        ({"stream": "yes"}, 400, "stream"),
        ({"stream": True, "stream_options": {"include_usage": "yes"}}, 400, "stream_options"),
        ({"w" * 9999: 1}, 400, shortened("w" * 9999, LONGEST_MESSAGE)),
        ({"temprature": 1}, 400, "temprature"),
        ({"messages": [{"role": "user", "content": "word " * 400}]}, 400, "messages"),
    ],
)
def test_bad_requests_name_their_field(http: TestClient, changes: dict[str, Any], status: int, param: str) -> None:
    reply = http.post("/v1/chat/completions", json={**GOOD, **changes})
    assert reply.status_code == status
    error = error_of(reply)
    assert error["param"] == param
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


@pytest.mark.parametrize("prompt", ["", [], [[]], ["a", "b"], None, [True], [-1], [128], [2**70], "a\ud800", [5] * 400])
def test_prompts_that_cannot_be_are_named(http: TestClient, prompt: Any) -> None:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 4}
    reply = http.post("/v1/completions", content=json.dumps(body).encode())
    assert reply.status_code == 400
    assert error_of(reply)["param"] == "prompt"


def test_what_another_server_takes_and_changes_no_text_is_taken(http: TestClient, pair: Pair) -> None:
    plain = {**GOOD, "temperature": 0, "ignore_eos": True}
    text = http.post("/v1/chat/completions", json=plain).json()["choices"][0]["message"]["content"]
    sent_back = {"role": "user", "content": "Why?", "refusal": None, "tool_calls": [], "annotations": []}
    for more in (
        *({name: "anything"} for name in IGNORED),
        *({"seed": seed} for seed in (-1, 0, 2**63, -(2**200))),
        {"messages": [sent_back]},
        {"max_completion_tokens": 4, "max_tokens": 9},
        {"stop_token_ids": [10**9]},
        {"top_k": -1, "top_p": 1},
        {"min_tokens": 4},
    ):
        reply = http.post("/v1/chat/completions", content=json.dumps({**plain, **more}).encode())
        assert reply.json()["choices"][0]["message"]["content"] == text, (more, reply.text)


def test_stop_tokens_are_obeyed_beside_the_end_of_text(http: TestClient, pair: Pair) -> None:
    plain = {**GOOD, "max_tokens": 20, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    ids = http.post("/v1/chat/completions", json=plain).json()["choices"][0]["token_ids"]
    choice = http.post("/v1/chat/completions", json={**plain, "stop_token_ids": [ids[3]]}).json()["choices"][0]
    assert choice["token_ids"] == ids[: ids.index(ids[3])]
    assert choice["finish_reason"] == "stop"
    body = CompletionBody(model=MODEL, prompt="a", stop_token_ids=[7])
    assert body.options(eos_token_ids=[2])["stop_token_ids"] == [7, 2]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_token_ids_stand_where_vllm_has_them(http: TestClient, path: str) -> None:
    chat = "chat" in path
    asked: dict[str, Any] = {"messages": QUESTION} if chat else {"prompt": "one two"}
    stop = {"stop": ["never there"]}  # whose beginnings are held back
    body = {"model": MODEL, **asked, **stop, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    whole = http.post(path, json={**body, "return_token_ids": True}).json()
    options = {"include_usage": True, "continuous_usage_stats": True}
    streamed = http.post(path, json={**body, "return_token_ids": True, "stream": True, "stream_options": options})
    *events, end = [line.removeprefix("data: ") for line in streamed.text.split("\n\n")[:-1]]
    assert end == "[DONE]"
    chunks = [json.loads(event) for event in events]
    (choice,), ids = whole["choices"], whole["choices"][0]["token_ids"]
    prompt = whole["prompt_token_ids"] if chat else choice["prompt_token_ids"]
    assert (len(prompt), len(ids)) == (whole["usage"]["prompt_tokens"], 16)
    assert [token for chunk in chunks[:-1] for token in chunk["choices"][0]["token_ids"]] == ids
    first = chunks[0] if chat else chunks[0]["choices"][0]
    assert first["prompt_token_ids"] == prompt
    counts = [len(chunk["choices"][0]["token_ids"]) for chunk in chunks[:-1]]
    so_far = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert so_far == [*(sum(counts[: i + 1]) for i in range(len(counts))), 16]
    plain = http.post(path, json=body).json()
    assert "token_ids" not in plain["choices"][0]
    assert "prompt_token_ids" not in {**plain, **plain["choices"][0]}


def test_the_unknown_field_has_a_suggestion_and_a_long_prompt_its_code(http: TestClient) -> None:
    assert (
        "did you mean temperature?"
        in error_of(http.post("/v1/chat/completions", json={**GOOD, "temprature": 1}))["message"]
    )
    long = {**GOOD, "messages": [{"role": "user", "content": "word " * 400}]}
    assert error_of(http.post("/v1/chat/completions", json=long))["code"] == "context_length_exceeded"


def test_values_that_ask_for_nothing_are_taken(http: TestClient) -> None:
    for which in range(3):
        body = {**GOOD, **{name: [*values, None, None, None][which] for name, values in NEUTRAL.items()}}
        reply = http.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text


NESTED = b'{"messages":' + b"[" * 450 + b"]" * 450 + b"}"


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b"[" * 100_000, NESTED, b'{"model": NaN}'])
def test_bodies_that_are_no_request(http: TestClient, data: bytes) -> None:
    reply = http.post("/v1/chat/completions", content=data)
    assert reply.status_code == 400
    assert error_of(reply)["type"] == "invalid_request_error"


def test_three_hundred_arbitrary_requests_get_a_reply_or_a_reason(http: TestClient) -> None:
    chance = random.Random(5)
    values: list[Any] = [
        None, True, 0, -1, 1, 2**70, 1.5, -0.0, 1e308, "", "x", "\x00", "\ud800", [], [1], ["a"], {}, {"a": 1}, [[]],
        [{"role": "user", "content": "hi"}], [{"role": 1, "content": {}}], {"include_usage": True},
    ]  # fmt: skip
    names = [*NEUTRAL, "model", "messages", "prompt", "stream", "stream_options", "seed", "stop", "top_k", "top_p",
             "temperature", "max_tokens", "max_completion_tokens", "stop_token_ids", "ignore_eos", "other",
             "\ud800"]  # fmt: skip
    for _ in range(300):
        path = chance.choice(["/v1/chat/completions", "/v1/completions"])
        good = GOOD if "chat" in path else {"model": MODEL, "prompt": "a", "max_tokens": 4}
        body = {**good, **{chance.choice(names): chance.choice(values) for _ in range(chance.randint(1, 3))}}
        reply = http.post(path, content=json.dumps({"max_tokens": 4, **body}).encode())
        assert reply.status_code == 200 or 400 <= reply.status_code < 500, (body, reply.text)
        if reply.status_code != 200:
            error_of(reply)


HEAD = "POST /v1/completions HTTP/1.1\r\nHost: a\r\n"


@pytest.mark.parametrize("key", [KEYS[0], "wrong"])
@pytest.mark.parametrize("rest", ["Transfer-Encoding: chunked\r\n\r\nzz\r\n", 'Content-Length: 90\r\n\r\n{"model":'])
def test_requests_that_break_off_are_dropped(base_url: str, client: openai.OpenAI, key: str, rest: str) -> None:
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    for name in ("uvicorn.error", "specsplit"):
        logging.getLogger(name).addHandler(handler)
    host, port = base_url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{HEAD}Authorization: Bearer {key}\r\n{rest}".encode())
        connection.settimeout(0.2)
        with suppress(TimeoutError):
            connection.recv(4096)
    assert client.models.list().data
    assert set(logged) <= {"Invalid HTTP request received."}


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_has_closed_its_own_side_is_answered(base_url: str, streamed: bool) -> None:
    body = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 4, "ignore_eos": True, "stream": streamed})
    host, port = base_url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        key = f"Authorization: Bearer {KEYS[0]}\r\n"
        connection.sendall(f"{HEAD}{key}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        connection.shutdown(socket.SHUT_WR)
        reply = b"".join(iter(lambda: connection.recv(4096), b""))
    assert b"HTTP/1.1 200 OK" in reply
    assert b'"finish_reason": "length"' in reply if streamed else b'"finish_reason":"length"' in reply


def test_unknown_paths_and_methods_have_the_shape_too(http: TestClient) -> None:
    assert error_of(http.get("/v1/embeddings"))["type"] == "not_found_error"
    wrong_method = http.get("/v1/chat/completions")
    assert (wrong_method.status_code, wrong_method.headers["Allow"]) == (405, "POST")
    assert error_of(http.get("/v1/models/other"))["code"] == "model_not_found"


def test_a_key_is_asked_for_where_there_is_one(pair: Pair) -> None:
    with TestClient(an_application(pair, keys=("secret", "other"))) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            reply = client.get("/v1/models", headers=headers)
            assert reply.status_code == 401
            assert error_of(reply)["code"] == "invalid_api_key"
        assert client.get("/v1/models", headers={"Authorization": "Bearer other"}).status_code == 200
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "0.0.0.0"}, "give --api-key-file"),
        ({"host": "0.0.0.0", "api_key_file": "keys"}, "sent in the clear"),
        ({"api_key_file": "nowhere"}, "nowhere: no such file"),
        ({"api_key_file": "empty"}, "holds no key"),
        ({"certificate": "keys"}, "give both"),
        ({"certificate": "keys", "certificate_key": "nowhere"}, "--certificate-key nowhere: no such file"),
        ({"certificate": "keys", "certificate_key": "keys"}, "keys are not a certificate and its unencrypted key"),
        ({"api_key_file": "accents"}, "characters beyond ASCII"),
    ],
)
def test_a_server_that_would_be_open_is_refused(
    settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("keys").write_text("one\n\ntwo\n")
    Path("empty").write_text("\n")
    Path("accents").write_text("clé\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_keys(ServeSettings(**settings), insecure=False)
    assert read_keys(ServeSettings(host="0.0.0.0", api_key_file="keys"), insecure=True) == ["one", "two"]


# ---- under load, and when things go away


def test_more_than_can_wait_are_told_to_come_back(pair: Pair, workers: dict[str, Worker]) -> None:
    gate = Gate(workers["target"])
    with TestClient(an_application(pair, max_running=1, max_waiting=1)) as client:
        replies: list[Any] = []
        threads = [
            threading.Thread(target=lambda: replies.append(client.post("/v1/chat/completions", json=GOOD)))
            for _ in range(2)
        ]
        threads[0].start()
        gate.wait()
        threads[1].start()
        assert wait_until(lambda: 'vllm:num_requests_waiting{model_name="tiny"} 1.0' in client.get("/metrics").text)
        refused = client.post("/v1/chat/completions", json=GOOD)
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        assert error_of(refused)["type"] == "rate_limit_error"
        gate.open()
        for thread in threads:
            thread.join(30)
        assert [reply.status_code for reply in replies] == [200, 200]


def test_a_client_that_leaves_frees_its_session(
    client: openai.OpenAI, workers: dict[str, Worker], base_url: str
) -> None:
    with client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=100, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
    gate, impatient = Gate(workers["target"]), client.with_options(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        impatient.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=100)
    gate.open()
    running = f'vllm:num_requests_running{{model_name="{MODEL}"}} 0.0'
    page = base_url.replace("/v1", "/metrics")
    assert wait_until(lambda: running in urllib.request.urlopen(page).read().decode())


@pytest.mark.parametrize("streamed", [False, True])
def test_a_worker_that_is_gone_is_an_error_in_the_same_shape(
    target_folder: Path, streamed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with serving("target", target_folder) as target, connect(target.address, tokenizer=target_folder) as pair:
        short = pair._config.model_copy(update={"recovery_timeout_s": 0.2, "connect_timeout_s": 0.5})
        pair._config = short
        with TestClient(an_application(pair)) as client:
            target.close()
            assert client.get("/health").status_code == 503
            reply = client.post("/v1/chat/completions", json={**GOOD, "stream": streamed})
            assert (reply.status_code, reply.headers["Retry-After"]) == (503, "1")
            error = error_of(reply)
            assert (error["type"], error["code"]) == ("server_error", "worker_failed")
            assert "worker" not in error["message"]  # and no address: those are in the log
            assert target.address in caplog.text


@pytest.mark.parametrize("streamed", [False, True])
def test_what_is_cut_off_when_the_server_stops_ends_with_an_error(
    pair: Pair, workers: dict[str, Worker], streamed: bool
) -> None:
    body = json.dumps({**GOOD, "max_tokens": 100, "ignore_eos": True, "stream": streamed}).encode()
    asked, sent = [{"type": "http.request", "body": body}], []
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b""}

    async def receive() -> Any:
        return asked.pop() if asked else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)
        if streamed and len(sent) == 2:  # the first piece
            text.cancel()  # as uvicorn does after `stop_timeout_s`
            await asyncio.sleep(0)

    async def answered() -> None:
        nonlocal text
        text = asyncio.ensure_future(an_application(pair)(scope, receive, send))
        if not streamed:
            gate = Gate(workers["target"])
            await asyncio.to_thread(gate.wait)
            text.cancel()
            gate.open()
        await text

    text: asyncio.Future[None]
    asyncio.run(answered())
    last = json.loads(sent[-1]["body"].removeprefix(b"data: "))
    assert (sent[0]["status"], last["error"]["code"]) == (200 if streamed else 503, "server_stopping")


@contextmanager
def the_command(target_folder: Path) -> Iterator[tuple[openai.OpenAI, subprocess.Popen[str]]]:
    """`specsplit serve`, which has started both workers, and a client."""
    models = ["--target-model", str(target_folder), "--draft-model", str(target_folder)]
    settings = ["--port", "0", "--served-model-name", MODEL, "--recovery-timeout-s", "300"]
    command = [sys.executable, "-m", "specsplit", "serve", *models, *settings]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving at http://127.0.0.1:")
        try:
            yield openai.OpenAI(base_url=line.split()[-1], api_key="none", max_retries=0, timeout=400), process
        finally:
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
        assert process.wait(60) == 143
        assert time.monotonic() - began < 60


def test_the_command_starts_workers_serves_and_stops(target_folder: Path) -> None:
    with the_command(target_folder) as (client, _):
        reply = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=8, temperature=0)
        said: Any = reply.model_extra
        assert said["metrics"]["speculative_decoding"]["draft_acceptance_rate"] > 0.9


@pytest.mark.slow
def test_workers_of_the_command_that_are_killed_are_started_again(
    target_folder: Path, expected: Callable[[int], str]
) -> None:
    options: dict[str, Any] = {"max_tokens": 100, "temperature": 0, "extra_body": {"ignore_eos": True}}

    def streamed(first_piece: threading.Barrier | None = None) -> str:
        stream = client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True, **options)
        text = next(stream).choices[0].delta.content or ""
        if first_piece is not None:
            first_piece.wait(60)  # until all streams have begun
            first_piece.wait(60)  # until the workers are killed
        return text + "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with the_command(target_folder) as (client, process), ThreadPoolExecutor(8) as clients:
        barrier = threading.Barrier(9)
        texts = [clients.submit(streamed, barrier) for _ in range(8)]
        barrier.wait(60)
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        for worker in workers:
            worker.kill()
        barrier.wait(60)
        assert {text.result(400) for text in texts} == {expected(100)}
        assert streamed() == expected(100)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert [worker.status() == psutil.STATUS_ZOMBIE for worker in workers] == [False, False]
        left = [ProcessIdentity.of(worker.pid) for worker in workers]
    assert not any(worker is None or worker.alive() for worker in left)
