"""specsplit context-curve"""

from __future__ import annotations

import argparse
from pathlib import Path

from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.cli.measuring import NOT_GREEDY, add_figure_flag, add_prompts_flag, add_workers_dir_flag, greedy, leave
from specsplit.errors import UserError, counted
from specsplit.settings.measure import ContextSettings
from specsplit.settings.run import OrchestratorConfig


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_prompts_flag(parser)
    parser.add_argument("--output", type=Path, required=True, help="CSV table, one row a gamma and length")
    add_figure_flag(parser)
    add_workers_dir_flag(parser)
    # Texts of a fixed length in mode sync.
    without = (
        *("mode", *NOT_GREEDY),
        *("max_output_tokens", "max_rounds", "ignore_eos", "stop", "stop_token_ids"),
    )
    add_setting_flags(parser, ContextSettings, OrchestratorConfig, without=without)


def run(args: argparse.Namespace) -> None:
    import pandas as pd

    from specsplit.analysis.context_figure import draw_context_curve, summarize_contexts
    from specsplit.cli.plan import at_gammas, connect
    from specsplit.experiment.context_curve import measure_contexts

    settings = load_settings(ContextSettings, args)
    length = {"ignore_eos": True, "max_output_tokens": settings.output_tokens}
    config = greedy(args, mode="sync", gamma=settings.gamma[0], **length)
    found = connect(args, settings, at_gammas(config, settings.gamma), own=length)
    limit = found.limit
    lengths = [length for length in sorted(set(settings.length)) if length + settings.output_tokens <= limit]
    left_out = sorted(set(settings.length) - set(lengths))
    if not lengths:
        raise UserError(
            f"--length {left_out[0]}: with {counted(settings.output_tokens, 'token')} more it exceeds "
            f"the {limit} of a worker"
        )
    if left_out:
        print(f"left out, for the workers hold {limit} tokens: {', '.join(map(str, left_out))}", flush=True)
    rows = []
    for row in measure_contexts(found.requests, found.configs, lengths, texts=settings.texts):
        rows.append(row)
        itl = "" if row.itl_ms is None else f", {row.itl_ms:.1f} ms a token"
        prefill = "" if row.ttft_ms is None else f"first token after {row.ttft_ms:.0f} ms"
        print(f"gamma {row.gamma}, {row.context_tokens} tokens of context: {prefill}{itl}", flush=True)
    leave(args.output, found.run, summarize_contexts(pd.DataFrame(rows)), draw=draw_context_curve, figure=args.figure)
