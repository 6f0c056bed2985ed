"""specsplit merge"""

from __future__ import annotations

import argparse
from pathlib import Path

from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.errors import UserError
from specsplit.settings.measure import MergeSettings


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results-dir", type=Path, required=True)
    parser.add_argument("run_dirs", type=Path, nargs="*", help="run folders (default: DIR/runs/*)")
    add_setting_flags(parser, MergeSettings)


def run(args: argparse.Namespace) -> None:
    from specsplit.analysis.merging import write_merged

    run_dirs = args.run_dirs or sorted((args.results_dir / "runs").glob("*"))
    if not run_dirs:
        raise UserError(f"{args.results_dir / 'runs'} has no run folders; make them with `specsplit bench`")
    keep_apart = load_settings(MergeSettings, args).keep_apart
    print(*write_merged(args.results_dir, run_dirs, keep_apart=keep_apart), sep="\n")
