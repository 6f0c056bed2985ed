"""The archive and the record, made by the workflow; the commands that repeat it."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile

import pytest

ARCHIVE = "results/archive.zip"


def run(workspace, *command):
    done = subprocess.run(
        command, cwd=workspace.folder, env=workspace.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def specsplit(workspace, *arguments):
    return run(workspace, sys.executable, "-m", "specsplit", "provenance", *arguments)


def test_archive(finished):
    run(finished, *finished.command(target=ARCHIVE))
    archive = finished.folder / ARCHIVE
    first = archive.read_bytes()
    archive.unlink()
    run(finished, *finished.command(target=ARCHIVE))
    assert archive.read_bytes() == first

    for where in (ARCHIVE, "results"):
        assert " files as recorded, 0 not" in specsplit(finished, "verify", where)
    with zipfile.ZipFile(archive) as packed:
        assert {"my.yaml", "results/report.html"} <= set(packed.namelist())
        record = json.loads(packed.read("results/provenance/provenance.json"))
        crate = json.loads(packed.read("ro-crate-metadata.json"))
    assert record["workflow"]["command"].startswith("snakemake --cores 2 --configfile my.yaml")
    assert record["workflow"]["cores"] == 2
    for label in ("gamma_0", "gamma_1", "gamma_3"):
        (item,) = (made for made in record["runs"] if label in made["file"])
        # Snakemake gives each run its threads, and they decide the last bits of a result.
        assert item["environment"]["OMP_NUM_THREADS"] == "2"
        for role, worker in item["workers"].items():
            assert worker["log"] == f"results/logs/workers/{role}.log"
            assert worker["runtime"]["deterministic_algorithms"] == "warn only"
            assert item["seeds"][f"{role}_worker"] == 0
    # Snakemake's own record is read: every job has its command or script, and its times.
    jobs = {entity["@id"]: entity for entity in crate["@graph"] if entity["@id"].startswith("#job/")}
    rules = {identifier.split("/")[1] for identifier in jobs}
    assert rules == {
        *("prepare_dataset", "prepare_model", "resolved_config", "benchmark"),
        *("merge", "figures", "provenance", "summary", "report"),
    }
    assert all(job["startTime"] < job["endTime"] for job in jobs.values())
    assert "specsplit bench --only" in jobs["#job/benchmark/results/runs/gamma_1/outputs.jsonl"]["description"]
    assert finished.planned() == {}


@pytest.mark.slow
def test_what_reproduce_prints_gives_the_same_results(finished, tmp_path):
    """Same seed, same machine: only times differ. All is run but the installation."""
    run(finished, *finished.command(target=ARCHIVE))
    script = specsplit(finished, "reproduce", ARCHIVE)
    lines = ['export PYTHONPATH="$PWD/src"' if line.startswith("make ") else line for line in script.splitlines()]
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        cwd=tmp_path,
        env=finished.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "Only times differ."
