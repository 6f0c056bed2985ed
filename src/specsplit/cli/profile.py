"""specsplit profile"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results-dir", type=Path, required=True, help="for profile.csv and figures/profile.png")


def run(args: argparse.Namespace) -> None:
    from specsplit.analysis.profile import write_profile

    paths, shown = write_profile(args.results_dir)
    print(*paths, sep="\n")
    print("Means of a round, without the first of each text:")
    print(shown.to_string(index=False, float_format="{:.2f}".format))
