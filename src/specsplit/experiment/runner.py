"""Runs prompts through the loop at one gamma and leaves a run folder: tables, texts, and how they were made.

A run folder holds `requests.csv`, `per_round.csv`, `outputs.jsonl` and `run.json`. While the run goes on, and when it
is cut short, what is done is in its journal, and the next run with the same settings goes on with that; the tables
appear only when every request is done. A request that fails is a row too, and stays in the journal to be tried again.
"""

from __future__ import annotations

import csv
import io
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import specsplit
from specsplit.client.pipeline import TextWriter
from specsplit.client.result import SpeculativeResult
from specsplit.decoding.adaptive import GammaController
from specsplit.errors import UserError, WorkerError
from specsplit.experiment.columns import FAILED, OK, REQUEST_COLUMNS, ROUND_COLUMNS, RequestRecord
from specsplit.experiment.dataset import Prompt
from specsplit.experiment.journal import Entry, Journal
from specsplit.experiment.records import Request, request_record, request_seed, round_records
from specsplit.io import combined_sha256, json_sha256, write_json
from specsplit.launch.endpoint import description_dict
from specsplit.models.tokenizer import TextCodec
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
from specsplit.rpc.connection import Connection
from specsplit.rpc.credentials import Access
from specsplit.settings.run import OrchestratorConfig

RUN_SCHEMA_VERSION = 2
PACKAGE = Path(specsplit.__file__).parent
TABLES = ("requests.csv", "per_round.csv", "outputs.jsonl")


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
    resume: bool = True,
    on_kept: Callable[[int], None] = lambda count: None,
    on_done: Callable[[RequestRecord], None] = lambda record: None,
) -> None:
    """One run: every request in order, as the configuration says, and all of them `repeats` times; writes `run_dir`.

    What the journal of an earlier run with the same settings holds is not measured again, but for requests that failed.
    A request that fails is a row with its reason. The run itself fails when a worker does not answer before a text
    has begun, or when every request failed.

    draft: may be None when gamma is 0. config.seed: each text gets a seed of its own, from it and the request's id.
    warmup: requests run first and not recorded. repeats: a request has the same seed each time.
    inputs: what run.json says of files read (path, sha256).
    origins: what it says of each role's worker beside Describe's reply, as worker_origin gives it.
    resume: False forgets what an earlier run left. on_kept: gets the number of rows that are there already.
    on_done: called after each request. Raises WorkerError and UserError; then run.json holds the error and exit_code 1.
    """
    gpu_before = capture_gpu()
    run = _describe_run(draft, target, codec, config, warmup, repeats, inputs or {}, origins or {})
    sampler = GpuSampler()
    plan = list(product(range(1, repeats + 1), requests))
    with Journal(run_dir, _what_decides(run, requests), resume=resume) as journal:
        for name in (*TABLES, "run.json"):
            (run_dir / name).unlink(missing_ok=True)  # of an earlier run: a folder never mixes two
        kept = [(repeat, request) for repeat, request in plan if _done(journal, repeat, request)]
        on_kept(len(kept))

        def end(code: int, error: str | None) -> None:
            entries = [entry for repeat, request in plan if (entry := journal.get((repeat, request.id)))]
            failed = sum(entry.request.status == FAILED for entry in entries)
            finished = {
                "finished": utc_now(),
                "exit_code": code,
                "error": error,
                "requests": {"planned": len(plan), OK: len(entries) - failed, FAILED: failed, "kept": len(kept)},
                "attempts": journal.attempts,
            }
            gpu = {"before": gpu_before, "after": capture_gpu(), "samples": sampler.samples}
            write_json(run_dir / "run.json", redact({**run, **finished, "gpu": gpu}))

        try:
            with sampler:
                _measure(plan, draft, target, codec, config, journal, warmup, on_done)
            _write_tables(plan, journal, run_dir)
        except BaseException as error:
            end(1, str(error) if isinstance(error, UserError) else repr(error))
            raise
        end(0, None)
        if all(_done(journal, repeat, request) for repeat, request in plan):
            journal.remove()


Turn = tuple[int, Request]  # which repeat


def _done(journal: Journal, repeat: int, request: Request) -> bool:
    entry = journal.get((repeat, request.id))
    return entry is not None and entry.request.status == OK


def _measure(
    plan: Sequence[Turn],
    draft: Connection | None,
    target: Connection,
    codec: TextCodec,
    config: OrchestratorConfig,
    journal: Journal,
    warmup: int,
    on_done: Callable[[RequestRecord], None],
) -> None:
    """Run what the journal does not have, in order; then what failed before."""
    left = [turn for turn in plan if not _done(journal, *turn)]
    left.sort(key=lambda turn: journal.get((turn[0], turn[1].id)) is not None)
    if not left:
        return
    controller = None
    if config.gamma == "auto":
        controller = GammaController(config.mode, config.gamma_limit, fan_out=config.fan_out)
    known = {c.role: c.description for c in (draft, target) if c}
    with TextWriter(draft.address if draft else None, target.address, known, access=Access.of(config)) as writer:
        for i in range(warmup):
            request = left[i % len(left)][1]
            writer.write(request.token_ids, _own(config, request), controller=controller)
        for repeat, request in left:
            own = _own(config, request)
            error = None
            try:
                result = writer.write(request.token_ids, own, controller=controller, request_id=request.id)
            except WorkerError as failure:
                # Without a text the worker cannot be reached at all; the next request would fare no better.
                if failure.result is None:
                    raise
                result, error = failure.result, failure
            entry = _entry(request, result, own, repeat, codec, error)
            journal.add(entry)
            on_done(entry.request)


def _own(config: OrchestratorConfig, request: Request) -> OrchestratorConfig:
    return config.model_copy(update={"seed": request_seed(config.seed, request.id)})


def _entry(
    request: Request,
    result: SpeculativeResult,
    config: OrchestratorConfig,
    repeat: int,
    codec: TextCodec,
    error: WorkerError | None,
) -> Entry:
    record = request_record(request, result, config, repeat, error)
    output = {
        "request_id": request.id,
        "repeat": repeat,
        "finish_reason": record.finish_reason,
        "text": codec.decode(result.output_tokens),
        "token_ids": result.output_tokens,
        "status": record.status,
    }
    return Entry(record, round_records(request.id, result, config, repeat), output)


def _write_tables(plan: Sequence[Turn], journal: Journal, run_dir: Path) -> None:
    """The tables of a run whose requests all ended. Raises UserError when every one failed."""
    entries = [entry for repeat, request in plan if (entry := journal.get((repeat, request.id)))]
    if entries and all(entry.request.status == FAILED for entry in entries):
        raise UserError(f"every request failed, the first one with: {entries[0].request.error_message}")
    requests, rounds, outputs = io.StringIO(), io.StringIO(), io.StringIO()
    for file, columns, rows in (
        (requests, REQUEST_COLUMNS, [entry.request for entry in entries]),
        (rounds, ROUND_COLUMNS, [row for entry in entries for row in entry.rounds]),
    ):
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(asdict(row) for row in rows)
    for entry in entries:
        outputs.write(json.dumps(entry.output, ensure_ascii=False) + "\n")
    for name, content in zip(TABLES, (requests, rounds, outputs), strict=True):
        part = run_dir / f".{name}.part"
        part.write_text(content.getvalue(), encoding="utf-8", newline="")
        part.replace(run_dir / name)


_WORKER_OPERATION = ("address", "pid", "attached", "process_started", "log", "reason")


def _what_decides(run: Mapping[str, Any], requests: Sequence[Request]) -> dict[str, Any]:
    """The settings that the rows of one run share: those of another run with the same ones may stand beside them."""
    operates = OrchestratorConfig.operating()
    workers = {
        role: {key: value for key, value in worker.items() if key not in _WORKER_OPERATION}
        for role, worker in run["workers"].items()
    }
    return {
        "requests_sha256": json_sha256([[r.id, r.category, r.token_ids] for r in requests]),
        "orchestrator": {key: value for key, value in run["orchestrator"].items() if key not in operates},
        "workers": workers,
        **{key: run[key] for key in ("repeats", "warmup_requests", "tokenizer_sha256", "machine", "environment")},
        **{key: run[key] for key in ("software_sha256", "run_code_sha256")},
    }


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
        "gamma": config.gamma,
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
