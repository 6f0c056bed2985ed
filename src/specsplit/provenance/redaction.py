"""Keeps passwords and tokens out of records and archives.

A secret is: the value of an environment variable or key whose name says so, each line of a file that such a variable
names, a string in the form of a well-known kind of token, and the user part of an address.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

REDACTED = "[redacted]"
# Words of a name that say it, alone or at the end of a word: HF_TOKEN, dbPassword, PGPASS.
_WORDS = (
    *("token", "password", "passwd", "passphrase", "passwort", "passcode", "pass", "pwd", "secret", "credential"),
    *("credentials", "creds", "apikey", "accesskey", "secretkey", "privatekey", "jwt", "bearer", "authorization"),
)
_ALONE = {"pat", "cookie"}
_OTHER_WORDS = {"bypass", "compass", "encompass", "surpass", "trespass", "overpass", "underpass"}
_KEYS = {"api", "access", "private", "secret", "auth", "signing", "encryption", "master", "account", "license"}
_FILES = ("file", "path", "dir", "sock", "socket")
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
    return _names(name) == "secret"


def _names(name: str) -> Literal["secret", "file", ""]:
    """What a name stands for: a secret, a file of secrets, or nothing of the kind."""
    parts = re.split(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])", name)
    words = [part.lower() for part in parts if part]
    if len(words) < 2 and name.lower() in ("pwd", "oldpwd"):  # working directories
        return ""
    for end in _FILES if words else ():
        if words[-1].endswith(end) and _says_secret([*words[:-1], words[-1].removesuffix(end)]):
            return "file"
    return "secret" if _says_secret(words) else ""


def _says_secret(words: Sequence[str]) -> bool:
    if words and words[-1] == "auth":
        return True
    if any(pair[0] in _KEYS and pair[1] == "key" for pair in pairwise(words)):
        return True
    return any(word in _ALONE or (word.endswith(_WORDS) and word not in _OTHER_WORDS) for word in words)


def find_secret(text: str, patterns: bool = True) -> int | None:
    """Where in `text` a secret begins, if there is one. patterns: look for well-known forms as well as known values."""
    places = [text.index(value) for value in _secret_values() if value in text]
    if patterns and (found := _TOKEN.search(text)):
        places.append(found.start())
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


def without_places(value: Any, root: Path) -> Any:
    """A copy of a JSON value whose strings name no place of this machine: paths below `root`, the project's folder, are
    relative to it, and those below the home folder begin with `~`."""
    if isinstance(value, Mapping):
        return {key: without_places(item, root) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(item, root) for item in value]
    if isinstance(value, str) and "/" in value:
        for folder, short in ((root.absolute(), "."), (root.resolve(), "."), (Path.home(), "~")):
            if folder != Path(folder.anchor):
                value = re.sub(rf"(?<![\w.~/-]){re.escape(str(folder))}(?=/|$|[\s:;,'\"])", short, value)
        value = re.sub(r"(?<![\w.~/-])\./(?=[\w.])", "", value)
    return value


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
    """The secrets in the environment, longest first: one may be part of another."""
    found: set[str] = set()
    for name, value in os.environ.items():
        if value and (kind := _names(name)):
            found |= set(_lines_of(value)) if kind == "file" else {value}
    return sorted((value for value in found if len(value) >= _SHORTEST), key=lambda value: (-len(value), value))


@cache
def _lines_of(path: str) -> tuple[str, ...]:
    """The lines of a file of secrets; none when it cannot be read or is too large to be one."""
    with suppress(OSError):
        file = Path(path)
        if file.is_file() and file.stat().st_size <= _LARGEST_FILE:
            return tuple(line.strip() for line in file.read_text("utf-8", errors="replace").splitlines())
    return ()
