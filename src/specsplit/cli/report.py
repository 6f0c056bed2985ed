"""specsplit report"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from specsplit.cli.flags import add_interval_flags, interval_settings


def add_commands(subparsers: Any) -> None:
    report = subparsers.add_parser("report", help="one HTML page with tables, figures, machine, commands and checklist")
    report.add_argument("--results-dir", type=Path, required=True, help="folder with the tables, figures and record")
    report.add_argument("--output", type=Path, help="the page (default: DIR/report.html)")
    add_interval_flags(report)
    report.set_defaults(run=run_report)


def run_report(args: argparse.Namespace) -> None:
    from specsplit.analysis.report import write_report

    output = args.output or args.results_dir / "report.html"
    write_report(args.results_dir, output, **interval_settings(args))
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB, needs no other file")
