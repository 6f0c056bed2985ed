"""specsplit provenance diff"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from specsplit.cli.provenance import WHERE


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A", help=WHERE)
    parser.add_argument("b", type=Path, metavar="B", help="another one")


def run(args: argparse.Namespace) -> None:
    from specsplit.errors import counted
    from specsplit.provenance.compare import compare
    from specsplit.provenance.folder import open_experiment

    with open_experiment(args.a) as a, open_experiment(args.b) as b:
        groups = compare(a, b)
    for group in groups:
        same = f"same{' but for times' if group.times else ''} ({group.same})"
        print(f"{group.name:8} {counted(len(group.differences), 'difference') if group.differences else same}")
        for line in (*group.differences, *group.times):
            print(f"  {line}")
    if any(group.differences for group in groups):
        sys.exit(1)
    print("Only times differ." if any(group.times for group in groups) else "Nothing differs.")
