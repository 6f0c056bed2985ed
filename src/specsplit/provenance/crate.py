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

from specsplit.errors import counted
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
    graph = _Builder(record, steps, files).graph()
    graph["@graph"].sort(key=lambda entity: (entity["@id"] != "ro-crate-metadata.json", entity["@id"]))
    return (json.dumps(graph, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


class _Builder:
    """entities: of the files, by name in the archive."""

    def __init__(
        self, record: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], files: Mapping[str, tuple[str, int]]
    ) -> None:
        self.crate = ROCrate(version="1.1")
        self.record = record
        self.steps = [step for step in (*steps, *_steps_of_runs(record, steps)) if step["rule"]]
        self.entities = {
            name: self.crate.add(File(self.crate, dest_path=name, properties=_properties(name, *known)))
            for name, known in sorted(files.items())
            if name != WORKFLOW
        }
        self.workflow = self.entities[WORKFLOW] = self._add_workflow(_properties(WORKFLOW, *files[WORKFLOW]))

    def graph(self) -> dict[str, Any]:
        self.crate.metadata.extra_terms.update(TERMS)
        record, entities, root = self.record, self.entities, self.crate.root_dataset
        gammas = ", ".join(map(str, record["config"].get("gammas", [])))
        root["name"] = "SpecSplit: disaggregated speculative decoding, measured"
        root["description"] = (
            f"Tables, figures, texts, logs, configuration, code and provenance of a sweep over gamma {gammas}: "
            f"{counted(len(record['runs']), 'run')} of {counted(record['dataset'].get('count'), 'prompt')}. "
            "Weights are named by their hashes."
        )
        root["license"] = self._add(LICENSE, "CreativeWork", name="Apache License 2.0", identifier="Apache-2.0")
        root["datePublished"] = record["created"]
        for address, name in PROFILES.items():
            version = address.rpartition("/")[2]
            root.append_to("conformsTo", self._add(address, "CreativeWork", name=name, version=version))
        if "README.md" in entities:
            entities["README.md"]["about"] = root
        for direction, parameters in (("input", INPUTS), ("output", OUTPUTS)):
            for name, file in parameters.items():
                if file in entities:
                    parameter = self.crate.add_formal_parameter(name, "File", identifier=f"#parameter/{name}")
                    parameter["workExample"] = entities[file]
                    entities[file]["exampleOfWork"] = parameter
                    self.workflow.append_to(direction, parameter)
        run = self._add_run()
        self._add_engine(run, self._add_jobs())
        graph: dict[str, Any] = self.crate.metadata.generate()
        return graph

    def _add(self, entity_id: str, kind: str, **properties: Any) -> ContextEntity:
        return self.crate.add(ContextEntity(self.crate, entity_id, properties={"@type": kind, **properties}))

    def _add_workflow(self, properties: Mapping[str, Any]) -> Any:
        properties = {
            **properties,
            "@type": ["File", "SoftwareSourceCode", "ComputationalWorkflow", "HowTo"],
            "encodingFormat": "text/x-python",
            "version": self.record["git"]["commit"] or f"sha256:{self.record['workflow_sha256']}",
            "license": {"@id": LICENSE},
            "conformsTo": {"@id": WORKFLOW_PROFILE},
        }
        version = self.record["software"]["snakemake"]
        return self.crate.add_workflow(
            dest_path=WORKFLOW, main=True, lang="snakemake", lang_version=version, properties=properties
        )

    def _add_run(self) -> Any:
        """The action that is the whole run."""
        properties = {"name": "Run of the workflow", "actionStatus": COMPLETED}
        run = self.crate.add_action(self.workflow, "#run", properties=properties)
        run["description"] = self.record["workflow"]["command"] or "snakemake, started in a way that was not recorded"
        times = sorted(time for step in self.steps for time in (step["started"], step["finished"]) if time)
        if times:
            run["startTime"], run["endTime"] = _time(times[0]), _time(times[-1])
        entities = self.entities
        run["object"] = [entities[file] for file in INPUTS.values() if file in entities]
        run["object"] += [self._add_model(model) for model in self.record["models"]]
        figures = [entity for name, entity in entities.items() if name.startswith("results/figures/")]
        run["result"] = [*(entities[file] for file in OUTPUTS.values() if file in entities), *figures]
        self.crate.root_dataset.append_to("mentions", run)
        return run

    def _add_jobs(self) -> list[ContextEntity]:
        """A tool and a step for each rule, an action for each job; returns the links between actions and steps."""
        controls = []
        version = self.record["software"]["specsplit"]
        for position, rule in enumerate(dict.fromkeys(step["rule"] for step in self.steps), start=1):
            name = f"specsplit, as rule {rule} calls it"
            tool = self._add(f"#tool/{rule}", "SoftwareApplication", name=name, softwareVersion=version)
            how = self._add(f"#step/{rule}", "HowToStep", name=rule, position=str(position), workExample=tool)
            self.workflow.append_to("hasPart", tool)
            self.workflow.append_to("step", how)
            for step in self.steps:
                if step["rule"] == rule:
                    action = self._add_job(tool, step)
                    identifier = action.id.replace("#job/", "#control/")
                    control = self._add(identifier, "ControlAction", name=f"control of {action['name']}")
                    control["instrument"], control["object"] = how, action
                    controls.append(control)
        return controls

    def _add_job(self, tool: Any, step: Mapping[str, Any]) -> Any:
        first = step["outputs"][0]
        properties = {"name": f"{step['rule']}: {first}", "actionStatus": COMPLETED}
        action = self.crate.add_action(tool, f"#job/{step['rule']}/{quote(first)}", properties=properties)
        action["description"] = step["command"] or "a script of the workflow"
        for key, time in (("startTime", step["started"]), ("endTime", step["finished"])):
            if time:
                action[key] = _time(time)
        for key, files in (("result", (*step["outputs"], *step["log"])), ("object", step["inputs"])):
            if found := [self.entities[file] for file in files if file in self.entities]:
                action[key] = _single(found)
        self.crate.root_dataset.append_to("mentions", action)
        return action

    def _add_engine(self, run: Any, controls: list[ContextEntity]) -> None:
        address, version = "https://snakemake.github.io", self.record["software"]["snakemake"] or "unknown"
        properties = {"name": "Snakemake", "url": {"@id": address}, "softwareVersion": version}
        engine = self._add(address, "SoftwareApplication", **properties)
        organize = self._add("#engine", "OrganizeAction", name="Snakemake ran the jobs", actionStatus=COMPLETED)
        organize["instrument"], organize["result"], organize["object"] = engine, run, _single(controls)

    def _add_model(self, model: Mapping[str, Any]) -> ContextEntity:
        properties: dict[str, Any] = {
            "name": f"model {model.get('name')}",
            "description": json.dumps(model.get("source") or {}, sort_keys=True),
            "sha256": (model.get("fingerprint") or {}).get("weights_sha256"),
        }
        if model.get("revision"):
            properties["version"] = model["revision"]
        return self._add(f"#model/{quote(str(model.get('name')))}", "CreativeWork", **properties)


def _properties(name: str, digest: str, size: int) -> dict[str, Any]:
    kind = TYPES.get(f".{name.rpartition('.')[2]}") or mimetypes.guess_type(name)[0] or "text/plain"
    return {"name": name, "encodingFormat": kind, "contentSize": str(size), "sha256": digest}


def _steps_of_runs(record: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The runs that the workflow did not log, from their own run.json."""
    logged = {output for step in steps if step["rule"] for output in step["outputs"]}
    return [
        {**run, "rule": "benchmark", "inputs": [], "outputs": [run["file"]], "log": []}
        for run in record["runs"]
        if run["file"] not in logged and run.get("command")
    ]


def _time(text: str) -> str:
    """In the one form of ISO 8601 that the profile accepts."""
    return datetime.fromisoformat(text).isoformat(timespec="milliseconds")


def _single(values: list[Any]) -> Any:
    """RO-Crate writes one value without a list."""
    return values[0] if len(values) == 1 else values
