"""specsplit provenance seal"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("files", type=Path, nargs="+")


def run(args: argparse.Namespace) -> None:
    from specsplit.errors import UserError
    from specsplit.io import replace_file, sha256_file
    from specsplit.provenance.folder import write_sums

    missing = [str(path) for path in args.files if not path.is_file()]
    if missing:
        raise UserError(f"{', '.join(missing)}: no such file; make it again with the workflow")
    replace_file(args.output, write_sums({path.as_posix(): sha256_file(path) for path in args.files}))
    print(f"{args.output}: {len(args.files)} files")
