"""The campaign `serve` of soak.py: OpenAI's own client against `specsplit serve`, under mixed load, for a long time.

Whole texts and streams, chats and completions, greedy and sampled, short and long, clients that leave, bad requests and
wrong keys in between, connections that say half a request; on demand with workers killed meanwhile. Each text must be
right, or end with an error in OpenAI's shape; the memory of the server and the workers is looked at all the time.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil

from specsplit.api.pair import Pair, connect
from specsplit.models.tokenizer import TextCodec

from waiting import wait_until
from worker_processes import WorkerProcess, start_command

KEYS = ("first-key", "second-key", "third-key")
LONGEST = 180
QUESTIONS = ["Why?", "a longer question about nothing in particular, " * 3, "Umlaute: ä, und €", "\n\n", "x" * 300]
WAYS: list[dict[str, Any]] = [
    {"temperature": 0}, {"temperature": 0.8, "seed": 5}, {"temperature": 1, "seed": 7, "top_k": 8},
]  # fmt: skip
# Each is refused with a 4xx: fields beside those of a good request.
BAD: list[dict[str, Any]] = [
    {"model": "other"}, {"temperature": -1}, {"max_tokens": -1}, {"n": 3}, {"stop": ""}, {"top_p": 7},
    {"messages": []}, {"messages": "hello"}, {"messages": [{"role": "user", "content": "x" * 100_000}]},
    {"tools": [{"type": "function"}]},
    {"nonsense": 1}, {"response_format": {"type": "json_object"}}, {"logit_bias": {"5": 1}}, {"seed": "seven"},
]  # fmt: skip
RAW = [
    b"GARBAGE\r\n\r\n", b"GET /metrics HTTP/1.1\r\nHost: a\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 500\r\n\r\n{\"model\":",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
]  # fmt: skip


class Load:
    """The clients of one server and what became of their requests."""

    def __init__(self, base_url: str, model: str, right: dict[tuple[bool, int, int], str], seed: int) -> None:
        self.verdicts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.slowest_s = 0.0
        self._url, self._model, self._right, self._seed = base_url, model, right, seed

    async def client(self, number: int, until: float) -> None:
        """One user, who does one thing after the other."""
        chance = random.Random(self._seed * 1000 + number)
        key = KEYS[number % len(KEYS)]
        while time.monotonic() < until:
            # A new client now and then: connections come and go.
            async with openai.AsyncOpenAI(base_url=self._url, api_key=key, max_retries=0, timeout=120) as api:
                for _ in range(chance.randint(1, 30)):
                    what = chance.choices([self._text, self._leaving, self._bad, self._raw], [80, 8, 8, 4])[0]
                    began = time.monotonic()
                    await what(api, chance)
                    self.slowest_s = max(self.slowest_s, time.monotonic() - began)
                    if chance.random() < 0.2:
                        await asyncio.sleep(chance.uniform(0, 0.5))

    def _request(self, chance: random.Random) -> tuple[Any, dict[str, Any], str]:
        chat, question, way = chance.random() < 0.6, chance.randrange(len(QUESTIONS)), chance.randrange(len(WAYS))
        tokens = chance.choice([1, 2, 8, 30, 60, LONGEST])
        options = {"model": self._model, "max_tokens": tokens, **WAYS[way], "extra_body": {"ignore_eos": True}}
        options["extra_body"] |= {"top_k": options.pop("top_k")} if "top_k" in options else {}
        text = QUESTIONS[question]
        options |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        return chat, options, self._right[chat, question, way][:tokens]

    async def _text(self, api: openai.AsyncOpenAI, chance: random.Random) -> None:
        chat, options, right = self._request(chance)
        create: Any = api.chat.completions.create if chat else api.completions.create
        text, begun, stream = "", False, chance.random() < 0.5
        try:
            if stream:
                if chance.random() < 0.5:
                    options["stream_options"] = {"include_usage": True}
                finish = None
                async for chunk in await create(stream=True, **options):
                    begun = True
                    for choice in chunk.choices:
                        text += (choice.delta.content if chat else choice.text) or ""
                        finish = choice.finish_reason or finish
                ok = text == right and finish == "length"
            else:
                reply = await create(**options)
                text = reply.choices[0].message.content if chat else reply.choices[0].text
                ok = text == right and reply.usage.completion_tokens == options["max_tokens"]
            kind = "right" if ok else "wrong"
        except openai.APIStatusError as error:
            kind = f"status_{error.status_code}" if error.body and "message" in dict(error.body) else "wrong"  # type: ignore[call-overload]
            text = str(error)
        except openai.APIError as error:
            named = begun and isinstance(error.body, dict) and {"message", "type", "code"} <= set(error.body)
            kind = "error_in_stream" if named else "wrong"
            text = repr(error)
        self.verdicts[kind] += 1
        if kind == "wrong":
            self.wrong.append(f"{options} gave {text!r}, not {right!r}")

    async def _leaving(self, api: openai.AsyncOpenAI, chance: random.Random) -> None:
        chat, options, _ = self._request(chance)
        create: Any = api.chat.completions.create if chat else api.completions.create
        with suppress(openai.APIError, TimeoutError):
            if chance.random() < 0.5:
                await asyncio.wait_for(create(**options), chance.uniform(0.001, 0.3))
            else:
                async with await create(stream=True, **options) as stream:
                    for _ in range(chance.randint(0, 4)):
                        await anext(stream, None)
        self.verdicts["left"] += 1

    async def _bad(self, api: openai.AsyncOpenAI, chance: random.Random) -> None:
        messages = [{"role": "user", "content": "hi"}]
        body = {"model": self._model, "messages": messages, "stream": chance.random() < 0.5, **chance.choice(BAD)}
        wrong_key = chance.random() < 0.2
        try:
            await (api.with_options(api_key="no-key") if wrong_key else api).post(
                "/chat/completions", body=body, cast_to=object
            )
            kind = "wrong"
        except openai.APIStatusError as error:
            shaped = isinstance(error.body, dict) and {"message", "type", "param", "code"} == set(error.body)
            expected = error.status_code == 401 if wrong_key else 400 <= error.status_code < 500
            kind = "refused" if shaped and expected else "wrong"
        except openai.APIError as error:
            kind, body = "wrong", {**body, "error": repr(error)}
        self.verdicts[kind] += 1
        if kind == "wrong":
            self.wrong.append(f"{body} was taken, or refused in another shape")

    async def _raw(self, _: openai.AsyncOpenAI, chance: random.Random) -> None:
        host, port = re.findall(r"//([^:/]+):(\d+)", self._url)[0]
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(chance.choice(RAW))
        with suppress(OSError, TimeoutError):
            await writer.drain()
            await asyncio.wait_for(reader.read(4096), chance.uniform(0.01, 1))
        writer.close()
        self.verdicts["raw"] += 1


def right_texts(pair: Pair) -> dict[tuple[bool, int, int], str]:
    """(chat?, question, way) -> what the target writes alone."""
    return {
        (chat, number, way): pair.generate(
            [{"role": "user", "content": question}] if chat else question, gamma=0, max_new_tokens=LONGEST,
            use_chat_template=chat, ignore_eos=True, **options,
        )
        for chat in (True, False) for number, question in enumerate(QUESTIONS) for way, options in enumerate(WAYS)
    }  # fmt: skip


def serve_campaign(
    folder: Path, models: dict[str, Path], figures: dict[str, Any], mark: dict[str, str], *, minutes: float,
    clients: int, seed: int, kills: int = 0, curve: Path | None = None,
) -> None:  # fmt: skip
    """Run it and fill in the figures. kills: so many of the workers are killed meanwhile and started again."""
    (folder / "keys").write_text("\n".join(KEYS) + "\n")
    with ExitStack() as stack:
        tokenizer = TextCodec.load(models["target"]).tokenizer
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        tokenizer.save_pretrained(folder / "tokenizer")
        # The context is longer than the longest prompt and text, and shorter than the bad one.
        workers = {role: WorkerProcess(role, models[role], folder, max_context=1024) for role in models}
        for worker in workers.values():
            stack.callback(worker.close)
        with connect(workers["target"].address, tokenizer=folder / "tokenizer") as pair:
            right = right_texts(pair)
        arguments = ["serve", "--port", "0", "--api-key-file", folder / "keys", "--served-model-name", "simulated"]
        for role, worker in workers.items():
            arguments += [f"--{role}-addr", worker.address]
        arguments += ["--tokenizer", folder / "tokenizer", "--gamma", "3", "--recovery-timeout-s", "20"]
        log = folder / "serve.log"
        server = start_command(*arguments, log=log, environment=mark)
        stack.callback(server.kill)
        assert wait_until(lambda: log.exists() and "serving at" in log.read_text(), 60), log.read_text()
        url = log.read_text().split("serving at ")[1].split()[0]
        load = Load(url, "simulated", right, seed)
        samples: list[tuple[float, ...]] = []
        began = time.monotonic()
        assert server.pid is not None
        serving = psutil.Process(server.pid)

        async def sample() -> None:
            while True:
                processes = [serving, *(psutil.Process(worker.pid) for worker in workers.values())]
                with suppress(psutil.Error):
                    memory = [process.memory_info().rss / 2**20 for process in processes]
                    samples.append((time.monotonic() - began, *memory, serving.num_fds(), serving.num_threads()))
                await asyncio.sleep(1.0)

        async def kill_some() -> None:
            killer = random.Random(seed + 1)
            for _ in range(kills):
                await asyncio.sleep(killer.uniform(0.5, 1.5) * minutes * 60 / (kills + 1))
                await asyncio.to_thread(workers[killer.choice(list(workers))].restart)

        async def everything() -> None:
            side = [asyncio.create_task(sample()), asyncio.create_task(kill_some())]
            await asyncio.gather(*(load.client(number, began + minutes * 60) for number in range(clients)))
            for task in side:
                task.cancel()

        asyncio.run(everything())
        samples.append((time.monotonic() - began, *samples[-1][1:]))
        after: Counter[str] = Counter()

        async def afterwards() -> None:
            """As many texts at once as there are places: none is taken for in use by a client that is gone."""
            async with openai.AsyncOpenAI(base_url=url, api_key=KEYS[0], max_retries=0, timeout=60) as api:
                again = Load(url, "simulated", right, seed)
                await asyncio.gather(*(again._text(api, random.Random(i)) for i in range(8)))
                after.update(again.verdicts)

        asyncio.run(afterwards())
        server.terminate()
        server.join(60)
        figures |= {"clients": clients, "kills": kills, "requests": dict(load.verdicts), "afterwards": dict(after)}
        figures |= {"slowest_s": round(load.slowest_s, 1), "exit_status": server.exitcode, "wrong": load.wrong[:5]}
        figures["log"] = log.read_text().splitlines()[1:][-20:]
    table = np.array(samples)
    names = ("server", *workers, "server_files", "server_threads")
    third = table[table[:, 0] > table[-1, 0] / 3]
    at = table[-1, 0] * np.array([0.1, 0.33, 0.67, 1])
    figures["memory_mib"] = {
        name: [round(float(value), 1) for value in np.interp(at, table[:, 0], table[:, i])]
        for i, name in enumerate(names, start=1)
    }
    slopes = [np.polyfit(third[:, 0] / 60, third[:, i], 1)[0] for i in range(1, len(names) + 1)]
    figures["per_minute"] = {name: round(float(slope), 3) for name, slope in zip(names, slopes, strict=True)}
    if curve is not None:
        curve.write_text("\n".join(",".join(f"{value:.2f}" for value in row) for row in samples) + "\n")
    failed = {} if kills else {name for name in load.verdicts if name.startswith(("status_", "error"))}
    figures["ok"] = not (load.wrong or failed or set(after) - {"right"})
