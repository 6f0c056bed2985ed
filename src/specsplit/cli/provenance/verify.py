"""specsplit provenance verify"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from specsplit.cli.provenance import WHERE
from specsplit.errors import counted


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("where", type=Path, metavar="DIR", help=WHERE)
    parser.add_argument(
        "--signer", type=Path, metavar="FILE", help="public SSH keys, one a line: one of them must have signed the seal"
    )


def run(args: argparse.Namespace) -> None:
    from specsplit.provenance.folder import open_experiment
    from specsplit.provenance.sign import check_signatures
    from specsplit.provenance.verify import verify

    with open_experiment(args.where) as experiment:
        verdict = verify(experiment)
        for signature, problem, note in check_signatures(experiment, args.signer):
            if problem:
                verdict.differing[str(signature)] = problem
            if note:
                verdict.notes.append(note)
    for note in verdict.notes:
        print(f"note: {note}")
    for file, problem in sorted(verdict.differing.items()):
        print(f"DIFFERS {file}: {problem}")
    print(f"{args.where}: {counted(len(verdict.checked), 'file')} as recorded, {len(verdict.differing)} not")
    if verdict.differing:
        sys.exit(1)
