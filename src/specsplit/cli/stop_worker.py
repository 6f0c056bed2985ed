"""specsplit stop-worker"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("endpoint_file", type=Path, help="its endpoint file")


def run(args: argparse.Namespace) -> None:
    from specsplit.launch.start import stop_worker

    endpoint = stop_worker(args.endpoint_file)
    if endpoint is None:
        print(f"{args.endpoint_file} is not there: nothing to stop")
    elif endpoint.attached:
        print(f"{args.endpoint_file} deleted; the worker at {endpoint.address} runs on, for it was attached to")
    elif endpoint.shared:
        print(f"{args.endpoint_file} deleted; the worker at {endpoint.address} stops when nobody uses it any more")
    else:
        print(f"stopped process {endpoint.pid}")
