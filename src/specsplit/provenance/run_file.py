"""run.json, and NAME_run.json of what is measured beside a sweep: how tables were made, with their hashes and its own.

Whoever joins or seals tables later reads these files with `read_run`, so a table that was edited since is refused and
not sealed anew.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import specsplit
from specsplit.errors import UserError
from specsplit.io import json_sha256, read_json_object, sha256_file, write_json
from specsplit.provenance.capture import capture_environment, capture_machine, capture_software, utc_now
from specsplit.provenance.closure import code_sha256
from specsplit.provenance.gpu import capture_gpu
from specsplit.provenance.redaction import redact, redact_arguments, without_places


def write_run(path: Path, run: Mapping[str, Any], tables: Iterable[Path]) -> None:
    """Write what a measurement was, without secrets and places of the machine. tables: what it left beside `path`."""
    told = redact(without_places(dict(run), Path.cwd()))
    told["files"] = {table.name: sha256_file(table) for table in tables if table.is_file()}
    write_json(path, {**told, "sha256": json_sha256(told)})


def read_run(path: Path) -> dict[str, Any]:
    """What `write_run` wrote. Raises UserError when it or a table was edited since; earlier versions kept no hashes."""
    run = read_json_object(path)
    mend = f"put back what was there, or delete {path} and measure again"
    if "sha256" in run and run["sha256"] != json_sha256({key: run[key] for key in run if key != "sha256"}):
        raise UserError(f"{path}: was edited after it was written: its content is not that of its own hash; {mend}")
    for name, digest in (run.get("files") or {}).items():
        table = path.with_name(name)
        if not table.is_file():
            raise UserError(f"{table}: no such file, and {path} lists it; {mend}")
        if sha256_file(table) != digest:
            raise UserError(f"{table}: is not what was measured: {path} has another sha256; {mend}")
    return run


def beside_run(table: Path) -> Path:
    """The run file of a table beside the sweep, or of its rows: capacity_run.json of capacity_requests.csv."""
    return table.with_name(f"{table.stem.removesuffix('_requests')}_run.json")


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
