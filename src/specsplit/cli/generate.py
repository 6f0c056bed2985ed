"""specsplit generate"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.errors import UserError
from specsplit.settings.run import OrchestratorConfig

if TYPE_CHECKING:
    from specsplit.launch.endpoint import Endpoint


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", required=True, help="the prompt; - reads it from standard input")
    parser.add_argument(
        "--model",
        type=Path,
        help="start a draft and a target worker on this model folder for this one text, instead of using running ones",
    )
    parser.add_argument("--quiet", action="store_true", help="print the text alone, no figures after it")
    add_setting_flags(parser, OrchestratorConfig)


def run(args: argparse.Namespace) -> None:
    from specsplit import tracing
    from specsplit.api.pair import over_grpc
    from specsplit.errors import WorkerError
    from specsplit.launch.endpoint import resolve_address
    from specsplit.models.sources import resolve_model
    from specsplit.models.tokenizer import TextCodec

    if args.model is not None:
        args.tokenizer = args.tokenizer or args.model
    config = load_settings(OrchestratorConfig, args)
    tracing.wanted()  # tells at once what it lacks
    if config.tokenizer is None:
        raise UserError("no tokenizer: give --tokenizer FOLDER, or --model FOLDER to start workers as well")
    prompt = _prompt(args.prompt)
    codec = TextCodec.load(resolve_model(config.tokenizer)[0])
    with _addresses(args.model, config) as addresses:
        config = config.model_copy(update={role: resolve_address(a) for role, a in addresses.items()})
        with over_grpc(config, codec, has_draft=config.gamma != 0) as pair, pair.stream(prompt) as stream:
            try:
                for piece in stream:
                    print(piece, end="", flush=True)
            except WorkerError:
                print()  # the message stands below the text so far
                raise
            print()
    if not args.quiet:
        print(f"[{stream.text.summary()}]", file=sys.stderr)


def _prompt(given: str) -> str:
    """The prompt of the command line, or of standard input. Raises UserError when its bytes are not UTF-8."""
    # What of an argument is not UTF-8 stands in the string as halves of surrogate pairs.
    data = sys.stdin.buffer.read() if given == "-" else given.encode("utf-8", errors="surrogateescape")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = "standard input" if given == "-" else "--prompt"
        raise UserError(f"{where}: not UTF-8 (byte {error.start + 1})") from None


@contextmanager
def _addresses(model: Path | None, config: OrchestratorConfig) -> Iterator[dict[str, str]]:
    """Where the workers are; those started for this text are stopped again."""
    if model is None:
        yield {"draft_address": config.draft_address, "target_address": config.target_address}
        return
    from specsplit.launch.environment import threads_beside_another
    from specsplit.launch.start import own_workers, start_worker

    at_once = config.gamma != 0 and config.mode != "sync"
    threads = ["--threads", str(threads_beside_another())] if at_once else []
    arguments = ["--model", str(model), "--port", "0", *threads]

    def start(role: str, file: Path) -> Endpoint:
        print(f"starting the {role} worker ...", file=sys.stderr)
        log_file = file.with_suffix(".log")
        return start_worker(role, arguments, endpoint_file=file, log_file=log_file, timeout_s=300.0)

    roles = ("target", "draft") if config.gamma else ("target",)
    with own_workers({role: partial(start, role) for role in roles}) as started:
        yield {f"{role}_address": endpoint.address for role, endpoint in started.items()}
