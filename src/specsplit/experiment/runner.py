"""Runs prompts through the loop at one gamma and leaves a run folder: tables, texts, and how they were made.

A run folder holds `requests.csv`, `per_round.csv`, `outputs.jsonl` and `run.json`, and as `reference.csv` what was
measured in turn with them on the same request: the target alone and other baselines. What drifts on the machine meets
all of a turn alike, so speedups are paired within the run. While the run goes on, and when it is cut short, what is
done is in its journal, and the next run with the same settings goes on with that; the tables appear only when every
request is done. A request that fails is a row too, and stays in the journal to be tried again.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import specsplit
from specsplit.client.result import SpeculativeResult
from specsplit.client.text import OnTokens
from specsplit.client.writer import TextWriter
from specsplit.decoding.adaptive import GammaController
from specsplit.errors import RunError, UserError, WorkerError
from specsplit.experiment.baselines import Beside, Contender
from specsplit.experiment.columns import FAILED, OK, WORKERS, ReferenceRecord, RequestRecord, RoundRecord
from specsplit.experiment.journal import Entry, Journal
from specsplit.experiment.prompt import Prompt
from specsplit.experiment.prompt_tokens import later_turn_tokens, prompt_tokens
from specsplit.experiment.records import Request, gamma_controller, request_config, request_record, round_records
from specsplit.experiment.rows import writing_rows
from specsplit.experiment.usage import Meter
from specsplit.io import combined_sha256, json_sha256, replace_file
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
from specsplit.provenance.redaction import redact_arguments
from specsplit.provenance.run_file import write_run
from specsplit.provenance.steps import workflow_command
from specsplit.rpc.connection import Connection
from specsplit.rpc.credentials import Access
from specsplit.settings.run import OrchestratorConfig

RUN_SCHEMA_VERSION = 2
TABLES = ("requests.csv", "per_round.csv", "outputs.jsonl", "reference.csv")


def encode_prompts(
    prompts: Sequence[Prompt],
    codec: TextCodec,
    *,
    chat: bool,
    limit: int,
    raisable: bool = True,
    later_turns: bool = False,
) -> list[Request]:
    """Token ids of every prompt, those that were prepared where they fit this tokenizer and template.

    later_turns: also a request for each later turn, which gets its token ids when the one before it is answered.
    raisable: the limit is a setting, not the model's own.
    Raises UserError that names the prompts of `limit` tokens or more, before any work is done.
    """
    made: dict[str, Request] = {}
    for p in prompts:
        if p.after is None:
            made[p.id] = Request(p.id, p.category, prompt_tokens(p, codec, chat=chat), p)
        elif later_turns:
            made[p.id] = Request(p.id, p.category, [], p, made[p.after])
    requests = list(made.values())
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
    beside: Beside | None = None,
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
    beside: what is measured in turn with each request, the target alone included; None: nothing, and no reference.csv.
    resume: False forgets what an earlier run left. on_kept: gets the number of rows that are there already.
    on_done: called after each request. Raises WorkerError and UserError; then run.json holds the error and exit_code 1.
    """
    gpu_before = capture_gpu()
    run = _describe_run(draft, target, codec, config, warmup, repeats, inputs or {}, origins or {}, beside)
    meter = Meter([c for c in (draft, target) if c])
    run["energy"] = meter.told()
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
            write_run(run_dir / "run.json", {**run, **finished, "gpu": gpu}, [run_dir / name for name in TABLES])

        try:
            with sampler:
                controller = gamma_controller(config)
                measuring = _measure(left, draft, target, codec, config, warmup, journal, beside, controller, meter)
                for measured in measuring if left else ():
                    journal.add(measured, controller.state() if controller else None)
                    on_done(measured.request)
            entries = [entry for turn in plan if (entry := _entry(journal, turn))]
            _write_tables(entries, run_dir, with_reference=beside is not None)
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
    return entry is not None and all(row.status == OK for row in (entry.request, *entry.reference))


def _measure(
    turns: Sequence[Turn],
    draft: Connection | None,
    target: Connection,
    codec: TextCodec,
    config: OrchestratorConfig,
    warmup: int,
    journal: Journal,
    beside: Beside | None,
    controller: GammaController | None,
    meter: Meter,
) -> Iterator[Entry]:
    """Run these requests, at least one, in order; each by every contender in turn. journal: has the answers before a
    later turn, and what the controller had learnt from the rows that are kept.

    The order of the contenders moves on by one with each request, so that none always follows the same one.
    """
    learnt = journal.controller
    descriptions = {c.role: c.description for c in (draft, target) if c}
    access = Access.of(config)
    with TextWriter(draft.address if draft else None, target.address, descriptions, access=access) as writer:

        def stops() -> OnTokens | None:
            return stops_at(codec, config.stop)

        def write(request: Request) -> SpeculativeResult:
            own = request_config(config, request)
            on_tokens = stops()
            return writer.write(
                request.token_ids, own, on_tokens=on_tokens, controller=controller, request_id=request.id
            )

        contenders = [Contender(WORKERS, config, write)]
        if beside is not None:
            contenders += beside.contenders(config, writer, stops)
        first_turns = [turn for turn in turns if turn[1].previous is None]
        for _, request in islice(cycle(first_turns), warmup):
            for contender in contenders:
                contender.write(request)
        if controller is not None and learnt is not None:
            controller.restore(learnt)
        for number, (repeat, request) in enumerate(turns):
            own = request_config(config, request)
            try:
                request = replace(request, repeat=repeat)
                request = _with_text_so_far(request, repeat, journal, codec, config, target.description.max_context)
            except UserError as failure:
                error = WorkerError(str(failure), code="FAILED_PRECONDITION")
                record = request_record(request, SpeculativeResult(), own, repeat, error)
                yield Entry(record, [], _output(record, [], codec, config))
                continue
            shift = number % len(contenders)
            written, spent = {}, {}
            meter.spent()
            for place in [*range(shift, len(contenders)), *range(shift)]:
                written[place] = _write(contenders[place], request)
                spent[place] = meter.spent()
            result, failed = written[0]
            record = replace(request_record(request, result, own, repeat, failed), **spent[0])
            reference = [
                replace(_reference_record(contenders[place], request, *written[place], repeat), **spent[place])
                for place in range(1, len(contenders))
            ]
            rounds = round_records(request.id, result, own, repeat)
            yield Entry(record, rounds, _output(record, result.output_tokens, codec, config), reference)


def _output(
    record: RequestRecord, token_ids: list[int], codec: TextCodec, config: OrchestratorConfig
) -> dict[str, Any]:
    """The line of a text in `outputs.jsonl`."""
    return {
        "request_id": record.request_id,
        "repeat": record.repeat,
        "finish_reason": record.finish_reason,
        "text": cut_at_stop(codec.decode(token_ids), config.stop),
        "token_ids": token_ids,
        "status": record.status,
    }


def _with_text_so_far(
    request: Request, repeat: int, journal: Journal, codec: TextCodec, config: OrchestratorConfig, limit: int
) -> Request:
    """A later turn with its token ids, from the answers of this run.

    Raises UserError when one before it failed, or when there is no room for it in a context of `limit` tokens.
    """
    if request.previous is None or request.prompt is None:
        return request
    before: list[tuple[Prompt, str]] = []
    previous: Request | None = request.previous
    while previous is not None and previous.prompt is not None:
        entry = journal.get((repeat, previous.id))
        if entry is None or entry.request.status != OK:
            raise UserError(f"turn {previous.turn} of this conversation, {previous.id[:80]}, has no answer")
        before.insert(0, (previous.prompt, entry.output["text"]))
        previous = previous.previous
    token_ids = later_turn_tokens(request.prompt, before, codec, chat=config.use_chat_template)
    if len(token_ids) >= limit:
        raise UserError(f"{len(token_ids)} tokens with the text so far do not fit into the target's context of {limit}")
    return replace(request, token_ids=token_ids)


def _write(contender: Contender, request: Request) -> tuple[SpeculativeResult, WorkerError | None]:
    """A text, or what there is of one, with the error that ended it."""
    try:
        return contender.write(request), None
    except WorkerError as failure:
        # Without a text the worker cannot be reached at all; the next request would fare no better.
        if failure.result is None:
            raise
        return failure.result, failure


def _reference_record(
    contender: Contender, request: Request, result: SpeculativeResult, error: WorkerError | None, repeat: int
) -> ReferenceRecord:
    record = request_record(request, result, request_config(contender.config, request), repeat, error)
    return ReferenceRecord(**vars(record), setup=contender.setup)


def _write_tables(entries: Sequence[Entry], run_dir: Path, *, with_reference: bool) -> None:
    """The tables of a run whose requests all ended. Raises UserError when every one failed."""
    if entries and all(entry.request.status == FAILED for entry in entries):
        raise RunError(f"every request failed, the first one with: {entries[0].request.error_message}")
    reference = [row for entry in entries for row in entry.reference]
    for setup in dict.fromkeys(row.setup for row in reference):
        own = [row for row in reference if row.setup == setup]
        if all(row.status == FAILED for row in own):
            what = "gamma 0" if setup == WORKERS else f"{setup} (setups says what is measured)"
            raise RunError(f"every text of the reference {what} failed, the first one with: {own[0].error_message}")
    with writing_rows(run_dir / "requests.csv", RequestRecord) as write:
        for entry in entries:
            write(entry.request)
    with writing_rows(run_dir / "per_round.csv", RoundRecord) as write:
        for entry in entries:
            for row in entry.rounds:
                write(row)
    if with_reference:
        with writing_rows(run_dir / "reference.csv", ReferenceRecord) as write:
            for text in reference:
                write(text)
    outputs = "".join(json.dumps(entry.output, ensure_ascii=False) + "\n" for entry in entries)
    replace_file(run_dir / "outputs.jsonl", outputs)


_WORKER_OPERATION = ("address", "pid", "attached", "process_started", "log", "reason")
_LIMITS_OPERATION = ("sessions", "calls", "streams", "waiting_messages")  # the others decide how long drafts are


def worker_identity(worker: Mapping[str, Any]) -> dict[str, Any]:
    """What of a worker's description decides results: not its process and address, nor limits that only operate it."""
    identity = {key: value for key, value in worker.items() if key not in _WORKER_OPERATION}
    limits = identity.get("limits", {})
    return {**identity, "limits": {name: limit for name, limit in limits.items() if name not in _LIMITS_OPERATION}}


def _what_decides(run: Mapping[str, Any], requests: Sequence[Request]) -> dict[str, Any]:
    """The settings that the rows of one run share: those of another run with the same ones may stand beside them."""
    operates = OrchestratorConfig.operating()
    workers = {role: worker_identity(worker) for role, worker in run["workers"].items()}
    return {
        "requests_sha256": json_sha256([_identity(request) for request in requests]),
        "orchestrator": {key: value for key, value in run["orchestrator"].items() if key not in operates},
        "workers": workers,
        **{key: run[key] for key in ("repeats", "warmup_requests", "tokenizer_sha256", "machine", "environment")},
        **{key: run[key] for key in ("software_sha256", "run_code_sha256", "beside")},
    }


def _identity(request: Request) -> list[Any]:
    """What a request is, as far as it is known before the run."""
    later = [request.prompt.prompt, request.previous.id] if request.prompt and request.previous else []
    return [request.id, request.category, request.token_ids, *later]


def _describe_run(
    draft: Connection | None,
    target: Connection,
    codec: TextCodec,
    config: OrchestratorConfig,
    warmup: int,
    repeats: int,
    inputs: dict[str, Any],
    origins: Mapping[str, Mapping[str, Any]],
    beside: Beside | None,
) -> dict[str, Any]:
    argv = redact_arguments(["specsplit", *sys.argv[1:]])
    workers = {
        c.role: {"address": c.address, **origins.get(c.role, {}), **description_dict(c.description)}
        for c in (draft, target)
        if c
    }
    source_files, software = hash_tree(PACKAGE), capture_software()
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
        "beside": None if beside is None else {"setups": list(beside.setups), "left_out": dict(beside.left_out)},
        "orchestrator": config.model_dump(mode="json"),
        "workers": workers,
        "inputs": inputs,
        "tokenizer_sha256": codec.sha256,
        "machine": capture_machine(),
        "environment": capture_environment(),
        "software": software,
        "software_sha256": software["sha256"],
        "specsplit_version": specsplit.__version__,
        "source_sha256": combined_sha256(source_files),
        "run_code_sha256": code_sha256("bench"),
        "worker_code_sha256": code_sha256("worker"),
        "git": capture_git(PACKAGE),
    }
