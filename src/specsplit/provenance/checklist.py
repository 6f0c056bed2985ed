"""What a reviewer would ask for, each as {item, ok, detail}; a record is complete when all of it is there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from specsplit.errors import counted, listed
from specsplit.io import sha256_file
from specsplit.launch.environment import REQUIRED
from specsplit.provenance.facts import part_of

Named = Sequence[tuple[str, Mapping[str, Any]]]

# Keys under which a null is an answer (not set, no limit, no error) and needs no reason.
NULL_IS_AN_ANSWER = ("config", "environment", "dataset", "orchestrator", "error", "inputs")


def make_checklist(record: Mapping[str, Any], runs: Named, models: Named, dataset_files: Sequence[Path]) -> list[Any]:
    """The checklist of a record that has everything else.

    runs, models: run.json and model.json by the names of their files. dataset_files: one of them is the dataset.
    """
    gpu, git, seed = record["gpu"], record["git"], record["config"].get("seed")
    none, number = [] if runs else ["no run recorded"], counted(len(runs), "run")
    weights = {name: _weights_sha256(model) for name, model in models}
    weightless = [f"{name}: no weights_sha256" for name, sha256 in weights.items() if sha256 is None]
    unexplained = list(_unexplained(record, ""))
    uncommitted = " with uncommitted changes" if git["dirty"] else ""
    # What is asked for -> (problems, what is said when there is none).
    checks: dict[str, tuple[Iterable[str], str]] = {
        "seeds recorded": (_seed_problems(seed, runs), f"seed {seed}"),
        **{
            f"{name}={value} in every run and its workers": ([*none, *_variable_problems(name, value, runs)], number)
            for name, value in REQUIRED.items()
        },
        "command, UTC times and exit code 0 of every run": ([*none, *_command_problems(runs)], number),
        "source code of every run known": _check_code(record, runs, none),
        "host, processor, GPU, driver and packages of every run and worker": _check_surroundings(runs),
        "runs agree on models, data, settings, machine and packages": _check_differences(record),
        "models pinned by the hash of their weights": (
            weightless if models else ["no model recorded"],
            ", ".join(f"{model.get('name', name)} {weights[name]}" for name, model in models),
        ),
        "dataset matches the hash in its manifest": _check_dataset(record["dataset"], dataset_files),
        "GPU state recorded or its absence explained": (
            [] if gpu["available"] or gpu["reason"] else ["neither a GPU nor a reason"],
            counted(len(gpu["gpus"]), "GPU") if gpu["available"] else f"no GPU: {gpu['reason']}",
        ),
        "git commit known": ([] if git["commit"] else [str(git["reason"])], f"{git['commit']}{uncommitted}"),
        "uncommitted changes recorded": _check_changes(git["changes"]) if git["dirty"] else ([], "none"),
        "what is unavailable is explained": ([listed(unexplained)] if unexplained else [], "every null has a reason"),
    }
    said = {item: ("; ".join(problems), detail) for item, (problems, detail) in checks.items()}
    return [{"item": item, "ok": not wrong, "detail": wrong or detail} for item, (wrong, detail) in said.items()]


def _seed_problems(seed: Any, runs: Named) -> Iterator[str]:
    if type(seed) is not int:
        yield "the configuration has no seed"
    for name, run in runs:
        if run.get("seed", seed) != seed:
            yield f"{name}: seed {run['seed']}, but the configuration has {seed}"


def _variable_problems(variable: str, value: str, runs: Named) -> Iterator[str]:
    """The variable in the client of every run and in each worker that it used."""
    for name, run in runs:
        processes = {name: run, **{f"{name}, {role} worker": w for role, w in part_of(run, "workers").items()}}
        for where, process in processes.items():
            environment = process.get("environment")
            found = environment.get(variable) if isinstance(environment, Mapping) else None
            if found != value:
                yield f"{where}: {'not set' if found is None else found}"


def _command_problems(runs: Named) -> Iterator[str]:
    for name, run in runs:
        if not run.get("argv") or not isinstance(run["argv"], list):
            yield f"{name}: no command (argv)"
        started, finished = _utc(run.get("started")), _utc(run.get("finished"))
        if started is None or finished is None:
            yield f"{name}: started or finished is not a UTC time"
        elif finished < started:
            yield f"{name}: finished before it started"
        code = run.get("exit_code")
        if type(code) is not int or code != 0:
            yield f"{name}: exit code {code}"


def _utc(text: Any) -> datetime | None:
    try:
        time = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return time if time.utcoffset() == timedelta(0) else None


def _check_code(record: Mapping[str, Any], runs: Named, problems: Sequence[str]) -> tuple[list[str], str]:
    """A run of other code than the record's is known by its commit, if that was all there was."""
    problems, others = list(problems), []
    for name, run in runs:
        made, git = run.get("run_code_sha256"), part_of(run, "git")
        if made is None:
            problems.append(f"{name}: no hash of its source code")
        elif made != record["run_code_sha256"]:
            if git.get("dirty") is not False:
                problems.append(f"{name}: made by other code than there is now, and no commit has it; run it again")
            others.append(f"{name} by commit {git.get('commit')}")
    return problems, "; ".join(others) or record["run_code_sha256"]


def _check_surroundings(runs: Named) -> tuple[list[str], str]:
    """Where and with what each run and each worker ran, as they say themselves."""
    problems: list[str] = []
    keys = {"host": "host", "processor": "cpu", "GPU": "gpu", "driver": "driver"}  # of a worker
    found: dict[str, set[Any]] = {what: set() for what in keys}
    for name, run in runs:
        machine = part_of(run, "machine")
        if not machine.get("hostname") or not part_of(run, "software").get("packages"):
            problems.append(f"{name}: no machine or no list of packages; run it again")
        cards = part_of(run, "gpu", "before").get("gpus") or ()
        found["host"].add(machine.get("hostname"))
        found["processor"].add(machine.get("cpu_model"))
        found["GPU"].update(card.get("name") for card in cards)
        found["driver"].update(card.get("driver_version") for card in cards)
        for role, worker in part_of(run, "workers").items():
            runtime = part_of(worker, "runtime")
            if not runtime.get("host") or not worker.get("packages"):
                problems.append(f"{name}, {role} worker: says neither where nor with which packages it runs")
            for what, key in keys.items():
                found[what].add(runtime.get(key))
    known = {what: sorted(map(str, own - {None, "None"})) for what, own in found.items()}
    return problems, "; ".join(f"{what} {', '.join(own) or 'none'}" for what, own in known.items())


def _check_differences(record: Mapping[str, Any]) -> tuple[list[str], str]:
    """What differs between runs. Code and variables have items of their own; names of hosts and other packages are told
    only."""
    told: dict[bool, list[str]] = {True: [], False: []}
    for each in record["differences"]:
        values = " or ".join(f"{value[:60]} ({', '.join(names[:3])})" for value, names in each["values"].items())
        own_item = each["fact"].startswith(("code: ", "variable ")) or each["fact"].endswith(tuple(REQUIRED))
        told[each["matters"] and not own_item].append(f"{each['fact']}: {values}")
    problems = [] if record["config"].get("keep_apart") else told[True]
    return problems, "; ".join([*told[True], *told[False]]) or "nothing differs"


def _weights_sha256(model: Mapping[str, Any]) -> str | None:
    fingerprint = model.get("fingerprint")
    found = fingerprint.get("weights_sha256") if isinstance(fingerprint, Mapping) else None
    return found if isinstance(found, str) and re.fullmatch("[0-9a-f]{64}", found) else None


def _check_dataset(manifest: Mapping[str, Any], files: Sequence[Path]) -> tuple[list[str], str]:
    expected = manifest.get("output_sha256")
    if not isinstance(expected, str):
        return ["the manifest has no output_sha256"], ""
    for path in files:
        if path.is_file() and sha256_file(path) == expected:
            return [], f"{path.name}, {counted(manifest.get('count'), 'prompt')}, {expected}"
    return [f"no file beside the manifest has sha256 {expected}"], ""


def _check_changes(changes: Mapping[str, Any]) -> tuple[list[str], str]:
    problems = ["a secret was taken out of the diff: it may not apply"] if changes["redacted"] else []
    if changes["diff"] is None:
        problems = [str(changes["reason"])]
    new = f", {counted(len(changes['new_files']), 'new file')}" if changes["new_files"] else ""
    return problems, f"{counted(len((changes['diff'] or '').splitlines()), 'line')}{new}"


def _unexplained(value: Any, where: str) -> Iterator[str]:
    """Every null outside NULL_IS_AN_ANSWER that has no reason in its own object."""
    explained = not isinstance(value, Mapping) or value.get("reason")
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if key not in NULL_IS_AN_ANSWER:
            if item is None and key != "reason" and not explained:
                yield f"{where}{key}"
            yield from _unexplained(item, f"{where}{key}.")
