"""`specsplit serve` under a load client from PyPI, llama-benchy, as other servers with OpenAI's API are measured.

The client takes its prompts from a book; here that is the text of the prompts of the dataset, from a server of our own,
so nothing is downloaded. It sends `clients` requests at once, waits for all of them, and begins anew.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from specsplit.errors import RunError, UserError
from specsplit.io import write_json
from specsplit.launch.process import end_process
from specsplit.settings.run import OrchestratorConfig
from specsplit.settings.serve import ServeSettings

CLIENT = "llama-benchy"
MODEL = "specsplit"  # what the server is told to call it
INSTALL = (
    f"the load client {CLIENT} or the server is not installed: pip install 'specsplit[load]', in the folder of the "
    "project .venv/bin/pip install -c envs/constraints.txt -e '.[load]'"
)
# Of the settings of a run, what a request says itself.
_OF_REQUEST = {"max_output_tokens", "max_rounds", "stop", "stop_token_ids", "ignore_eos", "seed", "use_chat_template"}
_EVENTS = ("request_start", "request_end", "request_first_token")
_COUNTS = ("vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_accepted_tokens_total")
START_S, STOP_S, POLL_S = 120.0, 30.0, 0.1


@dataclass(frozen=True)
class LoadRow:
    """One gamma and number of clients: one row of `openai_load.csv`, from the events that the client tells.

    requests: sent after one batch to warm up. tokens_per_second: tokens of all of them, over the time from the first
    request of each batch to its last end, prompts included. tpot_ms: of a request, its time after the first token over
    its tokens but one. acceptance_length: as the server counts it, the warm-up included. gain: tokens_per_second over
    that of gamma 0 with as many clients; other prompts were drawn, so it is not paired.
    """

    gamma: int | str
    mode: str
    clients: int
    requests: int
    prompt_tokens: int
    output_tokens: int
    tokens_per_second: float
    gain: float | None
    ttft_ms_median: float
    ttft_ms_max: float
    tpot_ms_median: float | None
    tpot_ms_max: float | None
    acceptance_length: float | None
    client: str


def client_version() -> str:
    """Name and version of the client. Raises UserError that says how to install it, or the server, where one lacks."""
    try:
        for package in ("starlette", "uvicorn"):
            metadata.version(package)
        return f"{CLIENT} {metadata.version(CLIENT)}"
    except metadata.PackageNotFoundError:
        raise UserError(INSTALL) from None


def measure_openai_load(
    configs: Sequence[OrchestratorConfig],
    clients: Sequence[int],
    *,
    tokenizer: Path,
    book: str,
    prompt_tokens: int,
    requests: int,
) -> Iterator[LoadRow]:
    """A row for each configuration and number of clients.

    configs: with the addresses of the workers, gamma 0 first; config.max_output_tokens is the length of every text.
    tokenizer: folder with a tokenizer.json. book: at least prompt_tokens + 1 tokens. requests: at least so many at each
    load. Raises UserError when the client is not installed, RunError with its last words when it or the server fails.
    """
    version = client_version()
    alone: dict[int, float] = {}
    with TemporaryDirectory() as folder, _book(book, Path(folder) / "book") as book_url:
        for config in configs:
            with _server(config, max(clients), Path(folder)) as url:
                for number in clients:
                    before = _counters(url)
                    events = _run_client(
                        *("--base-url", f"{url}/v1", "--book-url", book_url, "--tokenizer", str(tokenizer)),
                        *("--model", MODEL, "--concurrency", str(number), "--runs", str(-(-requests // number))),
                        *("--pp", str(prompt_tokens), "--tg", str(config.max_output_tokens), "--exact-tg"),
                        home=Path(folder),
                    )
                    measured = measured_load(events)
                    if config.gamma == 0:
                        alone[number] = measured["tokens_per_second"]
                    yield LoadRow(
                        gamma=config.gamma,
                        mode=config.mode,
                        clients=number,
                        prompt_tokens=prompt_tokens,
                        output_tokens=config.max_output_tokens,
                        gain=measured["tokens_per_second"] / alone[number] if number in alone else None,
                        acceptance_length=_acceptance(before, _counters(url)),
                        client=version,
                        **measured,
                    )


def measured_load(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The measured columns of a row. events: of `--emit-progress`, schema llama-benchy-progress.v1.

    Raises RunError when no request was told.
    """
    starts, ends, ttfts = ({e["request_id"]: e for e in events if e["type"] == kind} for kind in _EVENTS)
    batches: dict[int, list[int]] = {}
    for request, start in starts.items():
        if request in ends:
            batches.setdefault(start["run_index"], []).append(request)
    if not ttfts or not batches:
        raise RunError(f"{CLIENT} told of no request that got a token")
    took_s = sum(max(ends[r]["ts"] for r in own) - min(starts[r]["ts"] for r in own) for own in batches.values())
    first_ms = [1e3 * event["ttft_s"] for event in ttfts.values()]
    token_ms = [1e3 * e["decode_seconds"] / (e["total_tokens"] - 1) for e in ends.values() if e["total_tokens"] > 1]
    return {
        "requests": sum(map(len, batches.values())),
        "tokens_per_second": sum(event["total_tokens"] for event in ends.values()) / took_s,
        "ttft_ms_median": median(first_ms),
        "ttft_ms_max": max(first_ms),
        "tpot_ms_median": median(token_ms) if token_ms else None,
        "tpot_ms_max": max(token_ms, default=None),
    }


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


@contextmanager
def _book(text: str, folder: Path) -> Iterator[str]:
    """The address of the text, which a server of our own has in `folder`, where nothing else may be."""
    folder.mkdir()
    (folder / "book.txt").write_text(text, encoding="utf-8")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/book.txt"
        finally:
            server.shutdown()


@contextmanager
def _server(config: OrchestratorConfig, at_once: int, folder: Path) -> Iterator[str]:
    """The address of `specsplit serve` with these settings, in a process that ends with the block."""
    settings = config.model_dump(mode="json", exclude=_OF_REQUEST | {"draft_name"})
    write_json(
        folder / "serve.json", {"run": {**settings, "port": 0, "max_running": at_once, "served_model_name": MODEL}}
    )
    errors = folder / "serve.log"
    with (
        errors.open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-m", "specsplit", "serve", "--settings", str(folder / "serve.json")],
            # Keys, certificates and limits of another server are not meant for this one.
            env={name: value for name, value in os.environ.items() if not name.startswith(ServeSettings.prefix)},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        late = threading.Timer(START_S, process.kill)
        late.start()
        try:
            assert process.stdout is not None
            found = re.search(r"serving at (\S+)/v1", process.stdout.readline())
            while found and process.poll() is None and not _answers(f"{found[1]}/health"):
                time.sleep(POLL_S)
            late.cancel()
            if found is None or process.poll() is not None:
                raise RunError(f"specsplit serve did not start: {_last_words(errors.read_text(errors='replace'))}")
            yield found[1]
        finally:
            late.cancel()
            end_process(process, STOP_S)


def _run_client(*flags: str, home: Path) -> list[dict[str, Any]]:
    """The events of one run of the client. home: for the book that it keeps."""
    told = home / "events.jsonl"
    here = ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1")))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "llama_benchy", *flags),
            *("--skip-coherence", "--exit-on-first-fail", "--emit-progress", str(told)),
        ],
        env={**os.environ, "HOME": str(home), "HF_HUB_OFFLINE": "1", "NO_PROXY": here, "no_proxy": here},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise RunError(f"{CLIENT} failed with exit status {done.returncode}: {_last_words(done.stdout)}")
    return [json.loads(line) for line in told.read_text(encoding="utf-8").splitlines()]


def _counters(url: str) -> list[float]:
    """Drafts and accepted tokens so far, as `/metrics` of the server has them."""
    text = _get(f"{url}/metrics")
    return [sum(float(found) for found in re.findall(rf"^{name}\S* (\S+)", text, re.MULTILINE)) for name in _COUNTS]


def _get(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # here, whatever http_proxy says
    with opener.open(url, timeout=STOP_S) as reply:
        text: str = reply.read().decode()
    return text


def _answers(url: str) -> bool:
    try:
        _get(url)
    except OSError:
        return False
    return True


def _acceptance(before: Sequence[float], after: Sequence[float]) -> float | None:
    drafts, accepted = (new - old for old, new in zip(before, after, strict=True))
    return 1 + accepted / drafts if drafts else None


def _last_words(text: str) -> str:
    return " ".join(text.split())[-600:] or "it said nothing"
