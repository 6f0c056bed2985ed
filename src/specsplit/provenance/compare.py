"""What changed between two runs of an experiment: configuration, code, models, data, machine, results."""

from __future__ import annotations

import csv
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from specsplit.client.result import LINK_BYTES, USAGE
from specsplit.errors import UserError
from specsplit.io import csv_reader
from specsplit.provenance.folder import Experiment
from specsplit.provenance.record import check_record
from specsplit.settings.axes import CONFIGURATION, PLAIN, SERIES

# Columns of requests.csv that a clock decides; all others follow from the inputs.
TIMES = (
    "ttft_ms",
    "tpot_ms",
    "total_network_idle_ms",
    "total_latency_ms",
    "network_idle_fraction",
    "draft_compute_ms",
    "draft_exposed_ms",
    "draft_hidden_ms",
    "target_compute_ms",
    "itl_ms",
    "recovery_ms",
    *LINK_BYTES,  # of drafts ahead, which may come too late
    *USAGE,
)
SHOWN = 60  # characters of a value


@dataclass
class Group:
    """One group of the comparison. same: what is said when nothing differs. differences: a line each. times: lines that
    differ between any two runs."""

    name: str
    same: str
    differences: list[str] = field(default_factory=list)
    times: list[str] = field(default_factory=list)


def compare(a: Experiment, b: Experiment) -> list[Group]:
    """The groups config, code, model, data, machine and results, in this order.

    Raises UserError when a record or a table is missing or malformed.
    """
    records = _read(a), _read(b)
    record = records[0]
    commit, models = str(record["git"]["commit"])[:12], [str(model.get("name")) for model in record["models"]]
    same = {
        "config": f"sha256 {record['config_sha256'][:12]}",
        "code": f"commit {commit}, {len(record['source_files'])} source files",
        "model": ", ".join(models),
        "data": f"{record['dataset'].get('count')} prompts",
        "machine": f"{record['machine']['hostname']}, {record['machine']['cpu_model']}",
    }
    # An unpacked archive has no commit; its files are compared all the same.
    with_commit = all(record["git"]["commit"] for record in records)
    facts: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "config": lambda record: _flat(record["config"]),
        "code": lambda record: (_commit(record) if with_commit else {}) | _code(record),
        "model": _models,
        "data": lambda record: _flat(record["dataset"]),
        "machine": _machine,
    }
    groups = [Group(name, same[name], _lines(*map(facts[name], records))) for name in facts]
    return [*groups, _results(a, b)]


def _read(experiment: Experiment) -> dict[str, Any]:
    record = experiment.record()
    try:
        check_record(record)
    except UserError as error:
        raise UserError(f"{experiment.shown}: {error}") from None
    return record


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys; reasons of nulls left out."""
    if not isinstance(value, Mapping):
        return {name: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if key != "reason":
            flat |= _flat(item, f"{name}.{key}" if name else str(key))
    return flat


def _lines(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    lines = []
    for key in dict.fromkeys((*a, *b)):
        if key not in b:
            lines.append(f"{key}: {_shown(a[key])} -> gone")
        elif key not in a:
            lines.append(f"{key}: new: {_shown(b[key])}")
        elif a[key] != b[key]:
            lines.append(f"{key}: {_shown(a[key])} -> {_shown(b[key])}")
    return lines


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    if len(text) == 64 and all(letter in "0123456789abcdef" for letter in text):
        return text[:12]
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _commit(record: Mapping[str, Any]) -> dict[str, Any]:
    git = record["git"]
    return {"commit": git["commit"], "uncommitted changes": git["changes"]["sha256"] if git["dirty"] else "none"}


def _code(record: Mapping[str, Any]) -> dict[str, Any]:
    software = record["software"]
    return {
        **{f"src/specsplit/{file}": digest for file, digest in record["source_files"].items()},
        **record["workflow_files"],
        **{f"code of {_label(run)}": run.get("run_code_sha256") for run in record["runs"]},
        "Python": software["python"],
        **{f"package {name}": version for name, version in software["packages"].items()},
    }


def _label(run: Mapping[str, Any]) -> str:
    return Path(run["file"]).parent.name


def _models(record: Mapping[str, Any]) -> dict[str, Any]:
    models: dict[str, Any] = {}
    for model in record["models"]:
        kept = {
            key: model.get(key) for key in ("source", "pinned", "revision", "upstream_sha256", "fingerprint", "files")
        }
        models |= _flat(kept, str(model.get("name")))
    return models


def _machine(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the runs ran on; not process numbers, addresses, clocks and power, which differ between any two runs."""
    facts = _flat(record["machine"])
    facts |= _gpus(record["gpu"], "gpu")
    for run in record["runs"]:
        label = _label(run)
        facts |= _flat(run.get("environment") or {}, label)
        facts[f"{label}.cores of the workflow"] = (run.get("workflow") or {}).get("cores")
        facts |= _flat(run.get("machine") or {}, label)
        facts |= _gpus((run.get("gpu") or {}).get("before") or {}, f"{label}.gpu")
        for role, worker in (run.get("workers") or {}).items():
            kept = {key: worker.get(key) for key in ("host", "device", "threads", "environment", "runtime")}
            facts |= _flat(kept, f"{label}.{role} worker")
    return facts


def _gpus(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    facts = {f"{name}.cuda_version": state.get("cuda_version")}
    for i, gpu in enumerate(state.get("gpus") or []):
        for key in ("name", "uuid", "driver_version", "memory_total_mib"):
            facts[f"{name}.{i}.{key}"] = gpu[key]
    return facts


# ---- the results


def _results(a: Experiment, b: Experiment) -> Group:
    """Request by request: the same text and counts, and how the times moved."""
    first, second = _requests(a), _requests(b)
    shared = [key for key in first if key in second]
    texts = sum(first[key]["output_sha256"] == second[key]["output_sha256"] for key in shared)
    group = Group("results", f"{texts} of {len(shared)} texts are the same")
    for name, only, other in ((a.shown, first, second), (b.shown, second, first)):
        points = Counter(key[:-1] for key in only if key not in other)
        group.differences += [
            f"only in {name}: {_point(point)}, {number} request(s)" for point, number in points.items()
        ]
    changed: dict[tuple[tuple[str, ...], str], list[str]] = defaultdict(list)
    for key in shared:
        for column in first[key]:
            # A column that only one of two versions writes says nothing of the runs.
            if column not in TIMES and column in second[key] and first[key][column] != second[key][column]:
                changed[key[:-1], column].append(key[-1])
    for (point, column), requests in changed.items():
        what = "text" if column == "output_sha256" else column
        more = ", ..." if len(requests) > 3 else ""
        group.differences.append(
            f"{_point(point)}: {what} of {len(requests)} request(s) differs: {', '.join(requests[:3])}{more}"
        )
    for point in dict.fromkeys(key[:-1] for key in shared):
        keys = [key for key in shared if key[:-1] == point]
        moved = [_moved(column, [(first[key][column], second[key][column]) for key in keys]) for column in TIMES[:2]]
        if any(moved):
            group.times.append(f"{_point(point)}: {', '.join(filter(None, moved))}")
    return group


def _requests(experiment: Experiment) -> dict[tuple[str, ...], dict[str, str]]:
    """The rows of requests.csv by configuration, and request with its repeat."""
    path = experiment.results / "requests.csv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            names, *cells = list(csv_reader(file)) or [[]]
            rows = [dict(zip(names, row, strict=False)) for row in cells]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV table: {error}; make it again") from None
    missing = {*CONFIGURATION, *TIMES, "request_id", "output_sha256"} - set(rows[0] if rows else ())
    if missing:
        raise UserError(f"{path}: no column {', '.join(sorted(missing))}; make it again with this version")
    # Runs that were kept apart have a series: two of them may have one configuration.
    return {(*(row[name] for name in CONFIGURATION), _request(row)): row for row in rows}


def _request(row: Mapping[str, str]) -> str:
    told = [f"{name} {row[name]}" for name in ("repeat", SERIES) if row.get(name, "1") != "1"]
    return f"{row['request_id']} ({', '.join(told)})" if told else row["request_id"]


def _point(values: tuple[str, ...]) -> str:
    """gamma, and what is not as in a plain sweep."""
    named = dict(zip(CONFIGURATION, values, strict=True))
    differs = [key for key, plain in PLAIN.items() if named[key].removesuffix(".0") != str(plain).removesuffix(".0")]
    return " ".join(f"{key} {named[key]}" for key in ("gamma", *differs))


def _moved(column: str, pairs: list[tuple[str, str]]) -> str:
    numbers = [(float(old), float(new)) for old, new in pairs if old and new]
    if not numbers or all(old == new for old, new in numbers):
        return ""
    old, new = median(old for old, _ in numbers), median(new for _, new in numbers)
    change = f" ({(new / old - 1) * 100:+.1f} %)" if old else ""
    return f"median {column} {old:.4g} -> {new:.4g}{change}"
