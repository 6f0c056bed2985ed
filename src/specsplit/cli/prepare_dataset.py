"""specsplit prepare-dataset"""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path

from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.errors import counted
from specsplit.settings.measure import PromptSettings, TokenSettings


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source",
        type=Path,
        required=True,
        help="file of prompts: JSON lines, JSON, CSV, Parquet, Arrow, or saved dataset",
    )
    parser.add_argument("--output", type=Path, required=True, help="normalised JSON lines")
    parser.add_argument("--manifest", type=Path, required=True, help="JSON: hashes, counts, what was not taken")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="also write the token ids that this model gets, so that every run gets the same",
    )
    add_setting_flags(parser, PromptSettings, TokenSettings)


def run(args: argparse.Namespace) -> None:
    from specsplit.experiment.dataset import prepare_dataset, tell

    tokens = load_settings(TokenSettings, args)
    codec = None
    if args.tokenizer is not None:
        from specsplit.models.sources import tokenizer_folder
        from specsplit.models.tokenizer import TextCodec

        codec = TextCodec.load(tokenizer_folder(args.tokenizer))
    manifest = prepare_dataset(
        args.source,
        args.output,
        args.manifest,
        **load_settings(PromptSettings, args).model_dump(),
        codec=codec,
        use_chat_template=tokens.use_chat_template,
        date=None if tokens.date is None else datetime.fromisoformat(tokens.date),
    )
    prompts = counted(manifest["available"], "prompt")
    print(f"{args.output}: {manifest['count']} of {prompts}, sha256 {manifest['output_sha256']}")
    for line in tell(args.source, manifest["skipped"], manifest):
        print(line)
