"""specsplit generate"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.cli.worker_flags import workers_for
from specsplit.errors import UserError
from specsplit.settings.run import OrchestratorConfig


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
    from specsplit.models.sources import tokenizer_folder
    from specsplit.models.tokenizer import TextCodec

    if args.model is not None:
        args.tokenizer = args.tokenizer or args.model
    config = load_settings(OrchestratorConfig, args)
    tracing.wanted()  # tells at once what it lacks
    if config.tokenizer is None:
        raise UserError("no tokenizer: give --tokenizer FOLDER, or --model FOLDER to start workers as well")
    prompt = _prompt(args.prompt)
    codec = TextCodec.load(tokenizer_folder(config.tokenizer))
    codec.encode(prompt, use_chat_template=config.use_chat_template)  # what cannot be encoded starts no worker
    models = {} if args.model is None else dict.fromkeys(("target", "draft")[: 2 if config.gamma else 1], args.model)
    with (
        workers_for(models, config) as found,
        over_grpc(found, codec, has_draft=found.gamma != 0) as pair,
        pair.stream(prompt) as stream,
    ):
        try:
            for piece in stream:
                print(piece, end="", flush=True)
        except WorkerError:
            print()  # the message stands below the text so far
            raise
        except BrokenPipeError:  # the reader has seen enough of the text
            return
        print()
    if not args.quiet:
        print(f"[{stream.text.summary()}]", file=sys.stderr)


def _prompt(given: str) -> str:
    """The prompt of the command line, or of standard input. Raises UserError when its bytes are not UTF-8."""
    # Bytes of an argument that are not UTF-8 are halves of surrogate pairs in the string.
    data = sys.stdin.buffer.read() if given == "-" else given.encode("utf-8", errors="surrogateescape")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = "standard input" if given == "-" else "--prompt"
        raise UserError(f"{where}: not UTF-8 (byte {error.start + 1})") from None
