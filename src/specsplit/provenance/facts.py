"""What runs must agree on before their results are joined, and what of it differs.

The facts of a run are those of its run.json. What the sweep varies (gamma, mode, tree, draft, sampling, network) tells
rows apart and is no fact here; what only operates a run (addresses, timeouts, process numbers, host names) decides
nothing. Hosts of one kind may share a sweep, as the nodes of a cluster do, so names of hosts are told and not compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specsplit.errors import UserError, listed, shortened
from specsplit.io import json_sha256, read_json_object, sha256_file
from specsplit.settings.axes import SWEPT
from specsplit.settings.run import OrchestratorConfig

MACHINE = ("architecture", "cpu_model", "cores_logical", "cores_physical", "cores_usable", "os", "python")
# Packages that a text or a time depends on; the others are recorded, and told where they differ.
PACKAGES = (
    *("torch", "numpy", "numba", "llvmlite", "transformers", "tokenizers", "accelerate", "safetensors", "gguf"),
    *("grpcio", "protobuf", "triton", "jinja2"),
)
WORKER = ("weights_sha256", "tokenizer_sha256", "dtype", "device", "max_context", "version")
TOLD = ("host", "kernel")  # of `runtime`
# Each job has its own, or the number of threads decides it, which is compared.
CODE = ("run_code_sha256", "worker_code_sha256", "specsplit_version")
VARIABLES = ("PYTHONHASHSEED", "CUBLAS_WORKSPACE_CONFIG")
OF_DRAFT = ("draft_acceptance", "lookup", "p_min")  # settings that each draft has for itself
# What a measurement beside a sweep has of its own: how many prompts and repeats, threads and room of its workers, and
# other settings than those of the texts.
OWN = re.compile(
    r"prompts: count|repeats|warmup_requests|code: run_code_sha256|variable .*|.*: (threads in mode .*|max_context)"
    r"|setting (?!(max_output_tokens|use_chat_template|ignore_eos|stop|stop_token_ids|seed)$).*"
)


@dataclass(frozen=True)
class Difference:
    """A fact that runs do not agree on. values: what it is, as JSON -> the runs that say so."""

    fact: str
    values: Mapping[str, Sequence[str]]

    def __str__(self) -> str:
        told = [f"{shortened(value, 80)} ({listed(runs, 3)})" for value, runs in self.values.items()]
        return f"{self.fact}: {', '.join(told)}"


def read_run(path: Path) -> dict[str, Any]:
    """A run file, as `run_file.write_run` wrote it. Raises UserError when it or a table was edited since."""
    run, mend = read_run_alone(path), _mend(path)
    for name, digest in (run.get("files") or {}).items():
        table = path.with_name(name)
        if not table.is_file():
            raise UserError(f"{table}: no such file, and {path} lists it; {mend}")
        if sha256_file(table) != digest:
            raise UserError(f"{table}: is not what was measured: {path} has another sha256; {mend}")
    return run


def read_run_alone(path: Path) -> dict[str, Any]:
    """A run file, whatever became of its tables. Raises UserError when it was edited since.

    Earlier versions kept no hashes; they are known by not telling the code of the workers.
    """
    run = read_json_object(path)
    hashed = run.keys() & {"sha256", "files", "worker_code_sha256"}
    digest = json_sha256({key: run[key] for key in run if key != "sha256"})
    if hashed and (run.get("sha256") != digest or not isinstance(run.get("files"), dict)):
        raise UserError(
            f"{path}: was edited after it was written: its content is not that of its own hash; {_mend(path)}"
        )
    return run


def _mend(path: Path) -> str:
    return f"put back what was there, or delete {path} and measure again"


def beside_run(table: Path) -> Path:
    """The run file of a table beside the sweep, or of its rows: capacity_run.json of capacity_requests.csv."""
    return table.with_name(f"{table.stem.removesuffix('_requests')}_run.json")


def read_facts(run_dir: Path) -> dict[str, Any]:
    """The facts of a run folder; none without a run.json, which tables alone do not have. UserError as `read_run`."""
    path = Path(run_dir) / "run.json"
    return run_facts(read_run(path)) if path.is_file() else {}


def run_facts(run: Mapping[str, Any]) -> dict[str, Any]:
    """Fact -> value of one run. What a run of an earlier version does not tell is left out."""
    settings = part_of(run, "orchestrator")
    mode, draft = settings.get("mode", "sync"), settings.get("draft_name", "draft")
    facts: dict[str, Any] = {
        f"prompts: {key}": part_of(run, "inputs", "prompts").get(key) for key in ("sha256", "count")
    }
    facts["tokenizer"] = run.get("tokenizer_sha256")
    facts |= {f"code: {key}": run.get(key) for key in CODE}
    facts |= {key: run.get(key) for key in ("repeats", "warmup_requests")}
    left_out = {*SWEPT, *OrchestratorConfig.operating(), "fan_out", *OF_DRAFT}
    facts |= {f"setting {key}": value for key, value in settings.items() if key not in left_out}
    if settings.get("gamma"):  # each draft has its own
        of_draft = "" if draft == "draft" else f" of {draft}"
        facts |= {f"setting {key}{of_draft}": settings[key] for key in OF_DRAFT if key in settings}
    if mode == "lookahead":
        facts["setting fan_out"] = settings.get("fan_out")
    facts |= {f"machine: {key}": part_of(run, "machine").get(key) for key in MACHINE}
    facts |= _gpu_facts(part_of(run, "gpu", "before"))
    facts |= {f"variable {key}": part_of(run, "environment").get(key) for key in VARIABLES if run.get("environment")}
    facts |= _package_facts("package", part_of(run, "software").get("packages"))
    for role, worker in part_of(run, "workers").items():
        name = f"{role} worker" if role == "target" or draft == "draft" else f"{role} worker {draft}"
        facts |= {f"{name}: {key}": worker.get(key) for key in WORKER}
        # Workers that compute at once share the cores.
        facts[f"{name}: threads in mode {mode}"] = worker.get("threads")
        if role == "draft":
            facts[f"{name}: skip_layers"] = worker.get("skip_layers")
        facts |= {f"{name}: {key}": value for key, value in part_of(worker, "runtime").items() if key not in TOLD}
        facts |= {f"{name}: {key}": part_of(worker, "environment").get(key) for key in VARIABLES}
        facts |= _package_facts(f"{name}: package", worker.get("packages"))
    # A null may be a setting (no limit); elsewhere it is what was not known.
    return {key: value for key, value in facts.items() if value is not None or key.startswith("setting ")}


def beside_facts(run: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a NAME_run.json tells, the facts that it must share with the runs of the sweep beside it."""
    every = [run_facts({**run, **own}) for own in (run.get("ours") or {"": {}}).values()]
    return {fact: value for facts in every for fact, value in facts.items() if not OWN.fullmatch(fact)}


def told_facts(run: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of runs where it differs, and refused nowhere: names of hosts, all other packages."""
    machine = part_of(run, "machine")
    told: dict[str, Any] = {"host": machine.get("hostname"), "kernel": machine.get("kernel")}
    told |= {f"package {name}": version for name, version in (part_of(run, "software").get("packages") or {}).items()}
    for role, worker in part_of(run, "workers").items():
        told[f"{role} worker: host"] = part_of(worker, "runtime").get("host")
        packages = worker.get("packages") or {}
        told |= {f"{role} worker: package {name}": version for name, version in packages.items()}
    return {key: value for key, value in told.items() if value is not None}


def differences(runs: Mapping[str, Mapping[str, Any]]) -> list[Difference]:
    """The facts that two runs know and do not agree on. runs: name -> facts."""
    found = []
    for fact in dict.fromkeys(fact for facts in runs.values() for fact in facts):
        values: dict[str, list[str]] = {}
        for name, facts in runs.items():
            if fact in facts:
                values.setdefault(_shown(facts[fact]), []).append(name)
        if len(values) > 1:
            found.append(Difference(fact, values))
    return found


def told_apart(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """The number of the series that each run belongs to, from 1: runs of one series agree on every fact."""
    series: list[dict[str, Any]] = []
    numbers = {}
    for name, facts in runs.items():
        fits = [all(own[fact] == value for fact, value in facts.items() if fact in own) for own in series]
        if True not in fits:
            fits.append(True)
            series.append({})
        numbers[name] = fits.index(True) + 1
        series[fits.index(True)].update(facts)
    return numbers


def refuse_differences(runs: Mapping[str, Mapping[str, Any]], mend: str) -> None:
    """Raise UserError that names what runs do not agree on, both values and the runs. mend: what to do about it."""
    found = differences(runs)
    if found:
        differing = listed(found, 10, "\n  ")
        raise UserError(f"these runs do not belong together; they differ in\n  {differing}\n{mend}")


def _gpu_facts(gpu: Mapping[str, Any]) -> dict[str, Any]:
    cards = gpu.get("gpus")
    if cards is None:
        return {}
    facts: dict[str, Any] = {key: sorted({str(card.get(key)) for card in cards}) for key in ("name", "driver_version")}
    facts["memory"] = sorted({card.get("memory_total_mib") or 0 for card in cards})
    facts["cuda_version"] = gpu.get("cuda_version")
    return {f"gpu: {key}": value for key, value in facts.items()}


def _package_facts(name: str, packages: Mapping[str, str] | None) -> dict[str, Any]:
    return {f"{name} {package}": packages.get(package, "none") for package in PACKAGES} if packages else {}


def part_of(of: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """What is under these keys, one in the other; empty where one is missing or null."""
    for key in keys:
        of = of.get(key) or {}
    return of


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
