"""Flags that bench, capacity and context-curve share."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_prompts_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL file of prompts")


def add_workers_dir_flag(parser: argparse.ArgumentParser) -> None:
    """Where the workers of each point are."""
    text = "endpoint files DIR/POINT/ROLE.json, for points with workers of their own, not the two addresses"
    parser.add_argument("--workers-dir", type=Path, metavar="DIR", help=text)
