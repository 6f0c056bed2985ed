"""Runs prompts through the loop at one gamma and leaves a run folder: tables, texts, and how they were made.

A run folder holds `requests.csv`, `per_round.csv`, `outputs.jsonl` and `run.json`. While the run goes on, and when it
is cut short, what is done is in its journal, and the next run with the same settings goes on with that; the tables
appear only when every request is done. A request that fails is a row too, and stays in the journal to be tried again.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import specsplit
from specsplit.client.pipeline import TextWriter
from specsplit.errors import PromptError, RunError, UserError, WorkerError
from specsplit.experiment.columns import FAILED, OK, RequestRecord, RoundRecord
from specsplit.experiment.dataset import Prompt
from specsplit.experiment.journal import Entry, Journal
from specsplit.experiment.records import Request, gamma_controller, request_config, request_record, round_records
from specsplit.experiment.rows import writing_rows
from specsplit.io import combined_sha256, json_sha256, replace_file, write_json
from specsplit.launch.endpoint import description_dict
from specsplit.models.tokenizer import TextCodec, cut_at_stop, stops_at
from specsplit.provenance.capture import (
    capture_environment,
    capture_machine,
    capture_software,
    hash_tree,
    utc_now,
)
from specsplit.provenance.closure import PACKAGE, code_sha256
from specsplit.provenance.git import capture_git
from specsplit.provenance.gpu import GpuSampler, capture_gpu
from specsplit.provenance.redaction import redact, redact_arguments
from specsplit.provenance.steps import workflow_command
from specsplit.rpc.connection import Connection
from specsplit.rpc.credentials import Access
from specsplit.settings.run import OrchestratorConfig

RUN_SCHEMA_VERSION = 2
TABLES = ("requests.csv", "per_round.csv", "outputs.jsonl")


def encode_prompts(
    prompts: Sequence[Prompt], codec: TextCodec, *, chat: bool, limit: int, raisable: bool = True
) -> list[Request]:
    """Token ids of every prompt. Raises UserError that names the prompts of `limit` tokens or more, or the one that the
    tokenizer does not take, before any work is done. raisable: the limit is a setting, not the model's own."""
    requests = []
    for prompt in prompts:
        try:
            token_ids = codec.encode(prompt.prompt, use_chat_template=chat)
        except PromptError as error:
            raise PromptError(f"prompt {prompt.id}: {error}") from error
        requests.append(Request(prompt.id, prompt.category, token_ids))
    long = [f"{r.id} ({len(r.token_ids)} tokens)" for r in requests if len(r.token_ids) >= limit]
    if long:
        raise UserError(
            f"{len(long)} prompts do not fit into the target's context of {limit} tokens: {', '.join(long[:5])}. "
            + ("Shorten them or raise workers.max_context." if raisable else "Shorten them: the model has no more.")
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
        left = [turn for turn in plan if not _done(journal, turn)]
        left.sort(key=lambda turn: _entry(journal, turn) is not None)  # what failed before comes last
        kept = len(plan) - len(left)
        on_kept(kept)

        def end(code: int, error: str | None) -> None:
            entries = [entry for turn in plan if (entry := _entry(journal, turn))]
            failed = sum(entry.request.status == FAILED for entry in entries)
            finished = {
                "finished": utc_now(),
                "exit_code": code,
                "error": error,
                "requests": {"planned": len(plan), OK: len(entries) - failed, FAILED: failed, "kept": kept},
                "attempts": journal.attempts,
            }
            gpu = {"before": gpu_before, "after": capture_gpu(), "samples": sampler.samples}
            write_json(run_dir / "run.json", redact({**run, **finished, "gpu": gpu}))

        try:
            with sampler:
                for measured in _measure(left, draft, target, codec, config, warmup) if left else ():
                    journal.add(measured)
                    on_done(measured.request)
            _write_tables([entry for turn in plan if (entry := _entry(journal, turn))], run_dir)
        except BaseException as error:
            end(1, str(error) if isinstance(error, UserError) else repr(error))
            raise
        end(0, None)
        if all(_done(journal, turn) for turn in plan):
            journal.remove()


Turn = tuple[int, Request]  # which repeat


def _entry(journal: Journal, turn: Turn) -> Entry | None:
    return journal.get((turn[0], turn[1].id))


def _done(journal: Journal, turn: Turn) -> bool:
    entry = _entry(journal, turn)
    return entry is not None and entry.request.status == OK


def _measure(
    turns: Sequence[Turn],
    draft: Connection | None,
    target: Connection,
    codec: TextCodec,
    config: OrchestratorConfig,
    warmup: int,
) -> Iterator[Entry]:
    """Run these requests, at least one, in order."""
    controller = gamma_controller(config)
    descriptions = {c.role: c.description for c in (draft, target) if c}
    access = Access.of(config)
    with TextWriter(draft.address if draft else None, target.address, descriptions, access=access) as writer:
        for _, request in islice(cycle(turns), warmup):
            writer.write(request.token_ids, request_config(config, request.id), controller=controller)
        for repeat, request in turns:
            own = request_config(config, request.id)
            error = None
            try:
                stops = stops_at(codec, config.stop)
                result = writer.write(
                    request.token_ids, own, on_tokens=stops, controller=controller, request_id=request.id
                )
            except WorkerError as failure:
                # Without a text the worker cannot be reached at all; the next request would fare no better.
                if failure.result is None:
                    raise
                result, error = failure.result, failure
            record = request_record(request, result, own, repeat, error)
            output = {
                "request_id": request.id,
                "repeat": repeat,
                "finish_reason": record.finish_reason,
                "text": cut_at_stop(codec.decode(result.output_tokens), config.stop),
                "token_ids": result.output_tokens,
                "status": record.status,
            }
            yield Entry(record, round_records(request.id, result, own, repeat), output)


def _write_tables(entries: Sequence[Entry], run_dir: Path) -> None:
    """The tables of a run whose requests all ended. Raises UserError when every one failed."""
    if entries and all(entry.request.status == FAILED for entry in entries):
        raise RunError(f"every request failed, the first one with: {entries[0].request.error_message}")
    with writing_rows(run_dir / "requests.csv", RequestRecord) as write:
        for entry in entries:
            write(entry.request)
    with writing_rows(run_dir / "per_round.csv", RoundRecord) as write:
        for entry in entries:
            for row in entry.rounds:
                write(row)
    outputs = "".join(json.dumps(entry.output, ensure_ascii=False) + "\n" for entry in entries)
    replace_file(run_dir / "outputs.jsonl", outputs)


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
        "run_code_sha256": code_sha256("bench"),
        "git": capture_git(PACKAGE),
    }
