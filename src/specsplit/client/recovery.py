"""When a worker fails while a text is written: go on where the text stands, without the draft, or give up.

A round counts only once its reply is here, and a worker that lost its session gets the whole text again. So every try
can be repeated, and no failure changes a text. Times are of the monotonic clock, which nobody sets.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import Any

import grpc

from specsplit.client.result import Failure
from specsplit.client.spans import TextSpan
from specsplit.client.text import Text
from specsplit.errors import WorkerError
from specsplit.rpc.statuses import Remedy, meaning
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import OrchestratorConfig

log = logging.getLogger(__name__)
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 5.0  # doubled from try to try; half of each is drawn, so that clients spread
LAST_CHANCE_S = 1.0  # the least time that a worker gets to answer
MOST_LOSSES = 3  # times in one round that a worker may say that it lost a session that it was just given

# What makes two workers one and the same model, as Describe says it.
_IDENTITY = (
    *("model", "weights_sha256", "tokenizer_sha256", "dtype", "device", "skip_layers"),
    *("vocab_size", "max_context", "eos_token_ids"),
)


class WorkerFailed(Exception):
    """A call or a stream of the `role` worker ended before its answer. code: name of the gRPC status.

    remedy: as `rpc/statuses.py` says. after_s: how long it asked to be left alone.
    """

    def __init__(self, role: str, code: str, details: str, remedy: Remedy, after_s: float = 0.0) -> None:
        super().__init__(f"{role} worker: {code}: {details}")
        self.role, self.code, self.details, self.remedy, self.after_s = role, code, details, remedy, after_s


class WithoutDraft(Exception):
    """The draft worker failed, and the text is to be finished by the target alone."""


def failure_of(role: str, code: grpc.StatusCode, details: str | None, metadata: Any) -> WorkerFailed:
    """What a gRPC status means. metadata: pairs that came with it, or None."""
    meant = meaning(code, details, metadata)
    return WorkerFailed(role, meant.code.name, meant.details, meant.rule.remedy, meant.after_s)


class Recovery:
    """What is done about the failures of one text, as the configuration says.

    identities: role -> what the worker said of itself when it was first met; filled here. A worker that comes back as
    another model is refused. span: of the text; it is told of failures. None without tracing.
    """

    def __init__(
        self, config: OrchestratorConfig, identities: dict[str, pb.DescribeReply], span: TextSpan | None = None
    ) -> None:
        self.span = span
        self._config = config
        self._identities = identities
        self._text: Text | None = None
        self._failures: list[Failure] = []
        # The outage under way: it lasts until a round is done.
        self._rounds = -1
        self._began = self._noticed = 0.0
        self._tries = self._losses = 0

    def begin(self, text: Text) -> Text:
        """From here on failures are those of this text."""
        self._text = text
        text.result.failures = self._failures
        if self.span is not None:
            text.span = self.span
            self.span.begin(len(text.tokens), text.result)
        return text

    async def describe(self, role: str, stub: Any, failed: WorkerFailed | None = None) -> pb.DescribeReply:
        """What the worker behind a stub says of itself, waited for and asked again.

        failed: how it failed just now. Raises WithoutDraft, and WorkerError when there is no hope or another worker.
        """
        while True:
            timeout_s = self._config.connect_timeout_s
            if failed is not None:
                await asyncio.sleep(self._wait_s(failed))
                timeout_s = max(LAST_CHANCE_S, min(timeout_s, self._left()))
            try:
                request = pb.DescribeRequest()
                worker = await stub.Describe(request, timeout=timeout_s, wait_for_ready=failed is not None)
                break
            except grpc.aio.AioRpcError as error:
                failed = failure_of(role, error.code(), error.details(), error.trailing_metadata())
        if failed is not None:
            failure = self._failures[-1]
            failure.lost_ms = (time.monotonic() - self._noticed) * 1e3
            if self.span is not None:
                self.span.event("worker back", worker=failure.worker, round=failure.round, lost_ms=failure.lost_ms)
        return self._met(role, worker)

    def _wait_s(self, failed: WorkerFailed) -> float:
        """Seconds to wait before the next try. Raises WithoutDraft, or WorkerError when there is none."""
        now = time.monotonic()
        rounds = len(self._text.result.rounds) if self._text else 0
        if rounds != self._rounds:
            self._rounds, self._began, self._tries, self._losses = rounds, now, 0, 0
        self._tries += 1
        self._losses += failed.remedy == "resend"
        last = self._failures[-1] if self._failures else None
        if last is None or (last.worker, last.round) != (failed.role, rounds + 1):  # one for all tries in a round
            self._failures.append(Failure(failed.role, rounds + 1, failed.code, failed.details))
            self._noticed = time.monotonic()
        if self.span is not None:
            self.span.event("worker failed", worker=failed.role, round=rounds + 1, code=failed.code)
        policy = self._config.on_draft_failure if failed.role == "draft" else "reconnect"
        lost_session = failed.remedy == "resend" and self._losses <= MOST_LOSSES
        if policy == "target_alone" and not lost_session:
            self._failures[-1].action = policy
            if self.span is not None:
                self.span.event("target alone", round=rounds + 1)
            log.warning("%s; the target finishes the text alone", failed)
            raise WithoutDraft
        if self._left() <= 0 or (not lost_session and (failed.remedy != "wait" or policy == "fail")):
            raise self._give_up(failed)
        # A session that went to another client is no fault.
        level = logging.INFO if lost_session else logging.WARNING
        log.log(level, "%s; opening a new session with the whole text", failed)
        if lost_session:
            return 0.0
        wait = min(FIRST_WAIT_S * 2 ** (self._tries - 1), LONGEST_WAIT_S)
        return min(max(wait * random.uniform(0.5, 1.0), failed.after_s), self._left())

    def _give_up(self, failed: WorkerFailed) -> WorkerError:
        """The error that ends the text; it has the text so far."""
        first = self._failures[-1]
        first.action = "gave_up"
        first.lost_ms = (time.monotonic() - self._noticed) * 1e3
        said = f"{first.code}: {first.message}"
        if (failed.code, failed.details) != (first.code, first.message):
            said += f"; then {failed.code}: {failed.details}"
        if self._tries > 1:
            said += f"; gave up after {time.monotonic() - self._began:.1f} s"
        what = "does not answer" if self._text is None else f"failed in round {first.round}"
        code = failed.code if failed.remedy == "none" else first.code  # what cannot be mended is the reason
        return self._error(f"{failed.role} worker {what}: {said}", code)

    def _met(self, role: str, worker: pb.DescribeReply) -> pb.DescribeReply:
        """`worker`. Raises WorkerError when another one was there before."""
        before = self._identities.setdefault(role, worker)
        pairs = [(name, getattr(before, name), getattr(worker, name)) for name in _IDENTITY]
        if changed := [f"{name} {now} instead of {then}" for name, then, now in pairs if then != now]:
            raise self._error(
                f"another {role} worker answers now: {'; '.join(changed)}. Start the one that was there before, "
                "or begin anew.",
                grpc.StatusCode.FAILED_PRECONDITION.name,
            )
        return worker

    def _error(self, message: str, code: str) -> WorkerError:
        if self._text is None:
            return WorkerError(message, code=code)
        self._text.result.total_ms = (time.perf_counter() - self._text.started) * 1e3
        return WorkerError(message, code=code, result=self._text.result)

    def _left(self) -> float:
        return self._began + self._config.recovery_timeout_s - time.monotonic()
