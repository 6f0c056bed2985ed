"""Errors that a user can mend. All are kinds of UserError:

UserError
├── OptionError   an option of the Python interface has a value that is not possible
├── PromptError   a prompt has no tokens, or too many
├── ModelError    a model cannot be found, fetched or loaded
├── RunError      what was asked for was right, and failed
└── WorkerError   a worker does not answer, refuses, or failed while it wrote a text
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake or a missing thing outside the program: the message names it and how to mend it.

    The command line prints the message alone, without a traceback, and exits with `exit_status`: 2 for wrong use, 1 for
    what was right and failed.
    """

    exit_status = 2


def told(error: BaseException) -> str:
    """What an error of another library says, for a message: its class and its text, without more than a few lines."""
    text = "\n".join(str(error).strip().splitlines()[:8])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def naming(key: str, scratch: Path | None = None) -> Iterator[None]:
    """Begin what a UserError says with a key of the configuration; a scratch folder means nothing to the reader."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {str(error).replace(f'{scratch}: ', '')}") from error


def why(error: Exception) -> str:
    """What the system says of a file that cannot be read: `No such file or directory`."""
    return str(getattr(error, "strerror", None) or error)


def listed(items: Iterable[object], most: int = 5, apart: str = ", ") -> str:
    """The first items, and how many more there are; apart: what stands between them."""
    shown = list(map(str, items))
    more = [f"and {len(shown) - most} more"] if len(shown) > most else []
    return apart.join([*shown[:most], *more])


def counted(number: object, one: str, many: str = "") -> str:
    """The number, and what `one` says of a single one: `1 prompt`, `8 prompts`, `0 entries`. many: of others, where the
    plural is more than another end of the last word: `1 text differs`, `2 texts differ`."""
    if number == 1:
        return f"1 {one}"
    if not many and one[-1:] == "y" and one[-2:-1] not in "aeiou":
        many = f"{one[:-1]}ies"
    return f"{number} {many or one + ('es' if one.endswith(('s', 'x', 'ch', 'sh')) else 's')}"


def shortened(text: str, most: int = 60) -> str:
    """The text, or its beginning and three dots, `most` characters in all."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. PyTorch's allocators raise a class of their own, that of the CPU a plain RuntimeError."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
        or "not enough memory" in str(error)
    )


class OptionError(UserError):
    """An option of the Python interface has a value, or a name, that is not possible."""


class PromptError(UserError):
    """A prompt has no tokens, too many, or is of a kind that cannot be read."""


class ModelError(UserError):
    """A model cannot be found, fetched or loaded."""


class RunError(UserError):
    """What was asked for was right, and failed: every request, or another program."""

    exit_status = 1


class WorkerError(UserError):
    """A worker did not answer, or refused; the message names it, the call and the status.

    code: name of the gRPC status. result: the text so far, a SpeculativeResult; None when it had not begun.
    """

    def __init__(self, message: str, *, code: str = "", result: Any = None) -> None:
        super().__init__(message)
        self.code, self.result = code, result
        self.exit_status = 2 if result is None else 1
