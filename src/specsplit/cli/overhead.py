"""specsplit overhead"""

from __future__ import annotations

import argparse
from pathlib import Path

from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.cli.measuring import leave
from specsplit.settings.measure import OverheadSettings


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, help="CSV table, one row a mode and gamma")
    add_setting_flags(parser, OverheadSettings)


def run(args: argparse.Namespace) -> None:
    import pandas as pd

    from specsplit.analysis.profile import summarize_overhead
    from specsplit.experiment.theory_check import measure_overhead
    from specsplit.launch.heartbeat import hold_lease
    from specsplit.provenance.run_file import describe_here

    settings = load_settings(OverheadSettings, args)
    hold_lease()
    run = describe_here()
    table = summarize_overhead(pd.DataFrame(measure_overhead(settings)))
    print(table.to_string(index=False, float_format="{:.3f}".format))
    leave(args.output, run, table)
