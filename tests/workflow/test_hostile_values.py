"""Nothing of the configuration becomes code: values that a shell, Snakemake or a pattern reads as more than text."""

from __future__ import annotations

import json
import shutil

import pytest

from workspace import Workspace

VALUES = [
    *("a b", "a  b", "it's", 'say "x"', "$HOME", "$(touch executed)", "`touch executed`", "${PATH}"),
    *("~", "=a", "a*", "a?[bc]", "a;touch executed", "a&&touch executed"),
    *("a|b>c", "#a", "a'$(touch executed)'", "a\\b", "%s!~ü", "it's $(touch executed) a*"),
]
OFTEN = {"it's $(touch executed) a*"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("hostile"), tiny_model_folder("llama"))


@pytest.mark.parametrize("value", [v if v in OFTEN else pytest.param(v, marks=pytest.mark.slow) for v in VALUES])
def test_a_path_is_a_path_whatever_is_in_it(project: Workspace, value: str, tiny_model_folder) -> None:
    """Prompts, a local model and a token of this name: prompts are read, the model prepared, the token named."""
    folder = project.folder
    names = {"dataset": f"{value}/{value}.jsonl", "model": f"models/{value}", "token": f"{value}/token"}
    (folder / value).mkdir(parents=True)
    shutil.copy(folder / "prompts.jsonl", folder / names["dataset"])
    shutil.copytree(tiny_model_folder("llama"), folder / names["model"])
    project.config["dataset"] = {"path": names["dataset"]}
    project.config["models"] = {"tiny": {"source": "local", "path": names["model"]}}
    project.config["workers"] = {"token_file": names["token"], "tls_ca": names["token"], "max_context": 128}
    for made in ("results", "resources"):
        shutil.rmtree(folder / made, ignore_errors=True)
    prepared = "results/dataset/prompts.jsonl resources/models/tiny/model.json"
    project.run(target=f"{prepared} results/settings/gamma_1/operation.json results/provenance/config.json")
    assert len((folder / "results/dataset/prompts.jsonl").read_text().splitlines()) == 3
    manifest = json.loads((folder / "resources/models/tiny/model.json").read_text())
    assert manifest["source"]["path"] == names["model"]
    told = json.loads((folder / "results/settings/gamma_1/operation.json").read_text())
    assert told["run"]["token_file"] == told["run"]["tls_ca"] == told["draft"]["token_file"] == names["token"]
    config = json.loads((folder / "results/provenance/config.json").read_text())
    assert config["dataset"]["path"] == names["dataset"]
    assert not list(folder.rglob("executed"))
    planned = project.run("--dry-run")  # whole: what reads these is planned too
    assert "This was a dry-run" in planned


@pytest.mark.parametrize("key", ["dataset.path", "models.tiny.path"])
def test_what_cannot_be_an_input_is_refused_with_its_key(project: Workspace, key: str) -> None:
    """The rest of such values in tests/unit/test_workflow_plan.py."""
    project.config["dataset"] = {"path": "prompts.jsonl"}
    project.config["models"] = {"tiny": {"source": "local", "path": "model"}}
    section = project.config["dataset"] if key.startswith("dataset") else project.config["models"]["tiny"]
    section["path"] = "{a}"
    done = project.snakemake("--dry-run")
    assert f"{key}: '{{a}}' has {{ in it, which Snakemake takes for a pattern: rename it" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
