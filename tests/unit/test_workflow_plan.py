"""What the Snakefile asks of the package while Snakemake parses: jobs, settings, files; and what a run begins with."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from packaging.specifiers import SpecifierSet

from specsplit.errors import UserError
from specsplit.launch.endpoint import Endpoint
from specsplit.launch.heartbeat import LEASE_FILE, LEASE_HOST, LEASE_PID
from specsplit.launch.process import ProcessIdentity
from specsplit.models.file_names import MODEL_FILES
from specsplit.provenance.steps import COMMAND
from specsplit.settings.distill import AcceptanceSettings, TrainingSettings, WritingSettings
from specsplit.settings.measure import (
    BenchSettings,
    CapacitySettings,
    ContextSettings,
    LayerSettings,
    StatesCostSettings,
)
from specsplit.settings.run import MAX_GAMMA, OrchestratorConfig
from specsplit.settings.worker import ROLES, LaunchSettings
from specsplit.workflow import files, plan, runs
from specsplit.workflow.plan import Plan

SOURCES = Path(plan.__file__).parents[2]
PARSED = ("workflow.decided", "workflow.runs", "analysis.captions", "provenance.closure", "provenance.capture")
# What pip installs with Snakemake, as far as it is imported while the rules are parsed.
OF_SNAKEMAKE = {
    *("jsonschema", "jsonschema_specifications", "referencing", "rpds", "attr", "attrs", "yaml", "_yaml", "psutil"),
    *("idna", "typing_extensions", "fqdn", "requests", "urllib3", "charset_normalizer", "certifi", "cython_runtime"),
}
ELSEWHERE = {
    "gammas": [0, 3],
    "models": {
        "m": {"source": "local", "path": "models/m"},
        "n": {"source": "ngram", "tokenizer": "m"},
        "s": {"source": "suffix", "tokenizer": "m", "model": "made"},
        "made": {"source": "local", "path": "results/distill/default/draft"},
    },
    "target": {"model": "m"},
    "states_cost": {"draft": "m", "head": "made"},
    "drafts": {"draft": {"model": "m", "skip_layers": "auto"}, "n": {"model": "n"}, "made": {"model": "made"}},
    "workers": {"token_file": "token", "tls_ca": "ca.pem"},
}


# ---- what is imported


def test_the_modules_of_the_parser_need_nothing_that_snakemake_lacks() -> None:
    code = (
        "import sys, importlib; before = set(sys.modules)\n"
        f"for name in {PARSED}: importlib.import_module('specsplit.' + name)\n"
        "print(*{n.partition('.')[0] for n in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found = {name for name in done.stdout.split() if not name.startswith("_cython_")}
    assert found - {"specsplit"} <= OF_SNAKEMAKE


# ---- jobs


SETTINGS = {
    "race": [OrchestratorConfig, BenchSettings],
    "capacity": [OrchestratorConfig, CapacitySettings],
    "context": [OrchestratorConfig, ContextSettings],
    "states_cost": [OrchestratorConfig, StatesCostSettings],
    "layers": [LayerSettings],
    "distill/write_data": [WritingSettings],
    "distill/train": [TrainingSettings],
    "distill/measure": [AcceptanceSettings],
}


@pytest.mark.parametrize("job", Plan(ELSEWHERE).jobs)
def test_the_settings_of_every_job_are_known_and_in_the_file_where_they_belong(job: str) -> None:
    made = Plan(ELSEWHERE)
    run: list[Any] = SETTINGS.get(job) or SETTINGS.get(job.partition("/")[0]) or [OrchestratorConfig, BenchSettings]
    for operates in (False, True):
        for part, settings in json.loads(made.settings(job, operates=operates)).items():
            classes = [ROLES[part], LaunchSettings] if part in ROLES else run
            for key in settings:
                owners = [cls for cls in classes if key in cls.model_fields]
                assert owners, f"{part}.{key}"
                assert any((key in cls.operating()) == operates for cls in owners), f"{part}.{key}"


def test_what_is_written_twice_is_the_same() -> None:
    assert plan.MAX_GAMMA == MAX_GAMMA


def test_models_and_files_of_a_run() -> None:
    made = Plan(ELSEWHERE)
    assert set(made.points) == {"gamma_0", "gamma_3", "draft-n_gamma_3", "draft-made_gamma_3"}
    assert made.models_of(["gamma_0"]) == ["resources/models/m/model.json"]
    assert made.models_of(["gamma_3"]) == ["resources/models/m/model.json", "results/skip_layers/draft.json"]
    assert made.model_inputs("m") == ["models/m/config.json", "models/m/model.safetensors"]
    assert made.model_inputs("made") == made.model_inputs("n") == []
    assert made.model_made_from("n") == ["resources/models/m/model.json"]
    assert made.model_made_from("made")[0] == "results/distill/default/draft/model.safetensors"
    assert made.endpoints_of(["gamma_3"], cluster=False) == [f"results/workers/gamma_3/{r}.json" for r in ROLES]
    with pytest.raises(UserError, match=r"set workers\.lifecycle to job"):
        made.endpoints_of(["gamma_3"], cluster=True)


def test_the_drafts_of_the_measurement_of_hidden_states_share_a_target() -> None:
    made = Plan(ELSEWHERE)
    draft, head = made.compared
    assert (made.role_model("draft", draft), made.role_model("draft", head)) == tuple(
        map(plan._manifest, ("m", "made"))
    )
    assert made.settings(draft, operates=False) != made.settings(head, operates=False)
    targets = [json.loads(made.settings(label, operates=False))["target"] for label in (draft, head)]
    assert targets[0] == targets[1]
    assert targets[0]["hidden_states_draft"] == made.role_model("draft", head)
    without = Plan({**ELSEWHERE, "states_cost": {"draft": "m"}})
    assert without.compared == {}
    with pytest.raises(
        UserError, match=r"states_cost\.head: smollm2-hidden-states is not in models; known models: m, n"
    ):
        without.compared_endpoints(cluster=False)


def test_in_another_folder_prompts_and_draft_of_the_default_are_those_of_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = Plan({}, project=SOURCES.parent)
    outside = [made.dataset, *(path for name in made.models for path in made.model_inputs(name))]
    assert len(outside) > 1
    for path in map(Path, outside):
        assert (path.is_absolute(), path.exists()) == (False, True), path
    kept = Path(made.dataset.removeprefix(os.path.relpath(SOURCES.parent) + "/"))
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert Plan({}, project=SOURCES.parent).dataset == str(kept)


def test_with_a_prefix_every_path_of_the_workflow_has_it() -> None:
    made = Plan(ELSEWHERE, "a b/")
    for job in made.jobs:
        for operates in (False, True):
            text = made.settings(job, operates=operates)
            assert text.count("results/") + text.count("resources/") == text.count("a b/"), job
    assert made.model_flags("n") == (
        "--ngram --tokenizer 'a b/resources/models/m' --max-ngram 3 --min-ngram 1 --ignore-model-settings"
    )
    assert made.model_made_from("s") == ["resources/models/m/model.json", "resources/models/made/model.json"]
    assert made.model_flags("s").startswith(
        "--suffix --tokenizer 'a b/resources/models/m' --model 'a b/resources/models/made' "
    )
    assert made.model_flags("made") == "--local 'a b/results/distill/default/draft' --ignore-model-settings"
    assert made.model_flags("m") == "--local models/m"


def test_how_workers_are_reached_decides_nothing() -> None:
    made = Plan(ELSEWHERE)
    assert '"token_file"' not in made.settings("gamma_3", operates=False)
    told = json.loads(made.settings("gamma_3", operates=True))
    assert (told["run"]["token_file"], told["run"]["tls_ca"]) == ("token", "ca.pem")
    assert told["draft"]["token_file"] == told["target"]["token_file"] == "token"


@pytest.mark.parametrize(("device", "gpus", "asked"), [("auto", 0, 0), ("auto", 2, 1), ("cuda:1", 0, 1), ("cpu", 0, 0)])
def test_gpus_of_what_runs_its_models_itself(device: str, gpus: int, asked: int) -> None:
    assert Plan({"workers": {"device": device, "gpus": gpus}}).own_gpu == asked


def test_variables_that_would_decide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECSPLIT_ORCH_TARGET_ADDRESS", "gpu:1")
    assert json.loads(Plan({}).settings("gamma_0", operates=True))["target"]["attach"] == "gpu:1"
    monkeypatch.setenv("SPECSPLIT_DRAFT_DTYPE", "int8")
    with pytest.raises(UserError, match="SPECSPLIT_DRAFT_DTYPE: would change results"):
        Plan({})


# ---- files


@pytest.mark.parametrize("bad", ["a\nb", "a\x00b", "a\x1b[31mb", "a\u2028b", "a\tb", "-rf", " a", "a ", "\ud800"])
@pytest.mark.parametrize("key", [*files.PATH_KEYS, "models.m.path"])
def test_a_text_that_cannot_be_a_path_is_refused_with_its_key(key: str, bad: str) -> None:
    raw: dict[str, Any] = {"models": {"m": {"source": "local", "path": "m"}}, "target": {"model": "m"}}
    raw["draft"] = {"model": "m"}
    *sections, last = key.split(".")
    at = raw
    for section in sections:
        at = at.setdefault(section, {})
    if last.endswith("address"):  # else it is refused for another reason, which names the key as well
        bad = f"{bad.rstrip(' ')}.json{' ' if bad.endswith(' ') else ''}"
    at[last] = bad
    with pytest.raises(UserError, match=rf"{key}: "):
        Plan(raw)


@pytest.mark.parametrize("bad", ["{a}", "{{a}}", "{wildcards.model}", "a{", "a<results>"])
@pytest.mark.parametrize("key", ["dataset", "models"])
def test_what_snakemake_takes_for_a_pattern_is_refused_in_an_input_and_fine_elsewhere(key: str, bad: str) -> None:
    raw: dict[str, Any] = {"workers": {"token_file": bad}}
    Plan(raw)
    named = {"dataset": "dataset.path", "models": r"models\.m\.path"}[key]
    given = {"path": bad} if key == "dataset" else {"m": {"source": "local", "path": bad}}
    both = {"target": {"model": "m"}, "draft": {"model": "m"}} if key == "models" else {}
    with pytest.raises(UserError, match=f"{named}: .* takes for a pattern"):
        Plan({**raw, key: given, **both})


def test_a_checkout_whose_path_snakemake_takes_for_a_pattern_is_refused() -> None:
    files.check_project(Path("a b'$(c)*"))
    with pytest.raises(UserError, match=r"has \{ in it, which Snakemake takes for a pattern: rename the folder"):
        files.check_project(Path("a{b}"))


@pytest.mark.parametrize("path", ["results/dataset/prompts.jsonl", "./results/x/../dataset/prompts.jsonl"])
def test_prompts_are_not_read_from_where_the_workflow_writes_them(path: str) -> None:
    with pytest.raises(UserError, match=r"dataset\.path: .* is what the workflow makes"):
        Plan({"dataset": {"path": path}})


@pytest.mark.parametrize("key", ["dataset.path", "models.m.path"])
def test_what_can_never_be_read_is_refused_with_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("circle").symlink_to("circle")
    for path in ("x" * 300, "a/" * 3000, "~nobody-of-that-name/x", "circle"):
        given = {"dataset": {"path": path}} if key == "dataset.path" else {}
        models = {"m": {"source": "local", "path": path if key == "models.m.path" else "m"}}
        with pytest.raises(UserError, match=f"{key}: '{path[:5]}"):
            Plan({"models": models, "target": {"model": "m"}, "draft": {"model": "m"}, **given})
    with pytest.raises(UserError, match=r"dataset\.path: '\.' is a folder"):
        Plan({"dataset": {"path": "."}})


def test_flags_are_words_whatever_is_in_them() -> None:
    made = files.flags(path="a 'b' $(c) `d` {e}", several=["-x", "y z"], on=True, off=False, none=None, dash="-x")
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {made}"], capture_output=True, text=True).stdout
    assert words.splitlines() == [
        *("--path", "a 'b' $(c) `d` {e}", "--several", "-x", "y z", "--on", "--no-off", "--dash=-x")
    ]


def model(folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "README.md"):
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize("pattern", MODEL_FILES)
@pytest.mark.parametrize("change", ["write", "write with an old date", "remove"])
def test_every_file_of_a_model_counts_by_its_content(tmp_path: Path, pattern: str, change: str) -> None:
    folder = model(tmp_path / "m")
    path = folder / pattern.replace("*", "00001-of-00002")
    path.write_text("first")
    os.utime(path, (1e9, 1e9))
    before = files.files_sha256(files.model_files(folder))
    assert files.files_sha256(files.model_files(folder)) == before
    path.unlink() if change == "remove" else path.write_text("other")
    if change == "write with an old date":
        os.utime(path, (1e9, 1e9))
    assert files.files_sha256(files.model_files(folder)) != before


def test_other_files_of_a_models_folder_do_not_count(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    before = files.files_sha256(files.model_files(folder))
    (folder / "README.md").write_text("other")
    assert files.files_sha256(files.model_files(folder)) == before


def test_a_large_file_counts_by_samples_size_and_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "READ_WHOLE_BYTES", 10)
    path = tmp_path / "w"
    path.write_bytes(bytes(1 << 21))
    os.utime(path, (1e9, 1e9))
    before = files.files_sha256([path])
    path.write_bytes(bytes(1 << 20) + b"x" * (1 << 20))
    os.utime(path, (1e9, 1e9))
    assert files.files_sha256([path]) != before
    path.write_bytes(bytes(1 << 21))
    assert files.files_sha256([path]) != before
    os.utime(path, (1e9, 1e9))
    assert files.files_sha256([path]) == before


def test_measurements_beside_the_sweep_that_are_there_or_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert files.beside_the_sweep("", ["results/report.html"]) == []
    rows = ["results/capacity.csv", "results/capacity_requests.csv", "results/capacity_run.json"]
    rows += ["results/figures/capacity.png", "results/figures/capacity.svg"]
    for target in ("capacity", "specsplit_capacity", *rows):
        assert files.beside_the_sweep("", [target, "results/report.html"]) == rows, target
    assert files.beside_the_sweep("p/", ["p/results/capacity.csv"]) == rows
    Path("results").mkdir()
    Path("results/overhead.csv").touch()
    assert files.beside_the_sweep("", []) == ["results/overhead.csv"]


ME = ProcessIdentity.of(os.getpid())
assert ME is not None
ENDPOINT = Endpoint("127.0.0.1:1", False, socket.gethostname(), ME.pid, ME.started, None, None, {})


@pytest.mark.parametrize(
    ("endpoint", "dead"),
    [
        (ENDPOINT, False),
        (replace(ENDPOINT, started=1.0), True),
        (replace(ENDPOINT, holder_pid=ME.pid, holder_started=ME.started), False),
        (replace(ENDPOINT, holder_pid=1 << 30, holder_started=1.0), True),
        (replace(ENDPOINT, started=1.0, host="elsewhere"), False),
        (replace(ENDPOINT, pid=None, started=None, attached=True), False),
        (None, False),
    ],
)
def test_a_worker_that_a_killed_run_left_is_noticed(tmp_path: Path, endpoint: Endpoint | None, dead: bool) -> None:
    path, run = tmp_path / "target.json", tmp_path / "requests.csv"
    path.write_text(json.dumps(asdict(endpoint)) if endpoint else '{"address": ')
    assert files.dead_worker(str(path), str(run)) == (ME.pid if dead else None)
    run.touch()  # made already: nothing waits for the worker
    assert files.dead_worker(str(path), str(run)) is None
    assert files.dead_worker(str(tmp_path / "none.json"), str(run)) is None


# ---- a run


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (LEASE_PID, LEASE_HOST, LEASE_FILE, COMMAND):
        monkeypatch.setenv(name, "")  # so that what a run sets is undone
        monkeypatch.delenv(name)
    return tmp_path / ".snakemake"


def begun(state: Path, *, deployed: bool = True) -> runs.Run:
    run = runs.Run()
    run.begin(1, [], dated=state / "dated", deployed=deployed, state=state)
    return run


def test_a_run_claims_its_folder_and_jobs_end_with_it(state: Path) -> None:
    first = begun(state)
    assert (os.environ[LEASE_PID], os.environ[LEASE_HOST]) == (str(os.getpid()), socket.gethostname())
    with pytest.raises(UserError, match=f"process {os.getpid()}, works in this folder"):
        begun(state)
    del first
    begun(state)


@pytest.mark.parametrize("end", ["sys.exit()", "os.kill(os.getpid(), 9)"])
def test_a_run_that_ended_however_blocks_none(state: Path, end: str) -> None:
    code = (
        "import os, sys; from pathlib import Path; from specsplit.workflow.runs import Run; run = Run(); "
        f"run.begin(1, [], deployed=True, state=Path({str(state)!r}), dated=Path({str(state / 'dated')!r})); {end}"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert not psutil.pid_exists(int((state / "specsplit.lock").read_text()))
    begun(state)


def test_without_the_command_the_first_message_says_how_to_install_it(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(UserError, match=r"specsplit is not installed.*make \.venv/installed"):
        begun(state, deployed=False)
    begun(state)


def test_a_copy_without_dates_shows(state: Path) -> None:
    begun(state)
    dated, copy = state / "dated", state / "copy"
    assert runs.lost_dates(dated) is runs.lost_dates(state / "none") is None
    shutil.copy2(dated, copy)
    assert runs.lost_dates(copy) is None
    shutil.copy(dated, copy)
    assert "was copied without its dates" in str(runs.lost_dates(copy))


def test_the_last_words_are_those_of_the_jobs_that_failed(state: Path, tmp_path: Path) -> None:
    run = begun(state)
    log, empty = tmp_path / "merge.log", tmp_path / "empty.log"
    log.write_text("\n".join(f"line {index}" for index in range(100)) + "\nTypeError: the cause\n")
    empty.touch()
    logger = logging.getLogger("snakemake.logging")
    for path in (log, log, empty):
        told = {"event": "job_error", "rule_name": path.stem, "log": [str(path)]}
        logger.handle(logger.makeRecord("x", logging.ERROR, "x", 1, "failed", (), None, extra=told))
    words = run.last_words()
    assert words.count("Rule merge failed") == 1
    assert "    line 99\n    TypeError: the cause" in words
    assert "line 80" not in words
    assert words.endswith("Rule empty failed; its log is empty")


# ---- how it is deployed


def test_the_environment_of_the_rules_is_what_the_package_asks_for_in_the_tested_versions() -> None:
    root = SOURCES.parent

    def name(requirement: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=; ]", requirement)[0]).lower()

    needed = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    tested = (root / "envs" / "constraints.txt").read_text().splitlines()
    versions = {name(line): line.partition("==")[2] for line in tested if "==" in line}
    environment = yaml.safe_load((root / "envs" / "specsplit.yaml").read_text())
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert {name(line) for line in pip} == {name(line) for line in needed}
    assert all(line.partition("==")[2] == versions[name(line)] for line in pip)


def test_a_target_that_projects_hidden_states_is_told_whose() -> None:
    made = Plan({"hidden_states": {"project": "target", "form": "int8"}})
    told = {label: json.loads(made.settings(label, operates=False)) for label in ("gamma_0", "gamma_3")}
    assert told["gamma_3"]["target"]["hidden_states_draft"] == made.role_model("draft", "gamma_3")
    assert made.other_model("target", "gamma_3") == [made.role_model("draft", "gamma_3")]
    assert told["gamma_3"]["run"]["hidden_states_form"] == "int8"
    assert told["gamma_0"]["target"]["hidden_states_draft"] is None
    assert told["gamma_0"]["run"]["hidden_states_form"] == "bfloat16"
    assert Plan({}).other_model("target", "gamma_3") == []


def test_the_tested_versions_run_on_the_oldest_python_that_the_package_names() -> None:
    root = SOURCES.parent
    oldest = tomllib.loads((root / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    tested = (root / "envs" / "constraints.txt").read_text().splitlines()
    for pin in (line.partition("==") for line in tested if "==" in line):
        with suppress(metadata.PackageNotFoundError):  # of an extra that is not installed
            wanted = metadata.metadata(pin[0]).get("Requires-Python", "")
            assert SpecifierSet(wanted).contains(f"{oldest}.0"), (pin, wanted)


def test_an_address_in_the_environment_is_checked_as_one_in_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECSPLIT_ORCH_TARGET_ADDRESS", "http://h:1")
    with pytest.raises(UserError, match="SPECSPLIT_ORCH_TARGET_ADDRESS=http://h:1: wanted host:port"):
        Plan(ELSEWHERE)
    for address in ("h:1", "grpcs://h:1", "[::1]:50", "a b/target.json"):
        monkeypatch.setenv("SPECSPLIT_ORCH_TARGET_ADDRESS", address)
        assert Plan(ELSEWHERE).attached("target") == address


def test_only_the_targets_own_generation_settings_matter() -> None:
    for ignored, flag in ((False, ""), (True, " --ignore-model-settings")):
        made = Plan({**ELSEWHERE, "generation": {"ignore_model_settings": ignored}})
        assert made.model_flags("m") == f"--local models/m{flag}"
        assert made.model_flags("made").endswith(" --ignore-model-settings")
        for label, settings in ((label, made.settings(label, operates=False)) for label in made.points):
            assert f'"ignore_model_settings": {str(ignored).lower()}' in settings, label


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gammas: [1]\ngammas: [2]", "line 2: gammas: stands twice (before in line 1)"),
        ("dataset: {limit: 1, limit: 2}", "line 1: limit: stands twice"),
        ("a:\n  - b: 1\n    b: 2", "line 3: b: stands twice"),
        ("gammas: [010]", "line 1: 010 is 8 in YAML"),
        ("gammas: [1:30]", "line 1: 1:30 is 90 in YAML"),
        ("a: &x {b: 0, c: 10}\nd: {<<: *x}\ne: {<<: *x, b: '010'}", None),
        ("", None),
        ("a: [", None),
    ],
)
def test_what_yaml_takes_for_something_else_is_told(tmp_path: Path, text: str, said: str | None) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    if said is None:
        files.check_yaml(path)
        return
    with pytest.raises(UserError, match=re.escape(f"{path}, {said}")):
        files.check_yaml(path)
