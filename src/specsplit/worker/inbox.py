"""The messages of a stream, read as they arrive, so that a handler can see whether a newer one waits."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc

from specsplit.rpc.codec import MALFORMED
from specsplit.worker.calls import Caller
from specsplit.worker.refusals import InvalidRequest, LimitReached

MOST_WAITING = 64  # messages of a stream; our client has at most three under way


class Inbox:
    """What `read` reads on a thread of its own until the client has sent all or has left.

    Iterating yields (message, time.perf_counter() of its arrival); until the next one is asked for, `caller` works, and
    has a place. It ends once the client has left, even if messages wait, and raises InvalidRequest for a malformed
    message, LimitReached when more than MOST_WAITING wait, and what `caller` was displaced by. most_wait_s: in line.
    session_id, round: of the last message, set by the handler with `of_session`. arrived: when that message came.
    """

    def __init__(self, caller: Caller, most_wait_s: float) -> None:
        self._caller = caller
        self._most_wait_s = most_wait_s
        self.session_id = ""
        self.round = 0
        self.arrived = time.perf_counter()
        self._gone = self._flooded = False
        self._messages: queue.SimpleQueue[tuple[Any, float] | None] = queue.SimpleQueue()

    def read(self, requests: Iterator[Any]) -> None:
        """Begin to read. Raises RuntimeError when there is no thread for it."""
        threading.Thread(target=self._read, args=(requests,), name="stream", daemon=True).start()

    def _read(self, requests: Iterator[Any]) -> None:
        try:
            for message in requests:
                if self._messages.qsize() >= MOST_WAITING:
                    self._flooded = True
                    break
                self._messages.put((message, time.perf_counter()))
        except grpc.RpcError:
            self._gone = True
        finally:
            self._messages.put(None)

    def __iter__(self) -> Iterator[tuple[Any, float]]:
        said = False
        while (item := self._messages.get()) is not None:
            if self._gone or self._caller.displaced:
                break
            if self._flooded:
                raise LimitReached(f"over {MOST_WAITING} messages of this stream wait: send the next one after a reply")
            if item[0] is MALFORMED:
                raise InvalidRequest(MALFORMED.why)
            self.arrived = item[1]
            self._caller.may_wait(_context_of(item[0]), self._most_wait_s)
            self._caller.work()
            said = True
            yield item
            self._caller.rest()
        if self._caller.displaced:
            raise self._caller.displaced
        if not said:
            self._caller.work()  # an empty stream, too, is answered only when there is a place
            self._caller.rest()

    def end(self) -> None:
        """End the iteration, although the client would go on."""
        self._messages.put(None)

    def of_session(self, session_id: str, round_number: int) -> None:
        """Set session and round of the message. Raises InvalidRequest when an earlier one was of another session."""
        if self.session_id and session_id != self.session_id:
            raise InvalidRequest("a stream is of one session: open another stream for another one")
        self.session_id, self.round = session_id, round_number

    def waiting(self) -> bool:
        """Whether a message, or the end of the stream, has arrived and was not taken yet."""
        return not self._messages.empty()


def _context_of(message: Any) -> Any:
    return message.verify.context if hasattr(message, "verify") else message.context
