"""The description of an archive as an RO-Crate: https://www.researchobject.org/workflow-run-crate, profile 0.5.

It is a Provenance Run Crate: the workflow, its rules as steps, and an action for the run and for each job that made a
file, with its command, times, inputs and outputs.
"""

from __future__ import annotations

import json
import mimetypes
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote

from rocrate.model import ContextEntity, File
from rocrate.rocrate import ROCrate

from specsplit.provenance.folder import CONFIG, RECORD

PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": "Process Run Crate",
    "https://w3id.org/ro/wfrun/workflow/0.5": "Workflow Run Crate",
    "https://w3id.org/ro/wfrun/provenance/0.5": "Provenance Run Crate",
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": "Workflow RO-Crate",
}
WORKFLOW_PROFILE = "https://bioschemas.org/profiles/ComputationalWorkflow/1.0-RELEASE"
# Said here and not by the address of another context, which readers would have to fetch.
TERMS = {"sha256": "https://w3id.org/ro/terms/workflow-run#sha256"}
LICENSE = "https://spdx.org/licenses/Apache-2.0"
COMPLETED = "http://schema.org/CompletedActionStatus"
TYPES = {
    ".csv": "text/csv",
    ".jsonl": "application/jsonl",
    ".md": "text/markdown",
    ".patch": "text/x-diff",
    ".py": "text/x-python",
    ".pyi": "text/x-python",
    ".rst": "text/x-rst",
    ".smk": "text/x-python",
    ".toml": "application/toml",
    ".yaml": "application/yaml",
}
WORKFLOW = "Snakefile"
INPUTS = {"configuration": CONFIG, "prompts": "results/dataset/prompts.jsonl"}
OUTPUTS = {
    "requests": "results/requests.csv",
    "rounds": "results/per_round.csv",
    "summary": "results/summary.csv",
    "provenance": RECORD,
}


def build_crate(
    record: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], files: Mapping[str, tuple[str, int]]
) -> bytes:
    """The ro-crate-metadata.json of an archive.

    record: the provenance record. steps: of the archived files, as read_steps gives them. files: name in the
    archive -> (sha256, bytes). The same arguments give the same bytes.
    """
    crate = ROCrate(version="1.1")
    crate.metadata.extra_terms.update(TERMS)
    root = crate.root_dataset
    gammas = ", ".join(map(str, record["config"].get("gammas", [])))
    root["name"] = "SpecSplit: disaggregated speculative decoding, measured"
    root["description"] = (
        f"Tables, figures, texts, logs, configuration, code and provenance of a sweep over gamma {gammas}: "
        f"{len(record['runs'])} runs of {record['dataset'].get('count')} prompts. Weights are named by their hashes."
    )
    root["license"] = _context(crate, LICENSE, "CreativeWork", name="Apache License 2.0", identifier="Apache-2.0")
    root["datePublished"] = record["created"]
    entities = {name: _file(crate, name, *known) for name, known in sorted(files.items()) if name != WORKFLOW}
    workflow = entities[WORKFLOW] = _workflow(crate, record, *files[WORKFLOW])
    for address, name in PROFILES.items():
        version = address.rpartition("/")[2]
        root.append_to("conformsTo", _context(crate, address, "CreativeWork", name=name, version=version))
    if "README.md" in entities:
        entities["README.md"]["about"] = root
    for direction, parameters in (("input", INPUTS), ("output", OUTPUTS)):
        for name, file in parameters.items():
            if file in entities:
                parameter = crate.add_formal_parameter(name, "File", identifier=f"#parameter/{name}")
                parameter["workExample"] = entities[file]
                entities[file]["exampleOfWork"] = parameter
                workflow.append_to(direction, parameter)
    known_steps = [step for step in (*steps, *_steps_of_runs(record, steps)) if step["rule"]]
    run = _run(crate, workflow, entities, record, known_steps)
    controls = _jobs(crate, workflow, entities, record, known_steps)
    _engine(crate, record, run, controls)
    graph = crate.metadata.generate()
    graph["@graph"].sort(key=lambda entity: (entity["@id"] != "ro-crate-metadata.json", entity["@id"]))
    return (json.dumps(graph, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _context(crate: ROCrate, entity_id: str, kind: str, **properties: Any) -> ContextEntity:
    return crate.add(ContextEntity(crate, entity_id, properties={"@type": kind, **properties}))


def _properties(name: str, digest: str, size: int) -> dict[str, Any]:
    kind = TYPES.get(f".{name.rpartition('.')[2]}") or mimetypes.guess_type(name)[0] or "text/plain"
    return {"name": name, "encodingFormat": kind, "contentSize": str(size), "sha256": digest}


def _file(crate: ROCrate, name: str, digest: str, size: int) -> File:
    return crate.add(File(crate, dest_path=name, properties=_properties(name, digest, size)))


def _workflow(crate: ROCrate, record: Mapping[str, Any], digest: str, size: int) -> Any:
    properties = {
        **_properties(WORKFLOW, digest, size),
        "@type": ["File", "SoftwareSourceCode", "ComputationalWorkflow", "HowTo"],
        "encodingFormat": "text/x-python",
        "version": record["git"]["commit"] or f"sha256:{record['workflow_sha256']}",
        "license": {"@id": LICENSE},
        "conformsTo": {"@id": WORKFLOW_PROFILE},
    }
    version = record["software"]["snakemake"]
    return crate.add_workflow(
        dest_path=WORKFLOW, main=True, lang="snakemake", lang_version=version, properties=properties
    )


def _steps_of_runs(record: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The runs that Snakemake kept no record of, from their own."""
    known = {output for step in steps if step["rule"] for output in step["outputs"]}
    return [
        {**run, "rule": "benchmark", "inputs": [], "outputs": [run["file"]], "log": []}
        for run in record["runs"]
        if run["file"] not in known and run.get("command")
    ]


def _run(
    crate: ROCrate,
    workflow: Any,
    entities: Mapping[str, Any],
    record: Mapping[str, Any],
    steps: Sequence[Mapping[str, Any]],
) -> Any:
    """The action that is the whole run."""
    run = crate.add_action(workflow, "#run", properties={"name": "Run of the workflow", "actionStatus": COMPLETED})
    run["description"] = record["workflow"]["command"] or "snakemake, started in a way that was not recorded"
    times = sorted(time for step in steps for time in (step["started"], step["finished"]) if time)
    if times:
        run["startTime"], run["endTime"] = _time(times[0]), _time(times[-1])
    inputs = [entities[file] for file in INPUTS.values() if file in entities]
    run["object"] = [*inputs, *(_model(crate, model) for model in record["models"])]
    figures = [entity for name, entity in entities.items() if name.startswith("results/figures/")]
    run["result"] = [*(entities[file] for file in OUTPUTS.values() if file in entities), *figures]
    crate.root_dataset.append_to("mentions", run)
    return run


def _jobs(
    crate: ROCrate,
    workflow: Any,
    entities: Mapping[str, Any],
    record: Mapping[str, Any],
    steps: Sequence[Mapping[str, Any]],
) -> list[ContextEntity]:
    """A tool and a step for each rule, an action for each job; returns what says which step an action belongs to."""
    controls = []
    for position, rule in enumerate(dict.fromkeys(step["rule"] for step in steps), start=1):
        version = record["software"]["specsplit"]
        name = f"specsplit, as rule {rule} calls it"
        tool = _context(crate, f"#tool/{rule}", "SoftwareApplication", name=name, softwareVersion=version)
        how = _context(crate, f"#step/{rule}", "HowToStep", name=rule, position=str(position), workExample=tool)
        workflow.append_to("hasPart", tool)
        workflow.append_to("step", how)
        for step in steps:
            if step["rule"] == rule:
                action = _job(crate, tool, step, entities)
                identifier = action.id.replace("#job/", "#control/")
                control = _context(crate, identifier, "ControlAction", name=f"control of {action['name']}")
                control["instrument"], control["object"] = how, action
                controls.append(control)
    return controls


def _job(crate: ROCrate, tool: Any, step: Mapping[str, Any], entities: Mapping[str, Any]) -> Any:
    first = step["outputs"][0]
    properties = {"name": f"{step['rule']}: {first}", "actionStatus": COMPLETED}
    action = crate.add_action(tool, f"#job/{step['rule']}/{quote(first)}", properties=properties)
    action["description"] = step["command"] or "a script of the workflow"
    for key, time in (("startTime", step["started"]), ("endTime", step["finished"])):
        if time:
            action[key] = _time(time)
    results = [entities[file] for file in (*step["outputs"], *step["log"]) if file in entities]
    objects = [entities[file] for file in step["inputs"] if file in entities]
    if results:
        action["result"] = _single(results)
    if objects:
        action["object"] = _single(objects)
    crate.root_dataset.append_to("mentions", action)
    return action


def _time(text: str) -> str:
    """In the one form of ISO 8601 that the profile knows."""
    return datetime.fromisoformat(text).isoformat(timespec="milliseconds")


def _single(values: list[Any]) -> Any:
    """RO-Crate writes one value without a list."""
    return values[0] if len(values) == 1 else values


def _engine(crate: ROCrate, record: Mapping[str, Any], run: Any, controls: list[ContextEntity]) -> None:
    address = "https://snakemake.github.io"
    version = record["software"]["snakemake"] or "unknown"
    engine = _context(
        crate, address, "SoftwareApplication", name="Snakemake", url={"@id": address}, softwareVersion=version
    )
    organize = _context(crate, "#engine", "OrganizeAction", name="Snakemake ran the jobs", actionStatus=COMPLETED)
    organize["instrument"], organize["result"], organize["object"] = engine, run, _single(controls)


def _model(crate: ROCrate, model: Mapping[str, Any]) -> ContextEntity:
    source = model.get("source") or {}
    properties: dict[str, Any] = {
        "name": f"model {model.get('name')}",
        "description": json.dumps(source, sort_keys=True),
        "sha256": (model.get("fingerprint") or {}).get("weights_sha256"),
    }
    if model.get("revision"):
        properties["version"] = model["revision"]
    return _context(crate, f"#model/{quote(str(model.get('name')))}", "CreativeWork", **properties)
