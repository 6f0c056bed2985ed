"""A tampering campaign: whatever is changed, added, removed or swapped in results or an archive is named by verify."""

from __future__ import annotations

import copy
import itertools
import json
import os
import random
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from specsplit.io import json_sha256, read_json, sha256_file, write_json
from specsplit.provenance.folder import ARCHIVE_SUMS, CRATE, MANIFEST, RECORD, SEAL, open_experiment, write_sums
from specsplit.provenance.run_file import write_run
from specsplit.provenance.seal import seal_lists
from specsplit.provenance.verify import verify

from experiments import Experiment, commit_experiment, specsplit


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose results hold all that verify looks at: an empty file, a log, a second run, tables beside it."""
    root = tmp_path_factory.mktemp("sealed") / "project"
    experiment = commit_experiment(root)
    for run in experiment.runs:
        for name in ("requests.csv", "per_round.csv", "outputs.jsonl"):
            run.with_name(name).write_text(f"of {run.parent.name}: {name}\n")
    for name, text in {
        "report.html": "<html>",
        "peers.csv": "peer,itl\n",
        "figures/peers.svg": "<svg>",
        "a b é.csv": "",
    }.items():
        (experiment.results / name).write_text(text)
    experiment.finish()
    experiment.archive().rename(root / "archive.zip")
    return root


@pytest.fixture(params=["results", "archive"])
def sealed(request: pytest.FixtureRequest, made_once: Path, tmp_path: Path) -> Path:
    """A results folder, and an unpacked archive."""
    if request.param == "results":
        shutil.copytree(made_once / "results", tmp_path / "results")
        return tmp_path / "results"
    with zipfile.ZipFile(made_once / "archive.zip") as packed:
        packed.extractall(tmp_path / "unpacked")
    return tmp_path / "unpacked"


def named(path: Path) -> dict[str, str]:
    with open_experiment(path) as experiment:
        return verify(experiment).differing


def recorded(folder: Path, file: Path) -> str:
    """The name of a file as verify says it."""
    name = file.relative_to(folder).as_posix()
    return name if folder.name == "unpacked" else f"results/{name}"


def files_of(folder: Path) -> list[Path]:
    """All files of results; of an archive the lists of hashes and some of the others."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    if "README.md" not in {path.name for path in files}:
        return files
    lists = [path for path in files if path.name in ("SHA256SUMS", "manifest.json", "provenance.json", CRATE)]
    return lists + random.Random(0).sample([path for path in files if path not in lists], 12)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes() or b"\0")
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] if file.stat().st_size else b"x")


def append(file: Path) -> None:
    with file.open("ab") as more:
        more.write(b"\n")


def rename(file: Path) -> None:
    file.rename(file.with_name(f"{file.name}.bak"))


def change_case(file: Path) -> None:
    file.rename(file.with_name(file.name.swapcase()))


def link(file: Path) -> None:
    """The very content, by a link."""
    elsewhere = file.with_name(f"kept-{file.name}")
    file.rename(elsewhere)
    file.symlink_to(elsewhere.name)


def become_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def become_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


CHANGES: list[Callable[[Path], None]] = [
    flip, truncate, append, rename, change_case, link, become_folder, become_pipe, Path.unlink,
]  # fmt: skip


def test_untouched(sealed: Path) -> None:
    assert named(sealed) == {}


@pytest.mark.parametrize("change", CHANGES)
def test_every_file_that_is_changed_is_named(sealed: Path, change: Callable[[Path], None], tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(sealed, kept)
    for original in files_of(kept):
        file = sealed / original.relative_to(kept)
        change(file)
        found = named(sealed)
        # A list whose names of files were edited is told by what contradicts it.
        by_others = file.name.endswith("SHA256SUMS") and any(file.name in told for told in found.values())
        assert recorded(sealed, file) in found or by_others, (file, found)
        for name in (file.name, f"{file.name}.bak", file.name.swapcase(), f"kept-{file.name}"):
            remove(file.with_name(name))
        shutil.copyfile(original, file)
    assert named(sealed) == {}


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def test_files_that_change_places(sealed: Path) -> None:
    files = files_of(sealed)
    for one, other in zip(files, files[3:], strict=False):
        if one.read_bytes() != other.read_bytes():
            swap(one, other)
            found = named(sealed)
            assert {recorded(sealed, one), recorded(sealed, other)} <= set(found), (one, other, found)
            swap(one, other)
    assert named(sealed) == {}


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


ADDED = (
    *("figures/more.svg", "figures/.hidden", "capacity.csv", "runs/gamma_9/run.json", "logs/more.log", "summary.csv~"),
    *("provenance/SHA256SUMS.old", "workers/more.csv", "provenance/more/deep/file", "summary.csv.sig", "-x", "a\nb"),
    b"\xff\xfe.csv".decode(errors="surrogateescape"),
)


def test_every_file_and_empty_folder_that_is_added_is_named(sealed: Path) -> None:
    results = sealed / "results" if sealed.name == "unpacked" else sealed
    for added in ADDED:
        file = results / added
        made = [folder for folder in file.parents if not folder.exists()]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
        (name,) = named(sealed)
        assert "\n" not in name
        name.encode()
        assert name.startswith("results/")
        assert name.endswith(added[-2:].replace("\n", "\\n"))
        for path in (file, *made):
            remove(path)
    for added in ("empty", "figures/empty", "runs/gamma_9", "provenance/a/b"):
        (results / added).mkdir(parents=True)
        assert named(sealed) == {f"results/{added}/": "an empty folder that was added"}
        (results / added).rmdir()


def test_folders_and_links_that_were_there_belong_to_the_results(made_once: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    shutil.copytree(made_once / "results", results)
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "more.csv").write_text("x")
    (results / "linked").symlink_to(tmp_path / "scratch")
    (results / "empty").mkdir()
    (results / "workers" / ".pool").mkdir(parents=True)
    assert specsplit("provenance", "seal", "--output", results / "provenance" / "SHA256SUMS")[0] == 0
    assert named(results) == {}
    (results / "workers" / ".pool" / "draft-1.lock").write_text("")  # what workers leave while they run
    assert named(results) == {}
    (results / "empty").rmdir()
    assert list(named(results)) == ["results/empty/"]
    (results / "empty").mkdir()
    (tmp_path / "scratch" / "more.csv").write_text("y")
    assert list(named(results)) == ["results/linked/more.csv"]
    (tmp_path / "scratch" / "more.csv").write_text("x")
    (results / "linked").unlink()
    shutil.copytree(tmp_path / "scratch", results / "linked")
    assert list(named(results)) == ["results/linked"]


def test_what_jobs_made_is_added_to_the_seal_and_nothing_else(
    made_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of the workflow seals its own files anew; what was edited by hand before is still named after it."""
    results = tmp_path / "results"
    shutil.copytree(made_once / "results", results)
    steps = tmp_path / ".snakemake" / "specsplit-steps.jsonl"
    steps.parent.mkdir()

    def job(started: str, *outputs: str) -> None:
        step = {"rule": "r", "started": started, "inputs": [], "outputs": list(outputs), "log": ["results/logs/r.log"]}
        with steps.open("a") as file:
            file.write(json.dumps(step) + "\n")

    def seal() -> dict[str, str]:
        status, printed = specsplit("provenance", "seal", "--add", "--output", results / "provenance" / "SHA256SUMS")
        assert status == 0, printed
        return named(results)

    job("2020-01-01T00:00:00.000Z", "results/summary.csv", "results/peers.csv")
    assert seal() == {}
    (results / "summary.csv").write_text("edited by hand")
    (results / "by_hand.csv").write_text("added by hand")
    (results / "figures" / "tpot.svg").unlink()
    (results / "report.html").write_text("made again")
    (results / "capacity.csv").write_text("made")
    (results / "logs" / "r.log").write_text("said")
    (results / "logs" / "workers").mkdir()
    (results / "logs" / "workers" / "draft.log").write_text("stopped")
    job("2999-01-01T00:00:00.000Z", "results/report.html", "results/capacity.csv")
    wanted = {"results/summary.csv", "results/by_hand.csv", "results/figures/tpot.svg"}
    assert set(seal()) == wanted
    assert set(seal()) == wanted
    # A job of the same run that was at work while its log was sealed.
    monkeypatch.setenv("SPECSPLIT_WORKFLOW_COMMAND", json.dumps({"argv": [], "cores": 1, "started": 1}))
    assert set(seal()) == wanted - {"results/summary.csv"}


# ---- files that are changed together with what vouches for them


def edit_line(sums: Path, name: str, digest: str | None) -> None:
    """Replace, add or take out the line of a file in a SHA256SUMS."""
    lines = dict(reversed(line.split("  ", 1)) for line in sums.read_text().splitlines())
    lines.pop(name, None)
    sums.write_text(write_sums(lines | ({name: digest} if digest else {})))


def edit_manifest(manifest: Path, name: str, digest: str | None) -> None:
    content = read_json(manifest)
    content["files"].pop(name, None)
    files = content["files"] | ({name: digest} if digest else {})
    manifest.write_text(seal_lists(files, content["folders"], content["links"])[MANIFEST])


@pytest.mark.parametrize(
    ("name", "what"),
    [
        *(("summary.csv", "edit"), ("report.html", "remove"), ("figures/tpot.svg", "add")),
        *(("runs/gamma_2/outputs.jsonl", "edit"), ("a b é.csv", "remove"), ("a b é.csv", "add")),
    ],
)
@pytest.mark.parametrize("lists", ["seal", "manifest", "root", "crate"])
def test_a_file_with_its_line_in_one_list(sealed: Path, name: str, what: str, lists: str) -> None:
    results = sealed / "results" if sealed.name == "unpacked" else sealed
    file = results / name
    if what == "add":
        file = file.with_name(f"more-{file.name}")
    file.unlink() if what == "remove" else file.write_text("edited\n")
    digest = None if what == "remove" else sha256_file(file)
    recorded_name = f"results/{file.relative_to(results).as_posix()}"
    if lists == "seal":
        edit_line(results / "provenance/SHA256SUMS", recorded_name, digest)
    elif lists == "manifest":
        edit_manifest(results / "provenance/manifest.json", recorded_name, digest)
    elif sealed == results:
        pytest.skip("of archives")
    elif lists == "root":
        edit_line(sealed / ARCHIVE_SUMS, recorded_name, digest)
    else:
        edit_crate(sealed / CRATE, recorded_name, digest)
    found = named(sealed)
    assert recorded_name in found
    where = {"seal": SEAL, "manifest": MANIFEST, "root": ARCHIVE_SUMS, "crate": CRATE}[lists]
    assert where in found
    assert not any("per_round" in other for other in found)


def edit_crate(crate: Path, name: str, digest: str | None) -> None:
    content = read_json(crate)
    graph = [entity for entity in content["@graph"] if entity["@id"] != name.replace(" ", "%20").replace("é", "%C3%A9")]
    graph += [{"@id": name, "@type": "File", "sha256": digest}] if digest else []
    write_json(crate, {**content, "@graph": graph})


def combinations(names: list[str]) -> list[tuple[str, ...]]:
    """One or several of them, in every way."""
    return [each for count in range(1, len(names) + 1) for each in itertools.combinations(names, count)]


def test_every_list_that_is_missing_is_named(sealed: Path, tmp_path: Path) -> None:
    names = [SEAL, MANIFEST, RECORD] + ([ARCHIVE_SUMS, CRATE] if sealed.name == "unpacked" else [])
    root = sealed if sealed.name == "unpacked" else sealed.parent
    kept = tmp_path / "kept"
    shutil.copytree(sealed, kept)
    for gone in combinations(names):
        if {SEAL, MANIFEST, RECORD} <= set(gone) and not {ARCHIVE_SUMS, CRATE} & (set(names) - set(gone)):
            continue  # nothing is left that says that here are results
        for name in gone:
            (root / name).unlink()
        (sealed / ("README.md" if root == sealed else "report.html")).write_text("edited")
        status, printed = specsplit("provenance", "verify", sealed)
        assert status == 1
        unseen = {ARCHIVE_SUMS, CRATE} if {ARCHIVE_SUMS, CRATE, SEAL} <= set(gone) else set()
        for name in set(gone) - unseen:
            assert f"DIFFERS {name}: missing" in printed, (gone, printed)
        for name in (*gone, "README.md" if root == sealed else "results/report.html"):
            source = kept / name if root == sealed else kept / Path(name).relative_to("results")
            shutil.copyfile(source, root / name)


def test_the_seal_that_says_that_it_is_of_an_archive(made_once: Path, tmp_path: Path) -> None:
    """Whoever takes both lists of the archive away and edits what only they seem to list."""
    with zipfile.ZipFile(made_once / "archive.zip") as packed:
        packed.extractall(tmp_path)
    for name in (ARCHIVE_SUMS, CRATE):
        (tmp_path / name).unlink()
    (tmp_path / "README.md").write_text("edited")
    (tmp_path / "results" / "report.html").write_text("edited")
    (tmp_path / "more.txt").write_text("added")
    assert {ARCHIVE_SUMS, CRATE, "README.md", "results/report.html", "more.txt"} <= set(named(tmp_path))


# ---- archive.zip


MEMBERS = {
    "more.txt": "x", "results/summary.csv": "gamma\n", "../up": "x", "results/empty/": "", "results/figures/": "x",
    "SHA256SUMS.sig": "x", "results/provenance/SHA256SUMS.sig": "x", "results/archive.zip": "x",
    "results/workers/more.json": "x",
}  # fmt: skip


@pytest.mark.parametrize("where", ["beside", "among the results"])
def test_an_archive_with_a_file_more_or_twice(made_once: Path, tmp_path: Path, where: str) -> None:
    shutil.copytree(made_once / "results", tmp_path / "results")
    archive = tmp_path / ("archive.zip" if where == "beside" else "results/archive.zip")
    shown = archive if where == "beside" else tmp_path / "results"
    shutil.copy(made_once / "archive.zip", archive)
    assert named(shown) == {}
    for name, data in list(MEMBERS.items())[: None if where == "beside" else 2]:
        shutil.copy(made_once / "archive.zip", archive)
        with zipfile.ZipFile(archive, "a") as packed:
            packed.writestr(name, data)
        found = named(shown)
        assert name in found if where == "beside" else name in found["results/archive.zip"], found


def member(info: zipfile.ZipInfo, **changes: Any) -> zipfile.ZipInfo:
    for name, value in changes.items():
        setattr(info, name, value)
    return info


REWRITTEN: dict[str, Callable[[zipfile.ZipInfo], Any]] = {
    "results/./summary.csv": lambda info: member(copy.copy(info), filename="results/./summary.csv"),  # then as it was
    "results/summary.csv": lambda info: member(info, external_attr=0o120777 << 16),  # a link where links are made
    "results/peers.csv": lambda info: member(info, comment=b"x"),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_an_archive_that_is_unpacked_otherwise_elsewhere(made_once: Path, tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(made_once / "archive.zip") as source, zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        for info in source.infolist():
            data = source.read(info)
            if info.filename == str(PurePosixPath(name)):
                other = REWRITTEN[name](info)
                packed.writestr(other, data)
            if info.filename not in packed.namelist():
                packed.writestr(info, data)
    assert set(named(tmp_path / "a.zip")) == {str(PurePosixPath(name))}


@pytest.mark.parametrize(("before", "after"), [(b"#!/bin/sh\n", b""), (b"", b"more")])
def test_bytes_around_an_archive(made_once: Path, tmp_path: Path, before: bytes, after: bytes) -> None:
    (tmp_path / "a.zip").write_bytes(before + (made_once / "archive.zip").read_bytes() + after)
    assert "a.zip" in named(tmp_path / "a.zip")


def test_another_archive_among_the_results(made_once: Path, tmp_path: Path) -> None:
    shutil.copytree(made_once, tmp_path / "project", symlinks=True)
    experiment = Experiment(tmp_path / "project", make=False)
    experiment.summary.write_text("gamma\n")
    experiment.finish()
    other = experiment.archive()
    shutil.copytree(made_once / "results", tmp_path / "results")
    shutil.copy(other, tmp_path / "results")
    assert "of other results" in named(tmp_path / "results")["results/archive.zip"]
    (tmp_path / "results" / "archive.zip").write_text("no zip")
    assert "cannot be unpacked" in named(tmp_path / "results")["results/archive.zip"]


def test_no_archive_of_results_that_are_not_as_sealed(made_once: Path, tmp_path: Path) -> None:
    shutil.copytree(made_once, tmp_path / "project")
    experiment = Experiment(tmp_path / "project", make=False)
    experiment.summary.write_text("gamma\n")
    with pytest.raises(AssertionError, match=r"changed since the results were sealed: results/summary\.csv"):
        experiment.archive()


# ---- signatures


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if shutil.which("ssh-keygen") is None:
        pytest.skip("no ssh-keygen")
    folder = tmp_path_factory.mktemp("keys")
    for name in ("own", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    return folder / "own", folder / "other"


def reseal(results: Path) -> None:
    """What somebody does who edits a file and makes every hash anew."""
    record = read_json(results / "provenance" / "provenance.json")
    for entry in (*record["results"], *record["inputs"]):
        if entry["path"].startswith("results/"):
            entry["sha256"] = sha256_file(results.parent / entry["path"])
    write_json(results / "provenance" / "provenance.json", record)
    assert specsplit("provenance", "seal", "--output", results / "provenance" / "SHA256SUMS")[0] == 0


@pytest.mark.parametrize("edit", ["table", "run", "no hashes"])
def test_runs_vouch_for_their_tables(made_once: Path, tmp_path: Path, edit: str) -> None:
    """Whoever edits a run or its table and seals all anew has to know of the hashes in it as well."""
    results = tmp_path / "results"
    shutil.copytree(made_once / "results", results)
    run = results / "runs" / "gamma_2" / "run.json"
    table = run.with_name("requests.csv")
    write_run(run, {**read_json(run), "worker_code_sha256": "c" * 64}, [table])
    reseal(results)
    assert named(results) == {}
    content = read_json(run)
    if edit == "table":
        table.write_text("edited")
    else:
        write_json(run, {**content, "seed": 8} if edit == "run" else without_hashes(content))
    reseal(results)
    assert list(named(results)) == [f"results/runs/gamma_2/{table.name if edit == 'table' else run.name}"]


def without_hashes(run: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key not in ("files", "sha256")}


@pytest.mark.parametrize("what", ["results", "unpacked", "archive.zip"])
def test_a_signature(made_once: Path, tmp_path: Path, what: str, keys: tuple[Path, Path]) -> None:
    own, other = keys
    where = tmp_path / what
    if what == "results":
        shutil.copytree(made_once / "results", where)
    elif what == "archive.zip":
        shutil.copy(made_once / "archive.zip", where)
    else:
        with zipfile.ZipFile(made_once / "archive.zip") as packed:
            packed.extractall(where)
    own_pub, other_pub = own.with_suffix(".pub"), other.with_suffix(".pub")
    assert "missing: the results are not signed" in check(where, own_pub, 1)
    status, printed = specsplit("provenance", "sign", where, "--key", own)
    assert status == 0, printed
    signature = Path(printed.partition(": ")[0])
    assert signature.is_file()
    assert "Good" in check(where, own_pub, 0)
    assert "--signer tells whether" in check(where, None, 0)
    assert f"{signature.name}: is no signature of" in check(where, other_pub, 1)
    both = tmp_path / "team.pub"
    both.write_text(f"# the team\n{other_pub.read_text()}\n{own_pub.read_text()}")
    check(where, both, 0)
    text = signature.read_text()
    signature.write_text(text.replace(text.splitlines()[2][:8], "AAAAAAAA"))
    for signer in (None, own_pub):
        assert f"{signature.name}: is no signature of" in check(where, signer, 1)
    signature.write_text(text)
    if what == "results":
        (where / "summary.csv").write_text("gamma,speedup\n2,9.9\n")
        reseal(where)
        for signer in (None, own_pub):  # all hashes fit again, the signature does not
            assert "1 not\n" in check(where, signer, 1)
        assert specsplit("provenance", "sign", where, "--key", other)[0] == 0
        assert "1 not\n" in check(where, own_pub, 1)


def check(where: Path, signer: Path | None, wanted: int) -> str:
    flags = ("--signer", signer) if signer else ()
    status, printed = specsplit("provenance", "verify", where, *flags)
    assert status == wanted, printed
    return printed


@pytest.mark.parametrize("name", ["provenance/SHA256SUMS.sig", "archive.zip.sig"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.write_text("x")])
def test_what_is_no_signature(
    made_once: Path, tmp_path: Path, name: str, make: Callable[[Path], Any], keys: tuple[Path, Path]
) -> None:
    results = tmp_path / "results"
    shutil.copytree(made_once / "results", results)
    make(results / name)
    assert f"{name}" in check(results, None, 1)  # without an archive its signature is a file more
    shutil.copy(made_once / "archive.zip", results)
    assert f"{name}" in check(results, None, 1)


def test_what_cannot_be_signed_or_is_no_key(made_once: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    results = tmp_path / "results"
    shutil.copytree(made_once / "results", results)
    for key, said in ((tmp_path / "none", "no such file"), (results / "summary.csv", "could not sign")):
        status, printed = specsplit("provenance", "sign", results, "--key", key)
        assert (status, said in printed) == (2, True), printed
    for signer, said in ((tmp_path / "none", "cannot be read"), (results / "summary.csv", "wanted public SSH keys")):
        status, printed = specsplit("provenance", "verify", results, "--signer", signer)
        assert (status, said in printed) == (2, True), printed
    (results / "summary.csv").write_text("edited")
    status, printed = specsplit("provenance", "sign", results, "--key", keys[0])
    assert (status, "nothing was signed: results/summary.csv" in printed) == (2, True), printed
    assert not list(results.rglob("*.sig"))


def test_a_manifest_is_its_own_witness(made_once: Path, tmp_path: Path) -> None:
    """The line of manifest.json in SHA256SUMS is what was changed, and not manifest.json."""
    results = tmp_path / "results"
    shutil.copytree(made_once / "results", results)
    edit_line(results / "provenance" / "SHA256SUMS", MANIFEST, "0" * 64)
    assert named(results) == {SEAL: f"its hash of {MANIFEST} is not that of the file"}
    content = json.loads((results / "provenance" / "manifest.json").read_text())
    assert set(content) == {"files", "folders", "links", "sha256"}


@pytest.mark.parametrize("key", ["files", "folders", "links"])
def test_a_manifest_of_other_types_is_named(made_once: Path, tmp_path: Path, key: str) -> None:
    results = tmp_path / "results"
    shutil.copytree(made_once / "results", results)
    manifest = results / "provenance" / "manifest.json"
    for value in (None, 1, [1], {"a": 1}, {"a": []}):
        content = {name: part for name, part in read_json(manifest).items() if name != "sha256"} | {key: value}
        write_json(manifest, {**content, "sha256": json_sha256(content)})
        assert MANIFEST in named(results)
        shutil.copy(made_once / "results" / "provenance" / "manifest.json", manifest)
