"""The `specsplit` command."""

from __future__ import annotations

import argparse
import difflib
import io
import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import specsplit
from specsplit import logs
from specsplit.errors import UserError
from specsplit.launch.lease import end_with_lease

# Every command, with its line of help. `provenance verify` is the module specsplit.cli.provenance.verify, which has
# `add_flags(parser)` and `run(args)`. A command with commands below it stands before them.
COMMANDS = {
    "generate": "write one text and show it as it comes",
    "serve": "serve a pair over HTTP with OpenAI's API until SIGTERM",
    "worker": "serve a draft or target model over gRPC until SIGTERM",
    "start-worker": "start a worker in the background, or attach to a running one",
    "stop-worker": "stop a worker that start-worker started",
    "bench": "run prompts against two workers at every point of a sweep",
    "merge": "put run folders together into requests.csv and per_round.csv",
    "figures": "figures alone from requests.csv and per_round.csv",
    "analyze": "summary.csv and figures from requests.csv and per_round.csv",
    "profile": "where a round's time goes, from requests.csv and per_round.csv",
    "capacity": "tokens/s, latency and goodput with many clients at once",
    "capacity-table": "capacity.csv and its figure from capacity_requests.csv",
    "openai-load": "specsplit serve under a load client from PyPI, gamma 0 beside other draft lengths",
    "peers-table": "peers.csv and its figure from peers_requests.csv",
    "context-curve": "what a token costs against the length of its context",
    "states-cost": "what it costs to ship the target's hidden states to a draft that reads them",
    "theory-check": "every pipeline mode with simulated models: measured time per token beside the formula's",
    "overhead": "what a round costs beyond model time: real workers on this machine, models that take no time",
    "prepare-model": "fetch a model, check it, and make a local folder of it",
    "fetch-dataset": "fetch a standard set of prompts, or a dataset of the Hugging Face Hub",
    "prepare-dataset": "check prompts and take a stratified slice of them",
    "calibration-prompts": "take a slice of those prompts that are not measured, to pick layers on",
    "pick-layers": "find decoder layers that a draft of the same model can skip",
    "distill": "make a small draft from a target: its own text, trained on",
    "distill write-data": "1: the target writes the training text; goes on where it was",
    "distill train": "2: train the draft; goes on from the last checkpoint",
    "distill measure": "3: acceptance by position, on prompts, without workers",
    "distill card": "4: the model card, the hashes and the figure of the three steps",
    "provenance": "the record of how results were made: check, compare, repeat",
    "provenance record": "write the record (the workflow does)",
    "provenance seal": "write a SHA256SUMS of finished results (the workflow does)",
    "provenance sign": "sign the seal of results with an SSH key",
    "provenance archive": "pack results into an RO-Crate (the workflow does)",
    "provenance verify": "recompute every hash and name what differs; exit status 1 when something does",
    "provenance diff": "what changed between two runs; exit status 1 when more than times did",
    "provenance reproduce": "print the commands that repeat an experiment, as a shell script",
    "report": "one HTML page with tables, figures, machine, commands and checklist",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit status 0: done; 1: failed; 2: wrong use; 130 after Ctrl-C, 143 after SIGTERM.

    Nothing that a user can do ends in a traceback: --debug shows the one behind a message.
    """
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the encoding of a terminal lacks is written as \uXXXX
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        # In blocks, even with PYTHONUNBUFFERED: what need not be seen at once is written, and may fail, at the end.
        sys.stdout.reconfigure(write_through=False, line_buffering=False)
    try:
        _run(argv)
    finally:
        _flush()


def _run(argv: Sequence[str]) -> None:
    args = build_parser(argv).parse_args(argv)
    if args.command != "worker":  # which looks after its lease itself
        end_with_lease()
    # As an exception, so that what was started is stopped on the way out. Workers have a handler of their own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        logs.set_up(args.command, getattr(args, "log_format", None))
        if any(name.startswith("SPECSPLIT_") for name in os.environ):
            import_module("specsplit.settings.environment").check_environment()
        from specsplit.cli.overwriting import check_paths

        check_paths(args)
        args.run(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _end(args, error)


def _flush() -> None:
    """Write what is left; a reader that has seen enough of what is done is no error."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()


def _drop_output() -> None:
    """Let go of what Python would flush at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end(args: argparse.Namespace, error: Exception) -> NoReturn:
    """Say what failed, with the traceback if --debug wants it, and exit."""
    status = 2
    if isinstance(error, BrokenPipeError) and _reader_gone():
        message, status = "standard output was closed before the command was done", 1
        _drop_output()
    elif isinstance(error, UserError):
        message, status = str(error), error.exit_status
    elif isinstance(error, OSError):  # no space, no permission
        named = error.filename is not None and error.filename2 is None
        message = f"{error.filename}: {error.strerror}" if named else str(error)
    elif str(error).startswith("Symlink loop from"):  # for which pathlib has no OSError
        message = str(error)
    elif isinstance(error, MemoryError):
        message, status = "out of memory: use a smaller model or context, or a machine with more", 1
    else:
        shown = " ".join(str(error).split())
        message, status = f"{type(error).__name__}: {shown} (--debug shows where; please report it)", 1
    if args.debug:
        traceback.print_exception(error)
    if logs.is_json():
        logging.getLogger(__name__).error("%s", message)
    else:
        print(f"specsplit {args.command}: error: {message}", file=sys.stderr)
    sys.exit(status)


def _reader_gone() -> bool:
    """Whether standard output is a pipe that nobody reads."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (AttributeError, OSError, ValueError):  # no real file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all commands. Only that of the command in `argv`, whose module is imported, knows its flags."""
    about = str(specsplit.__doc__).partition("\n")[0]
    parser: argparse.ArgumentParser = Parser(prog="specsplit", description=about)
    parser.add_argument("--version", action="version", version=f"specsplit {specsplit.__version__}")
    debug: dict[str, Any] = {"action": "store_true", "help": "show the traceback behind an error message"}
    parser.add_argument("--debug", **debug)
    subparsers = {"": parser.add_subparsers(dest="command", required=True, metavar="COMMAND")}
    words = [word for word in argv if not word.startswith("-")]
    for name, text in COMMANDS.items():
        group, _, word = name.rpartition(" ")
        command = subparsers[group].add_parser(word, help=text, description=text)
        if any(other.startswith(f"{name} ") for other in COMMANDS):
            subparsers[name] = command.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
        elif name.split() == words[: len(name.split())]:
            module = import_module(f"specsplit.cli.{name.replace('-', '_').replace(' ', '.')}")
            module.add_flags(command)
            command.add_argument("--debug", default=argparse.SUPPRESS, **debug)
            command.set_defaults(run=module.run)
    return parser


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations, and refuses unknown flags with a suggestion where those of its command are known."""

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
