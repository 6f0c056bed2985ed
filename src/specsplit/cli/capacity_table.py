"""specsplit capacity-table"""

from __future__ import annotations

import argparse
from pathlib import Path

from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.settings.measure import IntervalSettings, LatencyLimits, PriceSettings


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results-dir", type=Path, required=True, help="with capacity_requests.csv")
    without = ("bootstrap_samples", "seed")
    add_setting_flags(parser, LatencyLimits, IntervalSettings, PriceSettings, without=without)


def run(args: argparse.Namespace) -> None:
    from specsplit.analysis.capacity_table import write_capacity

    limits, prices = load_settings(LatencyLimits, args), load_settings(PriceSettings, args)
    confidence = load_settings(IntervalSettings, args).confidence
    paths = write_capacity(args.results_dir, **limits.model_dump(), confidence=confidence, prices=prices)
    print(*paths, sep="\n")
