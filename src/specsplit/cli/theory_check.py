"""specsplit theory-check"""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.cli.measuring import add_figure_flag, leave
from specsplit.errors import UserError
from specsplit.settings.measure import SimulationSettings


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, help="CSV table, one row a mode, round trip and gamma")
    add_figure_flag(parser)
    add_setting_flags(parser, SimulationSettings)


def run(args: argparse.Namespace) -> None:
    import pandas as pd

    from specsplit.analysis.theory_figure import draw_theory_check
    from specsplit.experiment.theory_check import check_theory
    from specsplit.launch.heartbeat import hold_lease
    from specsplit.provenance.run_file import describe_here

    settings = load_settings(SimulationSettings, args)
    hold_lease()
    run, rows = describe_here(), []
    with closing(check_theory(settings)) as checks:
        for row in checks:
            rows.append(row)
            beside = ""
            if row.ratio:
                beside = (
                    f"{row.expected_ms:6.2f} by formula: ratio {row.ratio:.3f}, {row.ratio_to_limit:.3f} with transport"
                )
            hits = "" if row.hit_rate is None else f"hits {row.hit_rate:.2f}"
            where = f"RTT {row.rtt_ms:3g}  {row.mode:9} gamma {row.gamma!s:4}"
            print(f"{where}  TPOT {row.tpot_ms:6.2f} ms  {beside}  {hits}".rstrip(), flush=True)
            if not row.lossless:
                raise UserError(
                    f"{row.mode} at gamma {row.gamma}, RTT {row.rtt_ms:g} ms: the text is not the target's own"
                )
    leave(args.output, run, pd.DataFrame(rows), draw=draw_theory_check, figure=args.figure)
