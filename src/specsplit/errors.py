"""Errors that a user can mend. All are kinds of UserError:

UserError
├── OptionError   an option of the Python interface has a value that is not possible
├── PromptError   a prompt has no tokens, or too many
├── ModelError    a model cannot be found, fetched or loaded
└── WorkerError   a worker does not answer, refuses, or failed while it wrote a text
"""

from __future__ import annotations

from typing import Any


class UserError(Exception):
    """A mistake or a missing thing outside the program: the message names it and how to mend it.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """


class OptionError(UserError):
    """An option of the Python interface has a value, or a name, that is not possible."""


class PromptError(UserError):
    """A prompt has no tokens, too many, or is of a kind that cannot be read."""


class ModelError(UserError):
    """A model cannot be found, fetched or loaded."""


class WorkerError(UserError):
    """A worker did not answer, or refused; the message names it, the call and the status.

    code: name of the gRPC status. result: the text so far, a SpeculativeResult; None when it had not begun.
    """

    def __init__(self, message: str, *, code: str = "", result: Any = None) -> None:
        super().__init__(message)
        self.code, self.result = code, result
