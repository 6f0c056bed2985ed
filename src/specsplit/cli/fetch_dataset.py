"""specsplit fetch-dataset"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from specsplit.errors import UserError, counted, listed
from specsplit.settings.measure import StandardName


def add_flags(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--name", choices=get_args(StandardName), help="a standard set")
    source.add_argument("--huggingface", metavar="OWNER/NAME", help="a dataset of the Hub, or a folder of data files")
    parser.add_argument("--config", help="with --huggingface: its configuration")
    parser.add_argument("--split", help="with --huggingface: its split (default: the only one, or test)")
    parser.add_argument("--revision", help="with --huggingface: branch, tag or commit")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE.jsonl", help="FILE.json says where it is from"
    )
    parser.add_argument(
        "--downloads", type=Path, metavar="FOLDER", help="where files are kept (default: downloads beside the output)"
    )


def run(args: argparse.Namespace) -> None:
    from specsplit.experiment.fetching import fetch_hub, fetch_standard

    if args.output.suffix != ".jsonl":
        raise UserError(
            f"--output {args.output}: a path that ends in .jsonl; the .json beside it says where it is from"
        )
    if args.name:
        if args.config or args.split or args.revision:
            raise UserError("--config, --split and --revision go with --huggingface; a standard set has its own")
        facts = fetch_standard(args.name, args.output, args.downloads or args.output.parent / "downloads")
    else:
        facts = fetch_hub(args.huggingface, args.config, args.split, args.revision, args.output)
    print(
        f"{args.output}: {counted(facts['count'], 'row')} of {facts['name']}, revision {facts['revision'] or 'unknown'}"
    )
    if facts.get("note"):
        print(facts["note"])
    if rows := [f"row {row['row']}: {row['reason']}" for row in facts.get("left_out", ())]:
        print(f"left out, all in {args.output.with_suffix('.json')}:", listed(rows, 10, "\n"), sep="\n")
