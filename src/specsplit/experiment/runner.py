"""Runs prompts through the loop at one gamma and leaves a run folder: tables, texts, and how they were made.

A run folder holds `requests.csv`, `per_round.csv`, `outputs.jsonl` and `run.json`, and as `reference.csv` what was
measured in turn with them on the same request: the target alone and other baselines. A drift of the machine affects all
of a turn alike, so speedups are paired within the run. While the run goes on, and when it is cut short, what is done is
in its journal, and the next run with the same settings continues from there; the tables appear only when every request
is done. A request that fails is a row too, and stays in the journal to be tried again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from specsplit.client.pipeline import gamma_controller
from specsplit.client.result import SpeculativeResult
from specsplit.client.writer import TextWriter
from specsplit.errors import RunError, UserError, WorkerError
from specsplit.experiment.baselines import Contender, contenders
from specsplit.experiment.columns import FAILED, OK, WORKERS, ReferenceRecord, RequestRecord, RoundRecord, write_rows
from specsplit.experiment.journal import JOURNAL, Journal
from specsplit.experiment.prompt import Prompt
from specsplit.experiment.prompt_tokens import later_turn_tokens
from specsplit.experiment.records import Request, in_turn, repeated, request_config, request_record, round_records
from specsplit.experiment.run import Run
from specsplit.experiment.usage import Meter
from specsplit.io import replace_file
from specsplit.models.tokenizer import cut_at_stop, stops_at
from specsplit.provenance.capture import utc_now
from specsplit.provenance.gpu import GpuSampler, capture_gpu
from specsplit.provenance.run_file import write_run
from specsplit.rpc.credentials import Access

TABLES = ("requests.csv", "per_round.csv", "outputs.jsonl", "reference.csv")


def run_requests(
    run: Run,
    run_dir: Path,
    *,
    resume: bool = True,
    on_kept: Callable[[int], None] = lambda count: None,
    on_done: Callable[[RequestRecord], None] = lambda record: None,
) -> None:
    """Every request in order, as the configuration says, and all of them `repeats` times; writes `run_dir`.

    What the journal of an earlier run with the same settings holds is not measured again, but for requests that failed.
    A request that fails is a row with its reason. The run itself fails when a worker does not answer before a text
    has begun, or when every request failed.

    resume: False forgets what an earlier run left. on_kept: gets the number of rows that are there already.
    on_done: called after each request. Raises WorkerError and UserError; then run.json holds the error and exit_code 1.
    """
    meter = Meter(list(run.workers.values()))
    described = {**run.describe(), "energy": meter.told()}
    sampler = GpuSampler()
    plan = repeated(run.requests, run.repeats)
    with Journal(run_dir / JOURNAL, run.decides(described), resume=resume) as journal:
        for name in (*TABLES, "run.json"):
            (run_dir / name).unlink(missing_ok=True)  # of an earlier run: a folder never mixes two
        every = [Entry.read(content) for content in journal.contents]
        learnt = every[-1].controller if every else None
        entries = {entry.key: entry for entry in every}
        left = [request for request in plan if not _done(entries, request)]
        left.sort(key=lambda request: request.key in entries)  # what failed before comes last
        kept = len(plan) - len(left)
        on_kept(kept)

        def end(code: int, error: str | None) -> None:
            failed = sum(entry.request.status == FAILED for entry in entries.values())
            finished = {
                "finished": utc_now(),
                "exit_code": code,
                "error": error,
                "requests": {"planned": len(plan), OK: len(entries) - failed, FAILED: failed, "kept": kept},
                "attempts": journal.attempts,
                "gpu": {**described["gpu"], "after": capture_gpu(), "samples": sampler.samples},
            }
            write_run(run_dir / "run.json", {**described, **finished}, [run_dir / name for name in TABLES])

        try:
            with sampler:
                for entry in _measure(run, left, entries, learnt, meter) if left else ():
                    journal.keep(entry.key, asdict(entry))
                    entries[entry.key] = entry
                    on_done(entry.request)
            in_order = [entries[request.key] for request in plan]
            _write_tables(in_order, run_dir, with_reference=run.beside is not None)
        except BaseException as error:
            end(1, str(error) if isinstance(error, UserError) else repr(error))
            raise
        end(0, None)
        if all(_done(entries, request) for request in plan):
            journal.remove()


Key = tuple[int, str]  # repeat, request_id


@dataclass(frozen=True)
class Entry:
    """A request that ended: its row, the rows of its rounds, its line of `outputs.jsonl`, and the rows of what was
    measured in turn with it. They are kept together or not at all: what is compared was measured side by side.

    controller: what the gamma controller had learnt by then; None where gamma is fixed.
    """

    request: RequestRecord
    rounds: list[RoundRecord]
    output: dict[str, Any]
    reference: list[ReferenceRecord] = field(default_factory=list)
    controller: dict[str, Any] | None = None

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Entry:
        """One that a journal kept."""
        return cls(
            RequestRecord(**content["request"]),
            [RoundRecord(**row) for row in content["rounds"]],
            content["output"],
            [ReferenceRecord(**row) for row in content["reference"]],
            content["controller"],
        )

    @property
    def key(self) -> Key:
        return self.request.repeat, self.request.request_id


def _done(entries: Mapping[Key, Entry], request: Request) -> bool:
    entry = entries.get(request.key)
    return entry is not None and all(row.status == OK for row in (entry.request, *entry.reference))


def _measure(
    run: Run, requests: Sequence[Request], entries: Mapping[Key, Entry], learnt: dict[str, Any] | None, meter: Meter
) -> Iterator[Entry]:
    """Run these requests, at least one, in order; each by every contender in turn.

    entries: of what is done, as it goes on: the answers before a later turn. learnt: what the gamma controller had from
    those that are kept. The order of the contenders moves on by one with each request, so that none always follows the
    same one.
    """
    config, codec = run.config, run.codec
    controller = gamma_controller(config)
    met = {role: worker.description for role, worker in run.workers.items()}
    at = {role: worker.address for role, worker in run.workers.items()}
    with TextWriter(at.get("draft"), at["target"], met, access=Access.of(config)) as writer:
        taking_turns = contenders(config, writer, lambda: stops_at(codec, config.stop), controller, run.beside)
        first_turns = [replace(request, repeat=0) for request in requests if request.previous is None]
        for request in islice(cycle(first_turns), run.warmup):
            for contender in taking_turns:
                contender.write(request)
        if controller is not None and learnt is not None:
            controller.restore(learnt)
        for number, request in enumerate(requests):
            try:
                request = _with_text_so_far(run, request, entries)
            except UserError as failure:
                error = WorkerError(str(failure), code="FAILED_PRECONDITION")
                record = _record(taking_turns[0], request, SpeculativeResult(), error)
                learnt = controller.state() if controller else None
                yield Entry(record, [], _output(run, record, []), controller=learnt)
                continue
            written, spent = {}, {}
            meter.spent()
            for place in in_turn(range(len(taking_turns)), number):
                written[place] = _write(taking_turns[place], request)
                spent[place] = meter.spent()
            rows = [
                replace(_record(contender, request, *written[place]), **spent[place])
                for place, contender in enumerate(taking_turns)
            ]
            result = written[0][0]
            yield Entry(
                rows[0],
                round_records(request, result, config),
                _output(run, rows[0], result.output_tokens),
                [
                    ReferenceRecord(**vars(row), setup=c.setup)
                    for row, c in zip(rows[1:], taking_turns[1:], strict=True)
                ],
                controller.state() if controller else None,
            )


def _record(
    contender: Contender, request: Request, result: SpeculativeResult, error: WorkerError | None
) -> RequestRecord:
    return request_record(request, result, request_config(contender.config, request), error)


def _output(run: Run, record: RequestRecord, token_ids: list[int]) -> dict[str, Any]:
    """The line of a text in `outputs.jsonl`."""
    return {
        "request_id": record.request_id,
        "repeat": record.repeat,
        "finish_reason": record.finish_reason,
        "text": cut_at_stop(run.codec.decode(token_ids), run.config.stop),
        "token_ids": token_ids,
        "status": record.status,
    }


def _with_text_so_far(run: Run, request: Request, entries: Mapping[Key, Entry]) -> Request:
    """A later turn with its token ids, from the answers of this run.

    Raises UserError when one before it failed, or when there is no room for it in the target's context.
    """
    if request.previous is None or request.prompt is None:
        return request
    before: list[tuple[Prompt, str]] = []
    previous: Request | None = request.previous
    while previous is not None and previous.prompt is not None:
        entry = entries.get((request.repeat, previous.id))
        if entry is None or entry.request.status != OK:
            raise UserError(f"turn {previous.turn} of this conversation, {previous.id[:80]}, has no answer")
        before.insert(0, (previous.prompt, entry.output["text"]))
        previous = previous.previous
    token_ids = later_turn_tokens(request.prompt, before, run.codec, chat=run.config.use_chat_template)
    if len(token_ids) >= (limit := run.workers["target"].description.max_context):
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
    write_rows(run_dir / "requests.csv", RequestRecord, (entry.request for entry in entries))
    write_rows(run_dir / "per_round.csv", RoundRecord, (row for entry in entries for row in entry.rounds))
    if with_reference:
        write_rows(run_dir / "reference.csv", ReferenceRecord, reference)
    outputs = "".join(json.dumps(entry.output, ensure_ascii=False) + "\n" for entry in entries)
    replace_file(run_dir / "outputs.jsonl", outputs)
