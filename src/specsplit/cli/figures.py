"""specsplit figures"""

from __future__ import annotations

import argparse
from pathlib import Path

from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.settings.measure import IntervalSettings


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results-dir", type=Path, required=True, help="with requests.csv and per_round.csv")
    add_setting_flags(parser, IntervalSettings)


def run(args: argparse.Namespace) -> None:
    from specsplit.analysis.figures import draw_figures
    from specsplit.analysis.merging import read_tables

    settings = load_settings(IntervalSettings, args).model_dump()
    print(*draw_figures(*read_tables(args.results_dir), args.results_dir / "figures", **settings), sep="\n")
