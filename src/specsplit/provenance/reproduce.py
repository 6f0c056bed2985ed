"""The commands that repeat an experiment."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from specsplit.errors import counted
from specsplit.provenance.capture import LOCK
from specsplit.provenance.folder import CONFIG, PATCH, RECORD, Experiment

TARGET = "results/summary.csv"
AGAIN = "specsplit-again"


def reproduction(experiment: Experiment, archive: Path | None = None) -> str:
    """A shell script that makes the results again, in a new folder, and compares them.

    archive: the archive.zip that `experiment` was unpacked from. Without one the code comes from the unpacked archive
    that `experiment` is, or from its git commit.
    """
    return "\n".join(_script(experiment.record(), experiment, archive)) + "\n"


def _script(record: Mapping[str, Any], experiment: Experiment, archive: Path | None) -> Iterator[str]:
    machine, software = record["machine"], record["software"]
    gpus = ", ".join(str(gpu["name"]) for gpu in record["gpu"]["gpus"]) or "no GPU"
    yield "#!/usr/bin/env bash"
    yield f"# Repeats the experiment recorded in {RECORD} of {experiment.shown}, made {record['created']}"
    yield f"# on {machine['os']}, {machine['cpu_model']}, {counted(machine['cores_usable'], 'core')}, {gpus}."
    yield "set -euo pipefail"
    yield ""
    yield "# The code"
    recorded = experiment.results
    if archive is not None:
        recorded = Path("recorded")
        yield from (f"unzip -q {_quote(archive)} -d {AGAIN}", f"cd {AGAIN}", "mv results recorded")
    elif experiment.archived:
        yield from (f"cp -r {_quote(experiment.root)} {AGAIN}", f"cd {AGAIN}", "rm -r results")
    else:
        yield from _checkout(record["git"], experiment)
    yield ""
    yield f"# The environment: Python {software['python']}, {len(software['packages'])} packages, {_lock(record)}"
    yield f"make PYTHON=python{software['python'].rpartition('.')[0]} .venv/installed"
    yield 'export PATH="$PWD/.venv/bin:$PATH"'
    yield ""
    yield "# The data"
    dataset = record["dataset"]
    if dataset.get("fetched"):
        yield f"# {dataset['fetched']['name']} is fetched by the workflow, from {dataset['fetched']['url']}"
    elif dataset.get("unit") == "row":
        yield f"# {dataset['source']}, {dataset.get('format')}; its sha256 is {dataset['source_sha256']}"
    elif dataset.get("source"):
        line = f"{dataset['source_sha256']}  {dataset['source']}"
        yield f"echo {_quote(line)} | sha256sum --check"
    for model in record["models"]:
        yield f"# {_model(model)}"
    yield ""
    yield "# The runs"
    for role, address in sorted(_attached(record).items()):
        yield f"# The workflow did not start the {role} worker: one served at {address}. Start one like it, then"
        yield f"# export SPECSPLIT_ORCH_{role.upper()}_ADDRESS=HOST:PORT"
    cores = record["workflow"]["cores"] or machine["cores_usable"]
    config = recorded / Path(CONFIG).relative_to("results")
    yield f"snakemake --cores {cores} --configfile {_quote(config)} -- {TARGET}"
    yield ""
    yield "# What came out, beside what was recorded"
    yield f"specsplit provenance diff {_quote(recorded)} results"


def _checkout(git: Mapping[str, Any], experiment: Experiment) -> Iterator[str]:
    if git["commit"] is None:
        yield f"# No commit is known ({git['reason']}): this takes the project's files as they are now."
        yield from (f"cp -r {_quote(experiment.root)} {AGAIN}", f"cd {AGAIN}", "rm -rf results .snakemake .venv")
        return
    yield from (f"git clone -q {_quote(git['remote'] or experiment.root)} {AGAIN}", f"cd {AGAIN}")
    yield f"git checkout -q {git['commit']}"
    changes = git["changes"]
    if changes["diff"] is None:
        yield f"# Uncommitted changes were not recorded: {changes['reason']}"
    elif changes["diff"]:
        if changes["redacted"]:
            yield "# A secret was taken out of these changes; mend what does not apply."
        yield f"git apply {_quote(experiment.at(PATCH))}"
    for file in changes["new_files"]:
        if not file["in_diff"]:
            yield f"# not among the changes, bring it along: {file['path']} (sha256 {file['sha256']})"


def _quote(path: Path | str) -> str:
    return shlex.quote(str(path))


def _lock(record: Mapping[str, Any]) -> str:
    lock = record["lock"]
    if lock["sha256"] is None:
        return f"no {LOCK}"
    differs = [f"{name} {versions['installed']}" for name, versions in lock["differs"].items()]
    return f"pinned by {lock['path']}" + (f" but for {', '.join(differs)}" if differs else "")


def _model(model: Mapping[str, Any]) -> str:
    source, fingerprint = model.get("source") or {}, model.get("fingerprint") or {}
    told = [f"{key} {value}" for key, value in source.items() if key not in ("reason", "sha256") and value]
    return f"model {model.get('name')}: {', '.join(told)}; weights {fingerprint.get('weights_sha256')}"


def _attached(record: Mapping[str, Any]) -> dict[str, str]:
    workers = [item for run in record["runs"] for item in (run.get("workers") or {}).items()]
    return {role: worker["address"] for role, worker in workers if worker.get("attached")}
