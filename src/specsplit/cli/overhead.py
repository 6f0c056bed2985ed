"""specsplit overhead"""

from __future__ import annotations

import argparse
from pathlib import Path

from specsplit.errors import UserError
from specsplit.settings.run import MODES


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, help="CSV table, one row a mode and gamma")
    parser.add_argument("--mode", dest="modes", nargs="+", choices=MODES, default=list(MODES), help="pipeline modes")
    parser.add_argument("--gamma", type=int, nargs="+", default=[3, 5], metavar="N", help="draft lengths, from 1")
    parser.add_argument("--tokens", type=int, default=400, help="length of a text")
    parser.add_argument("--texts", type=int, default=4, help="texts at each point")


def run(args: argparse.Namespace) -> None:
    import pandas as pd

    from specsplit.analysis.profile import summarize_overhead
    from specsplit.experiment.overhead import measure_overhead
    from specsplit.io import write_csv
    from specsplit.launch.lease import hold_lease

    for name, values, least in (("gamma", args.gamma, 1), ("tokens", [args.tokens], 2), ("texts", [args.texts], 1)):
        if min(values) < least:
            raise UserError(f"--{name} {min(values)}: wanted a whole number >= {least}")
    hold_lease()
    table = summarize_overhead(
        pd.DataFrame(measure_overhead(args.modes, args.gamma, tokens=args.tokens, texts=args.texts))
    )
    write_csv(table, args.output)
    print(table.to_string(index=False, float_format="{:.3f}".format))
    print(args.output)
