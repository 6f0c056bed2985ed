"""specsplit distill card"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from specsplit.errors import UserError


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--draft", type=Path, required=True, metavar="FOLDER", help="gets MODEL_CARD.md and SHA256SUMS")
    parser.add_argument("--training", type=Path, required=True, metavar="FILE.json", help="report of train")
    parser.add_argument("--losses", type=Path, required=True, metavar="FILE.csv", help="loss curve of train")
    parser.add_argument("--acceptance", type=Path, required=True, metavar="FILE.csv", help="table of measure")
    parser.add_argument("--measured", type=Path, required=True, metavar="FILE.json", help="report of measure")
    parser.add_argument("--figure", type=Path, required=True, metavar="FILE.png", help="and .svg beside it")


def run(args: argparse.Namespace) -> None:
    from specsplit.distill.card import CARD, write_card
    from specsplit.distill.distill_figure import draw_distillation
    from specsplit.io import read_json_object

    training, measured = read_json_object(args.training), read_json_object(args.measured)
    if training["weights_sha256"] != measured["draft"]["weights_sha256"]:
        raise UserError(f"{args.measured} is of another draft than {args.training}: measure this one")
    losses, acceptance = _read_table(args.losses), _read_table(args.acceptance)
    write_card(args.draft, training, acceptance, measured)
    print(args.draft / CARD, *draw_distillation(losses, acceptance, args.figure), sep="\n")


def _read_table(path: Path) -> Any:
    import pandas as pd

    try:
        return pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a table that can be read: {error}") from None
