"""Runs prompts through the loop at one gamma and leaves a run folder: tables, texts, and how they were made.

A run folder holds `requests.csv`, `per_round.csv`, `outputs.jsonl` and `run.json`. While the run goes on, and when it
fails, the rows so far are in `*.part` files; the final names appear only when every request is done.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import specsplit
from specsplit.bench.dataset import Prompt
from specsplit.bench.metrics import REQUEST_COLUMNS, ROUND_COLUMNS, RequestRecord, RoundRecord
from specsplit.config import OrchestratorConfig
from specsplit.decoding.adaptive import GammaController
from specsplit.errors import UserError
from specsplit.hashing import combined_sha256
from specsplit.jsonio import write_json
from specsplit.models.text import TextCodec
from specsplit.provenance.capture import (
    capture_environment,
    capture_machine,
    capture_software,
    hash_run_code,
    hash_tree,
    utc_now,
)
from specsplit.provenance.git import capture_git
from specsplit.provenance.gpu import GpuSampler, capture_gpu
from specsplit.provenance.redaction import redact, redact_arguments
from specsplit.provenance.steps import workflow_command
from specsplit.workers.access import Access
from specsplit.workers.endpoint import description_dict
from specsplit.workers.orchestrator.connection import Connection
from specsplit.workers.orchestrator.pipeline import TextWriter
from specsplit.workers.orchestrator.result import SpeculativeResult

RUN_SCHEMA_VERSION = 2
PACKAGE = Path(specsplit.__file__).parent
TABLES = ("requests.csv", "per_round.csv", "outputs.jsonl")


@dataclass(frozen=True)
class Request:
    """A prompt as the models get it."""

    id: str
    category: str
    token_ids: list[int]


def encode_prompts(prompts: Sequence[Prompt], codec: TextCodec, *, chat: bool, limit: int) -> list[Request]:
    """Token ids of every prompt. Raises UserError that names the prompts of `limit` tokens or more, before any
    work is done."""
    requests = [Request(p.id, p.category, codec.encode(p.prompt, use_chat_template=chat)) for p in prompts]
    long = [f"{r.id} ({len(r.token_ids)} tokens)" for r in requests if len(r.token_ids) >= limit]
    if long:
        raise UserError(
            f"{len(long)} prompts do not fit into the target's context of {limit} tokens: {', '.join(long[:5])}. "
            f"Shorten them or raise workers.max_context."
        )
    return requests


def run_requests(
    requests: Sequence[Request],
    draft: Connection | None,
    target: Connection,
    codec: TextCodec,
    config: OrchestratorConfig,
    run_dir: Path,
    *,
    warmup: int = 1,
    repeats: int = 1,
    inputs: dict[str, Any] | None = None,
    origins: Mapping[str, Mapping[str, Any]] | None = None,
    on_done: Callable[[RequestRecord], None] = lambda record: None,
) -> None:
    """One run: every request in order, as the configuration says, and all of them `repeats` times; writes `run_dir`.

    draft: may be None when gamma is 0. config.seed: each text gets a seed of its own, from it and the request's id.
    warmup: requests run first and not recorded. repeats: a request has the same seed each time.
    inputs: what run.json says of files read (path, sha256).
    origins: what it says of each role's worker beside Describe's reply, as worker_origin gives it.
    on_done: called after each request. Raises WorkerError; then run.json holds the error and exit_code 1.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in (*TABLES, *(f"{table}.part" for table in TABLES), "run.json"):
        (run_dir / name).unlink(missing_ok=True)  # of an earlier run: a folder never mixes two
    gpu_before = capture_gpu()
    run = _describe_run(draft, target, codec, config, warmup, repeats, inputs or {}, origins or {})
    controller = None
    if config.max_draft_tokens == "auto":
        controller = GammaController(config.mode, config.gamma_limit, fan_out=config.fan_out)
    sampler = GpuSampler()

    def end(code: int, error: str | None) -> None:
        finished = {"finished": utc_now(), "exit_code": code, "error": error}
        gpu = {"before": gpu_before, "after": capture_gpu(), "samples": sampler.samples}
        write_json(run_dir / "run.json", redact({**run, **finished, "gpu": gpu}))

    try:
        with sampler, TextWriter(draft.address if draft else None, target.address, access=Access.of(config)) as writer:

            def write(request: Request) -> tuple[OrchestratorConfig, SpeculativeResult]:
                own = config.model_copy(update={"seed": request_seed(config.seed, request.id)})
                return own, writer.write(request.token_ids, own, controller=controller)

            for i in range(warmup):
                write(requests[i % len(requests)])
            _write_rows(requests, repeats, write, codec, run_dir, on_done)
    except BaseException as error:
        end(1, str(error) if isinstance(error, UserError) else repr(error))
        raise
    end(0, None)


def request_seed(seed: int, request_id: str) -> int:
    """The 32-bit seed of one text, from the run's and the request's id: other prompts do not change it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{request_id}".encode()).digest()[:4], "big")


def _write_rows(
    requests: Sequence[Request],
    repeats: int,
    write: Callable[[Request], tuple[OrchestratorConfig, SpeculativeResult]],
    codec: TextCodec,
    run_dir: Path,
    on_done: Callable[[RequestRecord], None],
) -> None:
    with ExitStack() as stack:
        files = [
            stack.enter_context((run_dir / f"{name}.part").open("w", encoding="utf-8", newline="")) for name in TABLES
        ]
        request_rows = csv.DictWriter(files[0], REQUEST_COLUMNS, lineterminator="\n")
        round_rows = csv.DictWriter(files[1], ROUND_COLUMNS, lineterminator="\n")
        request_rows.writeheader()
        round_rows.writeheader()
        # All requests, then all again: what drifts in the course of a run is spread over every request.
        for repeat, request in product(range(1, repeats + 1), requests):
            config, result = write(request)
            record = request_record(request, result, config, repeat)
            request_rows.writerow(asdict(record))
            round_rows.writerows(asdict(row) for row in round_records(request.id, result, config, repeat))
            output = {
                "request_id": request.id,
                "repeat": repeat,
                "finish_reason": result.finish_reason,
                "text": codec.decode(result.output_tokens),
                "token_ids": result.output_tokens,
            }
            files[2].write(json.dumps(output, ensure_ascii=False) + "\n")
            for file in files:
                file.flush()
            on_done(record)
    for name in TABLES:
        (run_dir / f"{name}.part").replace(run_dir / name)


def round_records(
    request_id: str, result: SpeculativeResult, config: OrchestratorConfig, repeat: int = 1
) -> list[RoundRecord]:
    """The rows of `per_round.csv` of one finished text."""
    gamma = config.max_draft_tokens
    return [RoundRecord(request_id=request_id, gamma=gamma, repeat=repeat, **asdict(row)) for row in result.rounds]


def request_record(
    request: Request, result: SpeculativeResult, config: OrchestratorConfig, repeat: int = 1
) -> RequestRecord:
    """The row of `requests.csv` of one finished text.

    average_acceptance_rate is the mean over the rounds that drafted something; None when none did.
    mean_accepted_length is the mean number of tokens a round added: accepted ones and the target's own.
    itl_ms is the time after the first round over the tokens of the later rounds; None when there were none. (tpot_ms
    divides the same time by all tokens but one, so it counts the rest of the first round as if it took no time.)
    """
    rounds, generated = result.rounds, len(result.output_tokens)
    rates = [r.accepted / r.drafted for r in rounds if r.drafted]
    idle = sum(r.network_ms for r in rounds)
    tpot, itl = None, None
    if generated > 1 and result.ttft_ms is not None:
        tpot = (result.total_ms - result.ttft_ms) / (generated - 1)
        later = generated - (rounds[0].accepted + 1)
        itl = (result.total_ms - result.ttft_ms) / later if later > 0 else None
    return RequestRecord(
        request_id=request.id,
        gamma=config.max_draft_tokens,
        prompt_length=len(request.token_ids),
        generated_tokens=generated,
        ttft_ms=result.ttft_ms,
        tpot_ms=tpot,
        average_acceptance_rate=sum(rates) / len(rates) if rates else None,
        total_network_idle_ms=idle,
        total_latency_ms=result.total_ms,
        num_rounds=len(rounds),
        category=request.category,
        finish_reason=result.finish_reason,
        drafted_tokens=sum(r.drafted for r in rounds),
        accepted_tokens=sum(r.accepted for r in rounds),
        mean_accepted_length=sum(r.accepted + 1 for r in rounds) / len(rounds),
        network_idle_fraction=idle / result.total_ms,
        draft_compute_ms=sum(r.draft_compute_ms for r in rounds),
        target_compute_ms=sum(r.verify_compute_ms for r in rounds),
        mode=config.mode,
        tree=config.tree,
        draft=config.draft_name,
        sampling=config.sampling,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        rtt_ms=config.rtt_ms,
        jitter_ms=config.jitter_ms,
        seed=config.seed,
        speculation_hits=result.speculation_hits,
        speculation_misses=result.speculation_misses,
        output_sha256=hashlib.sha256(json.dumps(result.output_tokens).encode()).hexdigest(),
        itl_ms=itl,
        repeat=repeat,
    )


def _describe_run(
    draft: Connection | None,
    target: Connection,
    codec: TextCodec,
    config: OrchestratorConfig,
    warmup: int,
    repeats: int,
    inputs: dict[str, Any],
    origins: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    argv = redact_arguments(["specsplit", *sys.argv[1:]])
    workers = {
        c.role: {"address": c.address, **origins.get(c.role, {}), **description_dict(c.description)}
        for c in (draft, target)
        if c
    }
    source_files = hash_tree(PACKAGE)
    return {
        "schema_version": RUN_SCHEMA_VERSION,
        "command": shlex.join(argv),
        "argv": argv,
        "workflow": workflow_command(),
        "started": utc_now(),
        "gamma": config.max_draft_tokens,
        "seeds": {
            "orchestrator": config.seed,
            **{f"{role}_worker": int(w["runtime"]["seed"]) for role, w in workers.items() if "seed" in w["runtime"]},
        },
        "warmup_requests": warmup,
        "repeats": repeats,
        "orchestrator": config.model_dump(mode="json"),
        "workers": workers,
        "inputs": inputs,
        "tokenizer_sha256": codec.sha256,
        "machine": capture_machine(),
        "environment": capture_environment(),
        "software_sha256": capture_software()["sha256"],
        "specsplit_version": specsplit.__version__,
        "source_sha256": combined_sha256(source_files),
        "run_code_sha256": hash_run_code(source_files),
        "git": capture_git(PACKAGE),
    }
