"""specsplit provenance archive"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("files", type=Path, nargs="+", help="files of the results")


def run(args: argparse.Namespace) -> None:
    from specsplit.errors import counted
    from specsplit.io import sha256_file
    from specsplit.provenance.archive import write_archive

    files = counted(write_archive(args.output, args.files, Path.cwd()), "file")
    print(f"{args.output}: {files}, {args.output.stat().st_size / 1e6:.1f} MB, sha256 {sha256_file(args.output)}")
