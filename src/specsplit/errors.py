"""Errors that a user can mend."""

from __future__ import annotations

from typing import Any


class UserError(Exception):
    """A mistake or a missing thing outside the program: the message names it and how to mend it.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """


class WorkerError(UserError):
    """A worker did not answer, or refused; the message names it, the call and the status.

    code: name of the gRPC status. result: the text so far, a SpeculativeResult; None when it had not begun.
    """

    def __init__(self, message: str, *, code: str = "", result: Any = None) -> None:
        super().__init__(message)
        self.code, self.result = code, result
