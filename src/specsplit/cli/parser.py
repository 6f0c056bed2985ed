"""The parser of the command line: no abbreviations, and a suggestion for a flag that does not exist."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any


class Parser(argparse.ArgumentParser):
    """Refuses unknown flags itself, where the known ones of its command are known."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, but the rest is empty: what is unknown is an error."""
        # Before argparse, which would name missing flags first. Flags of a subcommand are for its own parser to know.
        words = list(sys.argv[1:] if args is None else args)
        words = words[: words.index("--")] if "--" in words else words
        given = [word.partition("=")[0] for word in words if word.startswith("--")]
        self._refuse([] if self._subparsers else [name for name in given if name not in self._option_string_actions])
        found, unknown = super().parse_known_args(args, namespace)
        self._refuse(unknown)
        return found, unknown

    def _refuse(self, unknown: Sequence[str]) -> None:
        if unknown:
            close = [(name, difflib.get_close_matches(name, self._option_string_actions, n=1)) for name in unknown]
            hints = [f"; did you mean {best[0]} instead of {name}?" for name, best in close if best]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{''.join(hints)}")
