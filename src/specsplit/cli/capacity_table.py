"""specsplit capacity-table"""

from __future__ import annotations

import argparse
from pathlib import Path

from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.settings.measure import PriceSettings


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results-dir", type=Path, required=True, help="with capacity_requests.csv")
    parser.add_argument("--tpot-limit-ms", type=float, help="of the goodput (default: twice the median of one client)")
    parser.add_argument("--ttft-limit-ms", type=float, help="of the goodput as well (default: none)")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals (default: 0.95)")
    add_setting_flags(parser, PriceSettings)


def run(args: argparse.Namespace) -> None:
    from specsplit.analysis.capacity_table import write_capacity

    limits = args.tpot_limit_ms, args.ttft_limit_ms
    prices = load_settings(PriceSettings, args)
    print(*write_capacity(args.results_dir, *limits, confidence=args.confidence, prices=prices), sep="\n")
