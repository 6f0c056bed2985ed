"""specsplit prepare-dataset"""

from __future__ import annotations

import argparse
from pathlib import Path

from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.settings.measure import PromptSettings


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", type=Path, required=True, help="JSONL with prompt, conversations or turns")
    parser.add_argument("--output", type=Path, required=True, help="normalised JSONL")
    parser.add_argument("--manifest", type=Path, required=True, help="JSON: hashes, counts, skipped lines")
    add_setting_flags(parser, PromptSettings)


def run(args: argparse.Namespace) -> None:
    from specsplit.experiment.dataset import prepare_dataset

    manifest = prepare_dataset(
        args.source, args.output, args.manifest, **load_settings(PromptSettings, args).model_dump()
    )
    print(f"{args.output}: {manifest['count']} of {manifest['available']} prompts, sha256 {manifest['output_sha256']}")
    for line in manifest["skipped"]:
        print(f"skipped {args.source}:{line['line']}: {line['reason']}")
