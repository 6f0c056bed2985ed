"""Flags that several measuring commands share."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_prompts_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts", type=Path, required=True, help="file of prompts: JSON lines, JSON, CSV, Parquet, Arrow"
    )


def add_workers_dir_flag(parser: argparse.ArgumentParser) -> None:
    """Where the workers of each point are."""
    text = "endpoint files DIR/POINT/ROLE.json, for points with workers of their own, not the two addresses"
    parser.add_argument("--workers-dir", type=Path, metavar="DIR", help=text)


def add_figure_flag(parser: argparse.ArgumentParser) -> None:
    """Where the table is drawn, if at all."""
    text = "also draw it: a path ending in .png; the .svg is put beside it"
    parser.add_argument("--figure", type=_png, metavar="FILE.png", help=text)


def _png(text: str) -> Path:
    if Path(text).suffix != ".png":
        raise argparse.ArgumentTypeError(f"{text}: a path that ends in .png")
    return Path(text)
