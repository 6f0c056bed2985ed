"""What the workflow ran: its own command, and the command and time of each job that made a file."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from specsplit.io import sha256_file, utc_text
from specsplit.provenance.redaction import redact_arguments, redact_text

COMMAND = "SPECSPLIT_WORKFLOW_COMMAND"
STEPS = Path(".snakemake/specsplit-steps.jsonl")  # lines for each job that began and ended, in the project's folder


def remember_workflow(cores: int | None, config_files: Sequence[str]) -> None:
    """Pass the command line of this Snakemake to its jobs through the environment, and log each job to STEPS.

    Neither is an input or a parameter of a rule: asking for the same results in another way reruns nothing. Jobs read
    the Snakefile too; there this does nothing.
    """
    if COMMAND in os.environ:
        return
    command: dict[str, Any] = {"argv": ["snakemake", *sys.argv[1:]], "cores": cores, "config_files": list(config_files)}
    command["started"] = time.time()
    os.environ[COMMAND] = json.dumps(command)
    logging.getLogger("snakemake.logging").addHandler(StepLog(STEPS.absolute()))


class StepLog(logging.Handler):
    """Appends a line to `path` for each job that Snakemake starts, and one with the hashes of its files when it ended.

    It reads the events job_started, job_info and job_finished that Snakemake documents for logger plugins
    (snakemake_interface_logger_plugins.common.LogEvent). A dry run has no job_started and leaves no line.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._runs_jobs = False
        self._files: dict[int, list[str]] = {}  # of the jobs that have begun

    def emit(self, record: logging.LogRecord) -> None:
        event = getattr(record, "event", None)
        job: dict[str, Any] = record.__dict__
        self._runs_jobs = self._runs_jobs or event == "job_started"
        if event == "job_finished":
            # No job that reads these files has begun yet.
            root, files = self._path.parents[1], self._files.pop(job.get("job_id", -1), [])
            self._append(record, {"sha256": {f: sha256_file(root / f) for f in files if (root / f).is_file()}})
        if event != "job_info" or not self._runs_jobs:
            return
        step = {
            "rule": job["rule_name"],
            "command": redact_text(job["shellcmd"]) if job["shellcmd"] else None,
            "started": _utc(record.created),
            "inputs": [name for name in map(_plain, job["input"]) if not name.startswith("src/")],
            "outputs": [_plain(name) for name in job["output"]],
            "log": [_plain(name) for name in job["log"]],
        }
        self._files[job.get("jobid", -1)] = [*step["outputs"], *step["log"]]
        self._append(record, step)

    def _append(self, record: logging.LogRecord, line: Mapping[str, Any]) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:  # one write a line, so that lines never mix
                file.write(json.dumps(line).encode() + b"\n")
        except OSError:
            self.handleError(record)


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

    outputs: paths as the rules name them, relative to `root`, the project's folder. Of several jobs that made a file
    the last one counts; Snakemake deletes the files of a job that failed, so a file that is there was made by a job
    that succeeded. finished: when the last of the files was written. Files of which STEPS does not tell are one step of
    nulls. command is null for a rule with a script.
    """
    made_by = {output: step for step in _jobs(root) for output in step["outputs"]}
    steps: dict[int, dict[str, Any]] = {}
    unknown = []
    for output in outputs:
        # A file in remote storage has a local copy, .snakemake/storage/s3/bucket/...
        logged = made_by.get(output) or made_by.get(output.partition("/storage/")[2])
        if logged is None:
            unknown.append(output)
            continue
        reason = None if logged["command"] else "command: the rule runs a script of the workflow"
        finished = {"finished": logged["started"], "exit_code": 0}
        step = steps.setdefault(id(logged), {**logged, **finished, "outputs": [], "reason": reason})
        step["outputs"].append(output)
        if (root / output).is_file():
            step["finished"] = max(step["finished"], _utc((root / output).stat().st_mtime))
    found = sorted(steps.values(), key=lambda step: (step["finished"], step["rule"], step["outputs"]))
    if unknown:
        nothing = dict.fromkeys(("rule", "command", "started", "finished", "exit_code"))
        reason = "the workflow did not log how these files were made"
        found.append({**nothing, "inputs": [], "outputs": unknown, "log": [], "reason": reason})
    return found


def workflow_started() -> float | None:
    """When the Snakemake began that this process is a job of, in seconds since 1970; None without one."""
    try:
        return float(json.loads(os.environ[COMMAND])["started"])
    except (KeyError, ValueError):
        return None


def read_outputs(root: Path, since: float = 0.0) -> set[str]:
    """Outputs and logs of the jobs that began after a time (seconds since 1970), as the rules name them."""
    steps = [step for step in _jobs(root) if datetime.fromisoformat(step["started"]).timestamp() >= since]
    return {name for step in steps for name in (*step["outputs"], *step["log"])}


def read_made(root: Path) -> dict[str, tuple[str, str]]:
    """The rule that made each output and log, and its sha256 when that job ended; nothing of a job that has not."""
    rules: dict[str, str] = {}
    made: dict[str, tuple[str, str]] = {}
    for line in _logged(root / STEPS):
        for name in (*line.get("outputs", ()), *line.get("log", ())):
            rules[name] = line["rule"]
            made.pop(name, None)
        made |= {name: (rules[name], sha256) for name, sha256 in line.get("sha256", {}).items() if name in rules}
    return made


def _jobs(root: Path) -> list[dict[str, Any]]:
    return [line for line in _logged(root / STEPS) if "rule" in line]


def _logged(path: Path) -> list[dict[str, Any]]:
    steps = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            steps.append(json.loads(line))
        except ValueError:
            continue  # cut off: Snakemake was killed while it wrote
    return steps


def _plain(name: str) -> str:
    """A path as the rules name it: Snakemake writes `s3://bucket/a (send to storage)` of a file in remote storage."""
    return re.sub(r" \([^()]*\)$", "", name).replace("://", "/")


def _utc(seconds: float) -> str:
    return utc_text(datetime.fromtimestamp(seconds, UTC))
