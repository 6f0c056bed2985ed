"""What the workflow ran: its own command, and the command and time of each step that made a file."""

from __future__ import annotations

import json
import os
import shlex
import sys
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from specsplit.errors import UserError
from specsplit.io import read_json_object
from specsplit.provenance.redaction import redact_arguments, redact_text

COMMAND = "SPECSPLIT_WORKFLOW_COMMAND"
NAME_LENGTH = 254  # Snakemake cuts longer names into folders: the longest name of a file, less one


def remember_workflow(cores: int | None, config_files: Sequence[str]) -> None:
    """Leave the command line of this Snakemake in the environment, for the jobs that it starts.

    Neither inputs nor parameters of the rules: another way to ask for the same results reruns nothing.
    """
    told = {"argv": ["snakemake", *sys.argv[1:]], "cores": cores, "config_files": list(config_files)}
    os.environ.setdefault(COMMAND, json.dumps(told))  # jobs read the Snakefile too


def workflow_command() -> dict[str, Any]:
    """{command, argv, cores, config_files, reason} of the Snakemake that this process is a job of."""
    try:
        told = json.loads(os.environ[COMMAND])
    except (KeyError, ValueError):
        reason = "not started by the workflow, or on a host that does not get its environment"
        return {**dict.fromkeys(("command", "argv", "cores", "config_files")), "reason": reason}
    argv = redact_arguments(told["argv"])
    return {
        "command": shlex.join(argv),
        "argv": argv,
        "cores": told["cores"],
        "config_files": told["config_files"],
        "reason": None if told["cores"] else "cores: the scheduler decides",
    }


def read_steps(outputs: Sequence[str], root: Path) -> list[dict[str, Any]]:
    """The finished steps that made these files, in the order of their ends, each as {rule, command, started, finished,
    exit_code, inputs, outputs, log, reason}; inputs without source files.

    outputs: paths as the rules name them, relative to `root`, the project's folder. They are read from what Snakemake
    keeps below .snakemake/metadata, which it writes only when a job succeeds; a step of which nothing is kept there
    has nulls. command is null for a rule with a script.
    """
    steps: dict[tuple[Any, ...], dict[str, Any]] = {}
    unknown = []
    for output in outputs:
        kept = _metadata(output, root)
        if not kept.get("rule"):
            unknown.append(output)
            continue
        key = (kept["rule"], tuple(kept.get("log") or ()), kept.get("shellcmd"))
        step = steps.setdefault(key, _step(kept))
        step["outputs"].append(output)
        # The end that Snakemake keeps of a file is when it was written.
        step["finished"] = max(filter(None, (step["finished"], _utc(kept.get("endtime")))), default=None)
    known = sorted(steps.values(), key=lambda step: (step["finished"] or "", step["rule"], step["outputs"]))
    if unknown:
        nothing = dict.fromkeys(("rule", "command", "started", "finished", "exit_code"))
        known.append(
            {
                **nothing,
                "inputs": [],
                "outputs": unknown,
                "log": [],
                "reason": "Snakemake kept no record of these files",
            }
        )
    return known


def _step(kept: dict[str, Any]) -> dict[str, Any]:
    command = kept.get("shellcmd")
    return {
        "rule": kept["rule"],
        "command": redact_text(command) if command else None,
        "started": _utc(kept.get("starttime")),
        "finished": _utc(kept.get("endtime")),
        "exit_code": 0,
        "inputs": [name for name in kept.get("input") or [] if not name.startswith("src/")],
        "outputs": [],
        "log": list(kept.get("log") or []),
        "reason": None if command else "command: the rule runs a script of the workflow",
    }


def _utc(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _metadata(output: str, root: Path) -> dict[str, Any]:
    name = urlsafe_b64encode(output.encode()).decode()
    parts = [name[i : i + NAME_LENGTH] for i in range(0, len(name), NAME_LENGTH)]
    path = root.joinpath(".snakemake", "metadata", *(f"@{part}" for part in parts[:-1]), parts[-1])
    try:
        return read_json_object(path)
    except UserError:
        return {}
