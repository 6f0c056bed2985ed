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
    from specsplit.analysis.merging import merge_runs
    from specsplit.analysis.references import REFERENCE, merged_references
    from specsplit.io import write_csv

    run_dirs = args.run_dirs or sorted((args.results_dir / "runs").glob("*"))
    if not run_dirs:
        raise UserError(f"{args.results_dir / 'runs'} has no run folders; make them with `specsplit bench`")
    asked = MergeSettings in args.settings_classes and load_settings(MergeSettings, args).keep_apart
    requests, rounds = merge_runs(run_dirs, keep_apart=asked)
    reference = merged_references(run_dirs, requests)
    (args.results_dir / REFERENCE).unlink(missing_ok=True)  # of an earlier sweep
    for name, frame in (("requests.csv", requests), ("per_round.csv", rounds), (REFERENCE, reference)):
        if frame is not None:
            write_csv(frame, args.results_dir / name)
            print(f"{args.results_dir / name}: {len(frame)} rows")
