"""specsplit profile"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results-dir", type=Path, required=True, help="for profile.csv and figures/profile.png")


def run(args: argparse.Namespace) -> None:
    from specsplit.analysis.configurations import keys_of
    from specsplit.analysis.merging import read_tables
    from specsplit.analysis.profile import PARTS, draw_profile, profile
    from specsplit.analysis.tables import comparable
    from specsplit.io import write_csv

    table = profile(comparable(*read_tables(args.results_dir))[1])
    for path in draw_profile(table, args.results_dir / "figures" / "profile.png"):
        print(path)
    write_csv(table, args.results_dir / "profile.csv")
    print(args.results_dir / "profile.csv")
    varied = [name for name in keys_of(table) if name == "gamma" or table[name].nunique() > 1]
    shown = table.loc[table["phase"] == "decode", [*varied, "rounds", "round_ms", *PARTS, "ms_per_token"]]
    print("Means of a round, without the first of each text:")
    print(shown.to_string(index=False, float_format="{:.2f}".format))
