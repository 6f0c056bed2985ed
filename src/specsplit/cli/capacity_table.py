"""specsplit capacity-table"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results-dir", type=Path, required=True, help="with capacity_requests.csv")
    parser.add_argument("--tpot-limit-ms", type=float, help="of the goodput (default: twice the median of one client)")
    parser.add_argument("--ttft-limit-ms", type=float, help="of the goodput as well (default: none)")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals (default: 0.95)")


def run(args: argparse.Namespace) -> None:
    from specsplit.analysis.capacity_table import write_capacity

    for path in write_capacity(args.results_dir, args.tpot_limit_ms, args.ttft_limit_ms, confidence=args.confidence):
        print(path)
