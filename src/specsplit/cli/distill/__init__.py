"""specsplit distill write-data | train | measure | card"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_target_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", type=Path, required=True, metavar="FOLDER", help="the target, prepared or local")
