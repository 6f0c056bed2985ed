"""specsplit peers-table"""

from __future__ import annotations

import argparse
from pathlib import Path

from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.settings.measure import IntervalSettings


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results-dir", type=Path, required=True, help="with peers_requests.csv")
    add_setting_flags(parser, IntervalSettings)


def run(args: argparse.Namespace) -> None:
    from specsplit.analysis.peers_table import write_peers

    print(*write_peers(args.results_dir, **load_settings(IntervalSettings, args).model_dump()), sep="\n")
