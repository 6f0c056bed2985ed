"""specsplit calibration-prompts"""

from __future__ import annotations

import argparse
from pathlib import Path

from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.errors import UserError
from specsplit.settings.measure import PromptSettings


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", type=Path, required=True, help="JSONL that prepare-dataset took a slice of")
    parser.add_argument("--measured", type=Path, required=True, help="that slice, whose prompts are not taken")
    parser.add_argument("--output", type=Path, required=True, help="normalised JSONL")
    add_setting_flags(parser, PromptSettings)


def run(args: argparse.Namespace) -> None:
    from specsplit.experiment.dataset import write_calibration_prompts

    settings = load_settings(PromptSettings, args)
    if settings.limit is None:
        raise UserError("--limit is missing: how many prompts to take")
    write_calibration_prompts(
        args.source,
        args.measured,
        args.output,
        limit=settings.limit,
        on_bad_line=settings.on_bad_line,
        columns=settings.columns,
    )
    print(args.output)
