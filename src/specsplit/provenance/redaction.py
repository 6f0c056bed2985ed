"""Passwords and tokens never get into a record or an archive.

What counts as one: the value of an environment variable or a key with such a name, each line of a file that a variable
names for it, a string in the form of a well-known kind of token, and the user part of an address.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

REDACTED = "[redacted]"
_WORDS = {"token", "password", "passwd", "passphrase", "secret", "credential", "credentials", "apikey", "pat"}
_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("secret", "key")}
_LARGEST_FILE = 1 << 16
_SHORTEST = 8  # a shorter value of a variable would be found in harmless text
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|pypi-[\w-]{40,}"
    r"|sk-[\w-]{20,}|xox[abprs]-[\w-]{10,}|A(?:KIA|SIA)[A-Z0-9]{16})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|(?<=://)[^\s/@:]*:[^\s/@]+(?=@)",
    re.DOTALL,
)


def is_secret_name(name: str) -> bool:
    """Whether a key or variable of this name holds a secret: HF_TOKEN, --api-key; not max_output_tokens, nor the name
    of a file with one: token_file, HF_TOKEN_PATH."""
    words = _words(name)
    return not _is_file_name(words) and _say_secret(words)


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]


def _is_file_name(words: Sequence[str]) -> bool:
    return words[-1:] in (["file"], ["path"])


def _say_secret(words: Sequence[str]) -> bool:
    return bool(_WORDS & set(words)) or any(pair in _PAIRS for pair in pairwise(words))


def find_secret(text: str, patterns: bool = True) -> int | None:
    """Where in `text` a secret begins, if there is one. patterns: look for well-known forms as well as known values."""
    places = [found.start() for found in [_TOKEN.search(text) if patterns else None] if found]
    places += [text.index(value) for value in _secret_values() if value in text]
    return min(places, default=None)


def redact(value: Any) -> Any:
    """A copy of a JSON value without secrets: keys stay, secret strings become "[redacted]"."""
    if isinstance(value, Mapping):
        return {
            key: REDACTED if isinstance(item, str) and item and is_secret_name(str(key)) else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    for secret in _secret_values():
        text = text.replace(secret, REDACTED)
    return _TOKEN.sub(REDACTED, text)


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line without secrets: also what follows --token, and NAME=VALUE with such a name."""
    shown: list[str] = []
    hide = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if hide:
            shown.append(REDACTED)
        elif equals and is_secret_name(name):
            shown.append(f"{name}={REDACTED}")
        else:
            shown.append(redact_text(argument))
        hide = not hide and not equals and argument.startswith("--") and is_secret_name(argument)
    return shown


def _secret_values() -> list[str]:
    """Longest first: one may be part of another."""
    found = set()
    for name, value in os.environ.items():
        words = _words(name)
        if value and _say_secret(words):
            found |= set(_lines_of(value)) if _is_file_name(words) else {value}
    found = {value for value in found if len(value) >= _SHORTEST}
    return sorted(found, key=lambda value: (-len(value), value))


@cache
def _lines_of(path: str) -> tuple[str, ...]:
    """The lines of a file of secrets; none when it cannot be read, or is no such file."""
    try:
        file = Path(path)
        if not file.is_file() or file.stat().st_size > _LARGEST_FILE:
            return ()
        return tuple(line.strip() for line in file.read_text("utf-8", errors="replace").splitlines())
    except OSError:
        return ()
