"""specsplit theory-check"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from specsplit.errors import UserError


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, help="CSV table, one row a mode, round trip and gamma")
    parser.add_argument("--figure", type=Path, help="also draw it: a path ending in .png; the .svg is put beside it")
    parser.add_argument("--gamma", nargs="+", default=["3", "5", "7", "9", "auto"], metavar="N", help="numbers or auto")
    parser.add_argument("--rtt-ms", nargs="+", type=float, default=[0.0, 14.0, 50.0], metavar="MS", help="round trips")
    parser.add_argument("--acceptance", type=float, default=0.8, help="probability that a drafted token is accepted")
    parser.add_argument("--draft-ms", type=float, default=3.0, help="time of a pass of the draft")
    parser.add_argument("--verify-ms", type=float, default=30.0, help="time of a pass of the target")
    parser.add_argument("--fan-out", type=int, default=16, help="outcomes that lookahead prepares drafts for")
    parser.add_argument("--tokens", type=int, default=400, help="length of a text")
    parser.add_argument("--texts", type=int, default=2, help="texts at each point")
    parser.add_argument("--seed", type=int, default=0, help="of the simulated text")


def run(args: argparse.Namespace) -> None:
    import pandas as pd

    from specsplit.analysis.theory_figure import draw_theory_check
    from specsplit.experiment.theory_check import Simulation, check_theory
    from specsplit.io import write_csv
    from specsplit.launch.lease import hold_lease

    if not 0 < args.acceptance < 1:
        raise UserError(f"--acceptance {args.acceptance}: a probability between 0 and 1")
    for name in ("draft_ms", "verify_ms"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: a time above 0 ms")
    for name in ("fan_out", "tokens", "texts"):
        if getattr(args, name) < (2 if name == "tokens" else 1):
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} is too small")
    if bad := [rtt for rtt in args.rtt_ms if not 0 <= rtt < float("inf")]:
        raise UserError(f"--rtt-ms {bad[0]}: a time of 0 ms or more")
    if args.figure is not None and args.figure.suffix != ".png":
        raise UserError(f"--figure {args.figure}: a path that ends in .png")
    hold_lease()
    simulation = Simulation(**{f.name: getattr(args, f.name) for f in fields(Simulation)})
    gammas = [int(gamma) if gamma.isdecimal() else gamma for gamma in args.gamma]

    def show(row: Any) -> None:
        beside = ""
        if row.ratio:
            beside = (
                f"{row.expected_ms:6.2f} by formula: ratio {row.ratio:.3f}, {row.ratio_to_limit:.3f} with transport"
            )
        hits = "" if row.hit_rate is None else f"hits {row.hit_rate:.2f}"
        where = f"RTT {row.rtt_ms:3g}  {row.mode:9} gamma {row.gamma!s:4}"
        print(f"{where}  TPOT {row.tpot_ms:6.2f} ms  {beside}  {hits}".rstrip(), flush=True)
        if not row.lossless:
            raise UserError(f"{row.mode} at gamma {row.gamma}, RTT {row.rtt_ms:g} ms: the text is not the target's own")

    table = pd.DataFrame(check_theory(simulation, gammas, args.rtt_ms, show))
    write_csv(table, args.output)
    print(args.output)
    if args.figure is not None:
        for path in draw_theory_check(table, args.figure):
            print(path)
