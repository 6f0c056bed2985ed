"""specsplit report"""

from __future__ import annotations

import argparse
from pathlib import Path

from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.settings.measure import IntervalSettings, PriceSettings


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results-dir", type=Path, required=True, help="folder with the tables, figures and record")
    parser.add_argument("--output", type=Path, help="the page (default: DIR/report.html)")
    add_setting_flags(parser, IntervalSettings, PriceSettings)


def run(args: argparse.Namespace) -> None:
    from specsplit.analysis.report import write_report

    output = args.output or args.results_dir / "report.html"
    prices = load_settings(PriceSettings, args)
    write_report(args.results_dir, output, **load_settings(IntervalSettings, args).model_dump(), prices=prices)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB, needs no other file")
