"""What measuring commands share: flags, and what a measurement beside a sweep leaves."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specsplit.cli.flags import load_settings
from specsplit.settings.run import NO_NETWORK, OrchestratorConfig

if TYPE_CHECKING:
    from pandas import DataFrame


# Settings that have no effect on greedy texts without a simulated network.
NOT_GREEDY = ("temperature", *NO_NETWORK, "top_k", "top_p", "sampling", "draft_acceptance")


def greedy(args: argparse.Namespace, **own: Any) -> OrchestratorConfig:
    """The settings of such texts. own: what the measurement itself says of them."""
    return load_settings(OrchestratorConfig, args, **{"temperature": 0.0, **NO_NETWORK, **own})


def add_prompts_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts", type=Path, required=True, help="file of prompts: JSON lines, JSON, CSV, Parquet, Arrow"
    )


def add_workers_dir_flag(parser: argparse.ArgumentParser) -> None:
    """Where the workers of each point are."""
    text = "endpoint files DIR/POINT/ROLE.json, for points with workers of their own, not the two addresses"
    parser.add_argument("--workers-dir", type=Path, metavar="DIR", help=text)


def add_terminal_flag(parser: argparse.ArgumentParser) -> None:
    """Where progress is shown besides."""
    text = "show a bar on the terminal behind this descriptor as well"
    parser.add_argument("--terminal-fd", type=int, metavar="N", help=text)


def add_figure_flag(parser: argparse.ArgumentParser) -> None:
    """Where the table is drawn, if at all."""
    text = "also draw it: a path ending in .png; the .svg is put beside it"
    parser.add_argument("--figure", type=_png, metavar="FILE.png", help=text)


def _png(text: str) -> Path:
    if Path(text).suffix != ".png":
        raise argparse.ArgumentTypeError(f"{text}: a path that ends in .png")
    return Path(text)


def leave(
    output: Path,
    run: Mapping[str, Any],
    table: DataFrame | None = None,
    *,
    draw: Callable[[DataFrame, Path], Iterable[Path]] | None = None,
    figure: Path | None = None,
) -> None:
    """Leave what a measurement beside a sweep has made, and print the paths: table, run file, figure.

    run: what the run file says. table: None when `output` is there already. draw: draws the table to `figure`.
    """
    from specsplit.io import write_csv
    from specsplit.provenance.facts import beside_run
    from specsplit.provenance.run_file import write_run

    if table is not None:
        write_csv(table, output)
    write_run(beside_run(output), run, [output])
    print(output)
    if table is not None and draw is not None and figure is not None:
        print(*draw(table, figure), sep="\n")
