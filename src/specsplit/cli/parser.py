"""The parser of the command line: no abbreviations, and a suggestion for a flag that does not exist."""

from __future__ import annotations

import argparse
import difflib
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
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            hints = []
            for word in unknown:
                name = word.partition("=")[0]
                if close := difflib.get_close_matches(name, self._option_string_actions, n=1):
                    hints.append(f"did you mean {close[0]} instead of {name}?")
            self.error(f"unrecognized arguments: {' '.join(unknown)}{''.join(f'; {hint}' for hint in hints)}")
        return found, unknown
