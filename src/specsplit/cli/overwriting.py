"""No command writes over a file that it reads, or one file twice: checked for all commands, by their flags."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from specsplit.errors import UserError
from specsplit.io import check_openable, refuse_overwriting

# Flags that name a file to write, in some command.
WRITTEN = {"output", "manifest", "figure", "losses", "rounds", "report", "checkpoint", "worker_log", "endpoint_file"}
TABLES = ("requests.csv", "per_round.csv", "peers_requests.csv", "capacity_requests.csv", "summary.csv")


def check_paths(args: argparse.Namespace) -> None:
    """Raise UserError when a flag for a file to write names the file of another flag, or a table of --results-dir; and
    when one names what no command can open, as a pipe that nobody writes to."""
    paths = {
        f"--{name.replace('_', '-')}": value if isinstance(value, list) else [value]
        for name, value in vars(args).items()
        if isinstance(value, Path) or (isinstance(value, list) and value and all(isinstance(p, Path) for p in value))
    }
    written = {flag: path for flag, (path, *_) in paths.items() if flag[2:].replace("-", "_") in WRITTEN}
    for flag, path in written.items():
        _check_writable(flag, path)
    results = getattr(args, "results_dir", None)
    tables = [(results / name).resolve() for name in TABLES] if results is not None else []
    for flag, path in ((flag, path) for flag, several in paths.items() for path in several):
        if path.exists() and not path.is_dir():
            check_openable(path)
        if flag not in written:
            refuse_overwriting(written, {flag: path})
        if path.resolve() in tables:
            raise UserError(f"{flag} {path}: a table of --results-dir {results}; name another file")
    refuse_overwriting(written, {})


def _check_writable(flag: str, path: Path) -> None:
    """Before a command works for something that it cannot write at the end."""
    parent = next(folder for folder in Path(os.path.realpath(path)).parents if folder.exists())
    if not parent.is_dir():
        raise UserError(f"{flag} {path}: {parent} is a file, not a folder; name another")
    if not os.access(parent, os.W_OK | os.X_OK, effective_ids=True):
        raise UserError(
            f"{flag} {path}: no permission to write in {parent}; change that (chmod), or name another folder"
        )
