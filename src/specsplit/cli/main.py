"""The `specsplit` command."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence

import specsplit
from specsplit import logs
from specsplit.cli import bench, capacity, distill, drafts, generate, prepare, provenance, report, simulate, workers
from specsplit.errors import UserError
from specsplit.launch.lease import end_with_lease


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit status 0; 2 for what the user can mend; 130 after Ctrl-C, 143 after SIGTERM."""
    args = build_parser().parse_args(argv)
    if args.command != "worker":  # which looks after its lease itself
        end_with_lease()
    # As an exception, so that what was started is stopped on the way out. Workers have a handler of their own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        logs.set_up(args.command, getattr(args, "log_format", None))
        args.run(args)
        sys.stdout.flush()  # here, where a closed pipe is dealt with
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
    except (UserError, OSError) as error:  # OSError: no space, no permission; it names the file
        if logs.is_json():
            logging.getLogger(__name__).error("%s", error)
        else:
            print(f"specsplit {args.command}: error: {error}", file=sys.stderr)
        sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; each sets `run` to its function."""
    parser = argparse.ArgumentParser(prog="specsplit", description=specsplit.__doc__)
    parser.add_argument("--version", action="version", version=f"specsplit {specsplit.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (generate, workers, bench, capacity, simulate, prepare, drafts, distill, provenance, report):
        module.add_commands(subparsers)
    return parser
