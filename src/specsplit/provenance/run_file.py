"""Writes run.json, and NAME_run.json of what is measured beside a sweep: how tables were made, with their hashes.

Whoever joins or seals tables later reads these files with `facts.read_run`, so a table that was edited since is refused
and not sealed anew.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import specsplit
from specsplit.io import json_sha256, sha256_file, write_json
from specsplit.provenance.capture import capture_environment, capture_machine, capture_software, utc_now
from specsplit.provenance.closure import code_sha256
from specsplit.provenance.gpu import capture_gpu
from specsplit.provenance.redaction import redact, redact_arguments, without_places


def write_run(path: Path, run: Mapping[str, Any], tables: Iterable[Path]) -> None:
    """Write what a measurement was, without secrets and places of the machine. tables: what it left beside `path`."""
    told = redact(without_places(dict(run), Path.cwd()))
    told["files"] = {table.name: sha256_file(table) for table in tables if table.is_file()}
    write_json(path, {**told, "sha256": json_sha256(told)})


def describe_here() -> dict[str, Any]:
    """Where and with what this process measures, as keys of a run file."""
    return {
        "command": shlex.join(redact_arguments(["specsplit", *sys.argv[1:]])),
        "started": utc_now(),
        "environment": capture_environment(),
        "machine": capture_machine(),
        "gpu": {"before": capture_gpu()},
        "software": capture_software(),
        "specsplit_version": specsplit.__version__,
        "worker_code_sha256": code_sha256("worker"),
    }
