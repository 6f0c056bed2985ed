"""specsplit provenance seal"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, required=True, help="results/provenance/SHA256SUMS; manifest.json goes beside it"
    )
    parser.add_argument(
        "--add",
        action="store_true",
        help="seal what jobs of the workflow made since; what else was changed or added is left for verify to name",
    )
    parser.add_argument("files", type=Path, nargs="*", help="files of the results that must be there")


def run(args: argparse.Namespace) -> None:
    from specsplit.errors import UserError, counted
    from specsplit.provenance.folder import SEAL
    from specsplit.provenance.seal import seal_results

    parts = Path(SEAL).parts[1:]
    if args.output.absolute().parts[-len(parts) :] != parts:
        raise UserError(f"--output {args.output}: wanted {SEAL}, in the folder of the results that it seals")
    sealed = seal_results(args.output.absolute().parents[1], args.files, add=args.add)
    print(f"{args.output}: {counted(sealed, 'file')}")
