"""What a reviewer would ask for, each as {item, ok, detail}; a record is complete when all of it is there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from specsplit.io import sha256_file
from specsplit.launch.environment import REQUIRED

Named = Sequence[tuple[str, Mapping[str, Any]]]

# Keys under which a null is an answer (not set, no limit, no error) and needs no reason.
NULL_IS_AN_ANSWER = ("config", "environment", "dataset", "orchestrator", "error", "inputs")


def make_checklist(record: Mapping[str, Any], runs: Named, models: Named, dataset_files: Sequence[Path]) -> list[Any]:
    """The checklist of a record that has everything else.

    runs, models: run.json and model.json by the names of their files. dataset_files: one of them is the dataset.
    """
    return [
        _check_seeds(record["config"], runs),
        *(_check_variable(name, value, runs) for name, value in REQUIRED.items()),
        _check_commands(runs),
        _check_code(record, runs),
        _check_surroundings(runs),
        _check_differences(record),
        _check_models(models),
        _check_dataset(record["dataset"], dataset_files),
        _check_gpu(record["gpu"]),
        _check_git(record["git"]),
        _check_changes(record["git"]),
        _check_nulls(record),
    ]


def _item(item: str, problems: Sequence[str], detail: str) -> dict[str, Any]:
    """One line of the checklist; `detail` is what it says when there is no problem."""
    return {"item": item, "ok": not problems, "detail": "; ".join(problems) or detail}


def _check_seeds(config: Mapping[str, Any], runs: Named) -> dict[str, Any]:
    seed = config.get("seed")
    problems = [] if type(seed) is int else ["the configuration has no seed"]
    for name, run in runs:
        if run.get("seed", seed) != seed:
            problems.append(f"{name}: seed {run['seed']}, but the configuration has {seed}")
    return _item("seeds recorded", problems, f"seed {seed}")


def _check_variable(variable: str, value: str, runs: Named) -> dict[str, Any]:
    """The variable in the client of every run and in each worker that it used."""
    problems = [] if runs else ["no run recorded"]
    for name, run in runs:
        processes = {name: run, **{f"{name}, {role} worker": w for role, w in (run.get("workers") or {}).items()}}
        for where, process in processes.items():
            environment = process.get("environment")
            found = environment.get(variable) if isinstance(environment, Mapping) else None
            if found != value:
                problems.append(f"{where}: {'not set' if found is None else found}")
    return _item(f"{variable}={value} in every run and its workers", problems, f"{len(runs)} run(s)")


def _check_commands(runs: Named) -> dict[str, Any]:
    problems = [] if runs else ["no run recorded"]
    for name, run in runs:
        argv = run.get("argv")
        if not argv or not isinstance(argv, list):
            problems.append(f"{name}: no command (argv)")
        started, finished = _utc(run.get("started")), _utc(run.get("finished"))
        if started is None or finished is None:
            problems.append(f"{name}: started or finished is not a UTC time")
        elif finished < started:
            problems.append(f"{name}: finished before it started")
        code = run.get("exit_code")
        if type(code) is not int or code != 0:
            problems.append(f"{name}: exit code {code}")
    return _item("command, UTC times and exit code 0 of every run", problems, f"{len(runs)} run(s)")


def _utc(text: Any) -> datetime | None:
    try:
        time = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return time if time.utcoffset() == timedelta(0) else None


def _check_code(record: Mapping[str, Any], runs: Named) -> dict[str, Any]:
    """A run of other code than the record's is known by its commit, if that was all there was."""
    problems = [] if runs else ["no run recorded"]
    others = []
    for name, run in runs:
        made, git = run.get("run_code_sha256"), run.get("git") or {}
        if made is None:
            problems.append(f"{name}: no hash of its source code")
        elif made != record["run_code_sha256"]:
            if git.get("dirty") is not False:
                problems.append(f"{name}: made by other code than there is now, and no commit has it; run it again")
            others.append(f"{name} by commit {git.get('commit')}")
    return _item("source code of every run known", problems, "; ".join(others) or record["run_code_sha256"])


def _check_surroundings(runs: Named) -> dict[str, Any]:
    """Where and with what each run and each worker ran, as they say themselves."""
    problems, hosts, processors, gpus, drivers = [], set(), set(), set(), set()
    for name, run in runs:
        machine, software = run.get("machine") or {}, run.get("software") or {}
        if not machine.get("hostname") or not software.get("packages"):
            problems.append(f"{name}: no machine or no list of packages; run it again")
        hosts.add(machine.get("hostname"))
        processors.add(machine.get("cpu_model"))
        for card in ((run.get("gpu") or {}).get("before") or {}).get("gpus") or ():
            gpus.add(card.get("name"))
            drivers.add(card.get("driver_version"))
        for role, worker in (run.get("workers") or {}).items():
            runtime = worker.get("runtime") or {}
            if not runtime.get("host") or not worker.get("packages"):
                problems.append(f"{name}, {role} worker: says neither where nor with which packages it runs")
            hosts.add(runtime.get("host"))
            processors.add(runtime.get("cpu"))
            gpus.add(runtime.get("gpu"))
            drivers.add(runtime.get("driver"))
    named = {"host": hosts, "processor": processors, "GPU": gpus, "driver": drivers}
    told = [f"{what} {', '.join(sorted(map(str, found - {None, 'None'}))) or 'none'}" for what, found in named.items()]
    return _item("host, processor, GPU, driver and packages of every run and worker", problems, "; ".join(told))


def _check_differences(record: Mapping[str, Any]) -> dict[str, Any]:
    """What differs between runs. Code and variables have items of their own; names of hosts and other packages are told
    only."""
    told: dict[bool, list[str]] = {True: [], False: []}
    for each in record["differences"]:
        values = " or ".join(f"{value[:60]} ({', '.join(names[:3])})" for value, names in each["values"].items())
        own_item = each["fact"].startswith(("code: ", "variable ")) or each["fact"].endswith(tuple(REQUIRED))
        told[each["matters"] and not own_item].append(f"{each['fact']}: {values}")
    apart = bool(record["config"].get("keep_apart"))
    problems = [] if apart else told[True]
    detail = "; ".join([*told[True], *told[False]]) or "nothing differs"
    return _item("runs agree on models, data, settings, machine and packages", problems, detail)


def _check_models(models: Named) -> dict[str, Any]:
    problems = [] if models else ["no model recorded"]
    for name, model in models:
        if _weights_sha256(model) is None:
            problems.append(f"{name}: no weights_sha256")
    detail = ", ".join(f"{model.get('name', name)} {_weights_sha256(model)}" for name, model in models)
    return _item("models pinned by the hash of their weights", problems, detail)


def _weights_sha256(model: Mapping[str, Any]) -> str | None:
    fingerprint = model.get("fingerprint")
    found = fingerprint.get("weights_sha256") if isinstance(fingerprint, Mapping) else None
    return found if isinstance(found, str) and re.fullmatch("[0-9a-f]{64}", found) else None


def _check_dataset(manifest: Mapping[str, Any], files: Sequence[Path]) -> dict[str, Any]:
    item = "dataset matches the hash in its manifest"
    expected = manifest.get("output_sha256")
    if not isinstance(expected, str):
        return _item(item, ["the manifest has no output_sha256"], "")
    for path in files:
        if path.is_file() and sha256_file(path) == expected:
            return _item(item, [], f"{path.name}, {manifest.get('count')} prompts, {expected}")
    return _item(item, [f"no file beside the manifest has sha256 {expected}"], "")


def _check_gpu(gpu: Mapping[str, Any]) -> dict[str, Any]:
    problems = [] if gpu["available"] or gpu["reason"] else ["neither a GPU nor a reason"]
    detail = f"{len(gpu['gpus'])} GPU(s)" if gpu["available"] else f"no GPU: {gpu['reason']}"
    return _item("GPU state recorded or its absence explained", problems, detail)


def _check_git(git: Mapping[str, Any]) -> dict[str, Any]:
    changes = " with uncommitted changes" if git["dirty"] else ""
    return _item("git commit known", [] if git["commit"] else [str(git["reason"])], f"{git['commit']}{changes}")


def _check_changes(git: Mapping[str, Any]) -> dict[str, Any]:
    changes, problems = git["changes"], []
    if git["dirty"]:
        if changes["diff"] is None:
            problems.append(str(changes["reason"]))
        elif changes["redacted"]:
            problems.append("a secret was taken out of the diff: it may not apply")
    new = f", {len(changes['new_files'])} new file(s)" if changes["new_files"] else ""
    size = len((changes["diff"] or "").splitlines())
    return _item("uncommitted changes recorded", problems, f"{size} lines{new}" if git["dirty"] else "none")


def _check_nulls(record: Mapping[str, Any]) -> dict[str, Any]:
    """Every null outside NULL_IS_AN_ANSWER has a reason in its own object."""
    unexplained = list(_unexplained(record, ""))
    listed = ", ".join(unexplained[:5]) + (f" and {len(unexplained) - 5} more" if len(unexplained) > 5 else "")
    return _item("what is unavailable is explained", [listed] if unexplained else [], "every null has a reason")


def _unexplained(value: Any, where: str) -> Iterator[str]:
    explained = not isinstance(value, Mapping) or value.get("reason")
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if key not in NULL_IS_AN_ANSWER:
            if item is None and key != "reason" and not explained:
                yield f"{where}{key}"
            yield from _unexplained(item, f"{where}{key}.")
