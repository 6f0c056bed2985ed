"""What changed between two runs of an experiment: configuration, code, models, data, machine, results."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from specsplit.client.result import LINK_BYTES, USAGE
from specsplit.errors import UserError, counted, listed, naming, shortened, why
from specsplit.io import csv_reader
from specsplit.provenance.facts import part_of
from specsplit.provenance.folder import Experiment
from specsplit.provenance.record import check_record
from specsplit.settings.axes import CONFIGURATION, PLAIN, SERIES

# Columns of requests.csv that a clock decides; all others follow from the inputs.
TIMES = (
    *("ttft_ms", "tpot_ms", "total_network_idle_ms", "total_latency_ms", "network_idle_fraction"),
    *("draft_compute_ms", "draft_exposed_ms", "draft_hidden_ms", "target_compute_ms", "itl_ms", "recovery_ms"),
    *LINK_BYTES,  # of drafts ahead, which may come too late
    *USAGE,
)
KEPT_OF_MODEL = ("source", "pinned", "revision", "upstream_sha256", "fingerprint", "files")
KEPT_OF_WORKER = ("host", "device", "threads", "environment", "runtime")
KEPT_OF_GPU = ("name", "uuid", "driver_version", "memory_total_mib")


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
    first, second = records = _read(a), _read(b)
    commit, models = str(first["git"]["commit"])[:12], [str(model.get("name")) for model in first["models"]]
    code, other_code = _code(first), _code(second)
    if all(record["git"]["commit"] for record in records):  # an unpacked archive has none
        code, other_code = _commit(first) | code, _commit(second) | other_code
    return [
        Group("config", f"sha256 {first['config_sha256'][:12]}", _lines(*(_flat(r["config"]) for r in records))),
        Group(
            "code", f"commit {commit}, {counted(len(first['source_files']), 'source file')}", _lines(code, other_code)
        ),
        Group("model", ", ".join(models), _lines(*map(_models, records))),
        Group(
            "data",
            counted(first["dataset"].get("count"), "prompt"),
            _lines(*(_flat(r["dataset"]) for r in records)),
        ),
        Group(
            "machine",
            f"{first['machine']['hostname']}, {first['machine']['cpu_model']}",
            _lines(*map(_machine, records)),
        ),
        _results(a, b),
    ]


def _read(experiment: Experiment) -> dict[str, Any]:
    record = experiment.record()
    with naming(experiment.shown):
        check_record(record)
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
    def line(key: str) -> str:
        if key not in a:
            return f"{key}: new: {_shown(b[key])}"
        return f"{key}: {_shown(a[key])} -> {_shown(b[key]) if key in b else 'gone'}"

    return [line(key) for key in dict.fromkeys((*a, *b)) if (key in a) != (key in b) or a[key] != b[key]]


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else shortened(" ".join(text.split()))


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
    return _flat({str(model.get("name")): {key: model.get(key) for key in KEPT_OF_MODEL} for model in record["models"]})


def _machine(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the runs ran on; not process numbers, addresses, clocks and power, which differ between any two runs."""
    facts = {**record["machine"], "gpu": _gpus(record["gpu"])}
    for run in record["runs"]:
        facts[_label(run)] = {
            **part_of(run, "environment"),
            "cores of the workflow": part_of(run, "workflow").get("cores"),
            **part_of(run, "machine"),
            "gpu": _gpus(part_of(run, "gpu", "before")),
            **{
                f"{role} worker": {key: worker.get(key) for key in KEPT_OF_WORKER}
                for role, worker in part_of(run, "workers").items()
            },
        }
    return _flat(facts)


def _gpus(state: Mapping[str, Any]) -> dict[str, Any]:
    cards = {str(i): {key: card[key] for key in KEPT_OF_GPU} for i, card in enumerate(state.get("gpus") or [])}
    return {"cuda_version": state.get("cuda_version"), **cards}


# ---- the results


def _results(a: Experiment, b: Experiment) -> Group:
    """Request by request: the same text and counts, and how the times moved."""
    first, second = _requests(a), _requests(b)
    shared = [key for key in first if key in second]
    texts = sum(first[key]["output_sha256"] == second[key]["output_sha256"] for key in shared)
    group = Group("results", f"{texts} of {counted(len(shared), 'text')} are the same")
    for name, only, other in ((a.shown, first, second), (b.shown, second, first)):
        points = Counter(key[:-1] for key in only if key not in other)
        group.differences += [
            f"only in {name}: {_point(point)}, {counted(number, 'request')}" for point, number in points.items()
        ]
    changed: dict[tuple[tuple[str, ...], str], list[str]] = defaultdict(list)
    for key in shared:
        for column in first[key]:
            # A column that only one of two versions writes says nothing of the runs.
            if column not in TIMES and column in second[key] and first[key][column] != second[key][column]:
                changed[key[:-1], column].append(key[-1])
    for (point, column), requests in changed.items():
        what = "text" if column == "output_sha256" else column
        group.differences.append(
            f"{_point(point)}: {what} of {counted(len(requests), 'request')} differs: {listed(requests, 3)}"
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
        raise UserError(f"{path}: {why(error)}") from None
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
