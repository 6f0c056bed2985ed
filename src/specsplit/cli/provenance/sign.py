"""specsplit provenance sign"""

from __future__ import annotations

import argparse
from pathlib import Path

from specsplit.cli.provenance import WHERE


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("where", type=Path, metavar="DIR", help=WHERE)
    parser.add_argument(
        "--key", type=Path, required=True, metavar="FILE", help="private SSH key, or a public one that an agent has"
    )


def run(args: argparse.Namespace) -> None:
    from specsplit.provenance.folder import open_experiment
    from specsplit.provenance.sign import sign

    with open_experiment(args.where) as experiment:
        print(f"{sign(experiment, args.key)}: signature of {experiment.seal} in {args.where}")
