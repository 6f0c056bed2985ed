"""verify, diff and reproduce, and the archive that they take as well as a results folder."""

from __future__ import annotations

import csv
import json
import random
import shutil
import subprocess
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import requests
import rocrate
from requests.adapters import BaseAdapter
from requests_cache import CachedSession
from rocrate_validator import services
from rocrate_validator.models import Severity
from urllib3 import HTTPResponse

from specsplit.errors import UserError
from specsplit.io import read_json, write_json
from specsplit.provenance.folder import CRATE, MANIFEST, PATCH, RECORD, SEAL, open_experiment, read_sums
from specsplit.provenance.verify import verify

from experiments import MODEL_FILE, Experiment, commit_experiment, git, make_run, specsplit


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished") / "project"
    commit_experiment(root).finish()
    return root


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path) -> Experiment:
    """A copy of a finished experiment in a git checkout."""
    root = tmp_path / "project"
    shutil.copytree(finished_once, root)
    return Experiment(root, make=False)


def unpack(archive: Path, folder: Path) -> Path:
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    return folder


def test_nothing_leaves_the_folder_that_an_archive_is_unpacked_into(tmp_path: Path) -> None:
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr(RECORD, "{}")
        for name in ("../up.txt", "results/../../up.txt", "/tmp/specsplit-absolute.txt", "a/../../up.txt"):
            packed.writestr(name, "escaped")
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16  # a symbolic link
        packed.writestr(link, "/etc/passwd")
    with open_experiment(archive) as experiment:
        inside = sorted(str(path.relative_to(experiment.root)) for path in experiment.root.rglob("*") if path.is_file())
        assert inside == ["link", RECORD]
        assert (experiment.root / "link").read_text() == "/etc/passwd"  # a file with that text
        assert not (experiment.root.parent / "up.txt").exists()
    assert not Path("/tmp/specsplit-absolute.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["archive.zip"]


def differing(path: Path) -> dict[str, str]:
    with open_experiment(path) as experiment:
        return verify(experiment).differing


def flip(path: Path, rng: random.Random) -> bytes:
    """Change one byte of a file, an empty one gets one; returns what it was."""
    original = path.read_bytes()
    changed = bytearray(original or b"\0")
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    path.write_bytes(changed)
    return original


def unseal(experiment: Experiment) -> None:
    for name in (SEAL, MANIFEST):
        (experiment.root / name).unlink()


# ---- verify


def test_results_as_they_were_made(finished: Experiment) -> None:
    for where in ("results", ".", RECORD):
        status, printed = specsplit("provenance", "verify", where, folder=finished.root)
        assert status == 0, printed
        assert printed.endswith(" files as recorded, 0 not\n")


def test_one_byte_of_any_result(finished: Experiment) -> None:
    rng = random.Random(0)
    files = [*finished.sealed(), SEAL, f"resources/models/tiny/{MODEL_FILE}", "Snakefile", "envs/constraints.txt"]
    assert len(files) > 14
    for file in files:
        original = flip(finished.root / file, rng)
        assert file in str(differing(finished.results)), file
        (finished.root / file).write_bytes(original)
    assert differing(finished.results) == {}


def test_what_verify_says(finished: Experiment) -> None:
    finished.summary.write_text("gamma,tpot\n0,1.4\n")
    (finished.results / "figures" / "tpot.svg").unlink()
    status, printed = specsplit("provenance", "verify", "results", folder=finished.root)
    assert status == 1
    assert f"DIFFERS results/figures/tpot.svg: missing; {SEAL} lists it\n" in printed
    assert "DIFFERS results/summary.csv: sha256 is " in printed
    assert printed.endswith(" files as recorded, 2 not\n")


def test_a_changed_record_accuses_no_other_file(finished: Experiment) -> None:
    record = read_json(finished.root / RECORD)
    record["results"][0]["sha256"] = "0" * 64
    write_json(finished.root / RECORD, record)
    assert list(differing(finished.results)) == [RECORD]
    assert f"{SEAL} says" in differing(finished.results)[RECORD]
    unseal(finished)  # nothing vouches for the record then, which is named, and so is what it says of others
    assert set(differing(finished.results)) == {SEAL, MANIFEST, "results/requests.csv"}


@pytest.mark.parametrize("key", ["config", "source_files", "workflow_files"])
def test_a_record_that_contradicts_itself(finished: Experiment, key: str) -> None:
    unseal(finished)
    record = read_json(finished.root / RECORD)
    record[key]["more"] = "0" * 64
    write_json(finished.root / RECORD, record)
    assert RECORD in differing(finished.results)


def test_a_file_that_is_no_record(finished: Experiment) -> None:
    unseal(finished)
    write_json(finished.root / RECORD, {"schema_version": 1})
    assert differing(finished.results)[RECORD].startswith("a record of version 1, not 2: make it again")
    write_json(finished.root / RECORD, {"schema_version": 2})
    assert differing(finished.results)[RECORD].startswith("not a provenance record of version 2:")


def test_results_alone_elsewhere(finished: Experiment, tmp_path: Path) -> None:
    """Without the project there is no code and no model to look at, which is told and is no difference."""
    moved = tmp_path / "kept"
    shutil.copytree(finished.results, moved)
    status, printed = specsplit("provenance", "verify", moved)
    assert status == 0, printed
    assert "note: the source code is not here: " in printed
    assert "note: the files of model tiny are not here: 1 hash not checked" in printed
    assert "note: resources/models/tiny/model.json is not here" in printed


@pytest.mark.parametrize("where", ["nothing", "config", "README.md"])
def test_where_nothing_is(finished: Experiment, where: str) -> None:
    status, printed = specsplit("provenance", "verify", where, folder=finished.root)
    assert status == 2
    assert f"error: {where}: " in printed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"0" * 64 + b" a\n", "line 1 is not a hash"),
        (b"A" * 64 + b"  a\n", "line 1 is not a hash"),
        (b"0" * 64 + b"  a", "the last one is cut off"),
        (b"0" * 64 + b"  b\n" + b"0" * 64 + b"  a\n", "not sorted"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_a_list_of_hashes_that_is_none(tmp_path: Path, text: bytes, said: str) -> None:
    (tmp_path / "SHA256SUMS").write_bytes(text)
    with pytest.raises(UserError, match=said):
        read_sums(tmp_path / "SHA256SUMS")


def test_a_changed_seal_accuses_no_other_file(finished: Experiment) -> None:
    seal = finished.root / SEAL
    digest = read_sums(seal)["results/requests.csv"]
    seal.write_text(seal.read_text().replace(digest, "0" * 64))
    assert list(differing(finished.results)) == [SEAL]


def test_sha256sum_agrees(finished: Experiment) -> None:
    subprocess.run(["sha256sum", "--check", "--quiet", SEAL], cwd=finished.root, check=True)


# ---- the archive


def test_the_archive_holds_what_a_reader_needs(finished: Experiment, tmp_path: Path) -> None:
    archive = finished.archive()
    with zipfile.ZipFile(archive) as packed:
        names = packed.namelist()
        assert all(entry.date_time == (1980, 1, 1, 0, 0, 0) for entry in packed.infolist())
    assert names[0] == CRATE
    assert {
        *("SHA256SUMS", "Snakefile", "workflow/rules/a.smk", "config/config.yaml", "README.md", "prompts.jsonl", PATCH),
        *("results/logs/merge.log", "results/figures/tpot.svg", "src/specsplit/cli/main.py", RECORD, SEAL),
        "resources/models/tiny/model.json",
    } <= set(names)
    assert not any("archive" in name and name.startswith("results/") for name in names)
    assert f"resources/models/tiny/{MODEL_FILE}" not in names  # no weights
    status, printed = specsplit("provenance", "verify", archive)
    assert status == 0, printed
    folder = unpack(archive, tmp_path / "unpacked")
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)


def test_the_same_results_give_the_same_bytes(finished: Experiment) -> None:
    first = finished.archive().read_bytes()
    (finished.results / "logs" / "archive.log").write_text("its own log\n")
    finished.summary.touch()
    assert finished.archive().read_bytes() == first


def test_one_byte_of_any_archived_file(finished: Experiment, tmp_path: Path) -> None:
    folder = unpack(finished.archive(), tmp_path / "unpacked")
    rng = random.Random(1)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    code = [path for path in files if "src" in path.parts]
    for path in [path for path in files if path not in code] + rng.sample(code, 5):
        original = flip(path, rng)
        assert path.relative_to(folder).as_posix() in differing(folder)
        path.write_bytes(original)
    assert differing(folder) == {}


def test_a_changed_list_of_hashes_is_what_is_blamed(finished: Experiment, tmp_path: Path) -> None:
    folder = unpack(finished.archive(), tmp_path / "unpacked")
    sums = folder / "SHA256SUMS"
    digest = read_sums(sums)["results/summary.csv"]
    sums.write_text(sums.read_text().replace(digest, "0" * 64))
    found = differing(folder)
    assert found["SHA256SUMS"] == f"its hash of results/summary.csv is neither the file's nor that in {CRATE}"
    assert set(found) == {"SHA256SUMS"}


def test_files_added_to_an_archive_or_damaged_in_it(finished: Experiment, tmp_path: Path) -> None:
    archive = finished.archive()
    folder = unpack(archive, tmp_path / "unpacked")
    (folder / "results" / "more.csv").write_text("x")
    assert differing(folder) == {"results/more.csv": "not listed in SHA256SUMS: added later"}
    data = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as packed:
        entry = packed.getinfo("results/requests.csv")
    data[entry.header_offset + 30 + len(entry.filename) + 10] ^= 255
    (tmp_path / "damaged.zip").write_bytes(data)
    assert "damaged in the archive" in differing(tmp_path / "damaged.zip")["results/requests.csv"]
    (tmp_path / "cut.zip").write_bytes(data[:1000])
    status, printed = specsplit("provenance", "verify", tmp_path / "cut.zip")
    assert (status, "cut.zip: cannot be unpacked" in printed) == (2, True)


def test_no_archive_with_a_secret(finished: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "correct-horse-battery")
    (finished.results / "logs" / "merge.log").write_text("merged\nas correct-horse-battery\n")
    with pytest.raises(AssertionError, match=r"results/logs/merge\.log, line 2: looks like a password or token"):
        finished.archive()
    assert not (finished.results / "archive.zip").exists()
    (finished.results / "logs" / "merge.log").write_text("merged\n")
    outputs = finished.runs[1].with_name("outputs.jsonl")
    outputs.write_text('{"text": "curl https://user:password@example.org"}\n')  # what a model may well write
    finished.archive()
    outputs.write_text('{"text": "correct-horse-battery"}\n')
    with pytest.raises(AssertionError, match=r"gamma_2/outputs\.jsonl, line 1: looks like"):
        finished.archive()


def test_no_archive_of_other_code_than_the_record_has(finished: Experiment) -> None:
    (finished.root / "workflow" / "rules" / "a.smk").write_text("# other rules\n")
    with pytest.raises(
        AssertionError, match=r"changed since the record was made: workflow/rules/a\.smk\. Make it again"
    ):
        finished.archive()


# ---- the crate


TERMS_OF_1_1 = {
    "ComputationalWorkflow": "https://bioschemas.org/ComputationalWorkflow",
    "FormalParameter": "https://bioschemas.org/FormalParameter",
    "input": "https://bioschemas.org/ComputationalWorkflow#input",
    "output": "https://bioschemas.org/ComputationalWorkflow#output",
}


class LocalContext(BaseAdapter):
    """Answers every request with the JSON-LD context of RO-Crate 1.1.

    Made of that of 1.3, which comes with rocrate and differs from it in what the profile uses by these four terms.
    """

    def send(self, request: Any, **options: Any) -> requests.Response:
        context = json.loads((Path(rocrate.__file__).parent / "data" / "ro-crate.jsonld").read_text())
        context["@context"].update(TERMS_OF_1_1)
        response = requests.Response()
        response.status_code, response.url, response.request = 200, request.url, request
        response.headers["Content-Type"] = "application/ld+json"
        response.raw = HTTPResponse(
            BytesIO(json.dumps(context).encode()), dict(response.headers), 200, preload_content=False
        )
        return response

    def close(self) -> None:
        pass


@pytest.fixture(scope="session")
def context_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The validator's cache of addresses, with the context in it: it needs no network then."""
    cache = tmp_path_factory.mktemp("rocrate") / "cache"
    with CachedSession(cache_name=str(cache), backend="sqlite", expire_after=-1) as session:
        session.mount("https://", LocalContext())
        session.get("https://w3id.org/ro/crate/1.1/context")
    return cache


def crate_issues(crate: Path, cache: Path) -> list[str]:
    """What the validator of the profile says that the crate must have and has not."""
    settings = services.ValidationSettings(
        rocrate_uri=str(crate),
        profile_identifier="provenance-run-crate-0.5",
        requirement_severity=Severity.REQUIRED,
        offline=True,
        cache_path=cache,
    )
    return [str(issue.message) for issue in services.validate(settings).get_issues()]


def test_the_archive_is_a_provenance_run_crate(finished: Experiment, context_cache: Path, tmp_path: Path) -> None:
    archive = finished.archive()
    assert crate_issues(archive, context_cache) == []
    folder = unpack(archive, tmp_path / "unpacked")
    crate = read_json(folder / CRATE)
    graph = {entity["@id"]: entity for entity in crate["@graph"]}
    run = graph["#job/benchmark/results/runs/gamma_2/run.json"]
    assert (run["description"], run["startTime"]) == ("specsplit bench --gamma 2", "2025-01-31T12:00:00.000+00:00")
    assert graph["#run"]["instrument"] == {"@id": "Snakefile"}
    assert {"@id": "#model/tiny"} in graph["#run"]["object"]


@pytest.mark.slow
def test_the_validator_sees_what_is_wrong_with_a_crate(
    finished: Experiment, context_cache: Path, tmp_path: Path
) -> None:
    folder = unpack(finished.archive(), tmp_path / "unpacked")
    crate = read_json(folder / CRATE)
    graph = {entity["@id"]: entity for entity in crate["@graph"]}
    del graph["#run"]["instrument"]
    graph["./"]["conformsTo"] = {"@id": "https://w3id.org/ro/wfrun/process/0.5"}
    write_json(folder / CRATE, crate)
    issues = crate_issues(folder, context_cache)
    assert any("MUST have an instrument" in issue for issue in issues)
    assert any("permalink of the Provenance Run Crate profile" in issue for issue in issues)


# ---- diff


def test_two_runs_that_differ_in_time_only(finished: Experiment, tmp_path: Path) -> None:
    shutil.copytree(finished.results, tmp_path / "first")
    for gamma, path in zip((0, 2), finished.runs, strict=True):
        run = make_run(gamma, started="2026-01-31T12:00:00Z", finished="2026-01-31T12:00:01Z")
        run["workers"]["target"] |= {"address": "127.0.0.1:2", "pid": 99, "process_started": 8.0}
        write_json(path, run)
    finished.write_requests(tpot=4.0)
    finished.finish()
    status, printed = specsplit("provenance", "diff", tmp_path / "first", finished.results)
    assert status == 0, printed
    assert printed.splitlines()[-4:] == [
        "results  same but for times (2 of 2 texts are the same)",
        "  gamma 0: median ttft_ms 10 -> 8 (-20.0 %), median tpot_ms 5 -> 4 (-20.0 %)",
        "  gamma 2: median ttft_ms 10 -> 8 (-20.0 %), median tpot_ms 5 -> 4 (-20.0 %)",
        "Only times differ.",
    ]
    status, printed = specsplit("provenance", "diff", finished.results, finished.archive())
    assert (status, printed.splitlines()[-1]) == (0, "Nothing differs.")


def test_each_repeat_is_compared(finished: Experiment, tmp_path: Path) -> None:
    table = finished.results / "requests.csv"
    header, *rows = csv.reader(table.read_text().splitlines())
    place, text = header.index("repeat"), header.index("output_sha256")

    def with_repeats(first: str) -> None:
        twice = [[*row[:place], repeat, *row[place + 1 :]] for row in rows for repeat in ("1", "2")]
        for row in twice:
            row[text] = ("c" if row[place] == "2" else first) * 64
        table.write_text("".join(",".join(row) + "\n" for row in (header, *twice)))
        finished.finish()

    with_repeats("a")
    shutil.copytree(finished.results, tmp_path / "first")
    with_repeats("b")
    status, printed = specsplit("provenance", "diff", tmp_path / "first", finished.results)
    assert status == 1
    assert "gamma 2: text of 1 request differs: a\n" in printed


def test_every_kind_of_difference_is_told(finished: Experiment, tmp_path: Path) -> None:
    shutil.copytree(finished.results, tmp_path / "first")
    finished.config |= {"seed": 8, "gammas": [0, 2, 4]}
    run = make_run(2, seed=8)
    run["environment"]["OMP_NUM_THREADS"] = "1"
    run["workers"]["draft"]["threads"] = 1
    write_json(finished.runs[1], run)
    manifest = read_json(finished.model)
    write_json(finished.model, {**manifest, "fingerprint": {**manifest["fingerprint"], "weights_sha256": "e" * 64}})
    (finished.root / "Snakefile").write_text("# another\n")
    dataset = read_json(finished.manifest)
    write_json(finished.manifest, {**dataset, "count": 2})
    finished.write_requests(text="another", num_rounds=9)
    finished.finish()
    status, printed = specsplit("provenance", "diff", tmp_path / "first", finished.results)
    assert status == 1
    for line in (
        "  seed: 7 -> 8",
        "  gammas: [0, 2] -> [0, 2, 4]",
        "  uncommitted changes: none -> ",
        "  Snakefile: ",
        "  tiny.fingerprint.weights_sha256: aaaaaaaaaaaa -> eeeeeeeeeeee",
        "  count: 1 -> 2",
        "  gamma_2.OMP_NUM_THREADS: 2 -> 1",
        "  gamma_2.draft worker.threads: 2 -> 1",
        "  gamma 0: text of 1 request differs: a",
        "  gamma 2: num_rounds of 1 request differs: a",
    ):
        assert f"\n{line}" in printed, line
    groups = [line.split()[0] for line in printed.splitlines() if not line.startswith(" ")]
    assert groups == ["config", "code", "model", "data", "machine", "results"]


# ---- reproduce


def test_a_clean_commit_is_checked_out(finished: Experiment) -> None:
    status, script = specsplit("provenance", "reproduce", "results", folder=finished.root)
    assert status == 0
    assert f"git checkout -q {git(finished.root, 'rev-parse', 'HEAD')}\n" in script
    assert "git apply" not in script
    assert f"--configfile {finished.results}/provenance/config.json -- results/summary.csv\n" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_changes_are_applied_to_the_commit(experiment: Experiment, tmp_path: Path) -> None:
    """The part of the script that gets the code is run; the rest needs a network and minutes."""
    (experiment.root / "Snakefile").write_text("# changed\n")
    (experiment.root / "new.smk").write_text("# new\n")
    experiment.finish()
    _, script = specsplit("provenance", "reproduce", "results", folder=experiment.root)
    subprocess.run(["bash", "-c", script.partition("# The environment")[0]], cwd=tmp_path, check=True)
    assert (tmp_path / "specsplit-again" / "Snakefile").read_text() == "# changed\n"
    assert (tmp_path / "specsplit-again" / "new.smk").read_text() == "# new\n"


def test_an_archive_brings_its_code_along(finished: Experiment, tmp_path: Path) -> None:
    archive = finished.archive()
    _, script = specsplit("provenance", "reproduce", archive)
    assert "--configfile recorded/provenance/config.json" in script
    if shutil.which("unzip"):
        subprocess.run(["bash", "-c", script.partition("# The environment")[0]], cwd=tmp_path, check=True)
        assert (tmp_path / "specsplit-again" / "src" / "specsplit" / "cli" / "main.py").is_file()
    folder = unpack(archive, tmp_path / "unpacked")
    _, script = specsplit("provenance", "reproduce", folder)
    assert f"cp -r {folder} specsplit-again\n" in script


def test_workers_that_were_attached_to(finished: Experiment) -> None:
    run = make_run()
    run["workers"]["target"] |= {"attached": True, "address": "gpu-2:50052", "log": None, "reason": "attached to"}
    write_json(finished.runs[1], run)
    finished.finish()
    _, script = specsplit("provenance", "reproduce", "results", folder=finished.root)
    assert "one served at gpu-2:50052" in script
    assert "# export SPECSPLIT_ORCH_TARGET_ADDRESS=HOST:PORT\n" in script
