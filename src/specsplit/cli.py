"""The `specsplit` command."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import specsplit
from specsplit.commands import decode, measure, prepare, record, serve
from specsplit.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit status 0; 2 for a mistake that the user can mend; 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s" if args.command == "worker" else "%(message)s",
    )
    for noisy in ("httpx", "urllib3", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        args.run(args)
    except UserError as error:
        print(f"specsplit {args.command}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)  # the reader of our output has seen enough


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; each sets `run` to its function."""
    parser = argparse.ArgumentParser(prog="specsplit", description=specsplit.__doc__)
    parser.add_argument("--version", action="version", version=f"specsplit {specsplit.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (decode, serve, measure, prepare, record):
        module.add_commands(subparsers)
    return parser
