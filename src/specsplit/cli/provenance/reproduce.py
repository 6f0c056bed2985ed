"""specsplit provenance reproduce"""

from __future__ import annotations

import argparse
from pathlib import Path

from specsplit.cli.provenance import WHERE


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("where", type=Path, metavar="DIR", help=WHERE)


def run(args: argparse.Namespace) -> None:
    from specsplit.provenance.folder import open_experiment
    from specsplit.provenance.reproduce import reproduction

    with open_experiment(args.where) as experiment:
        print(reproduction(experiment, args.where.resolve() if args.where.suffix == ".zip" else None), end="")
