"""Fetching sets of prompts: standard ones by name, datasets of the Hugging Face Hub by their id."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from specsplit.errors import UserError, counted
from specsplit.experiment.containers import needed, read_source
from specsplit.experiment.prompt_rows import read_rows
from specsplit.experiment.prompt_shapes import PROMPT_KEYS, RowError, read_conversation
from specsplit.experiment.prompt_table import Row
from specsplit.experiment.standard_sets import STANDARD_SETS, StandardSet
from specsplit.io import replace_file, replacing, sha256_file, write_json

TIMEOUT_S = 60


def fetch_standard(name: str, output: Path, downloads: Path) -> dict[str, Any]:
    """Write a standard set as JSON lines with id, category and turns, and OUTPUT.json with where it is from.

    Its file is taken from `downloads`/NAME, and fetched to there when it is missing. Returns what OUTPUT.json says.
    Raises UserError when it cannot be fetched, or is not the file that it should be.
    """
    known = STANDARD_SETS[name]
    if known.hub:
        repo, config, split = known.hub
        loaded, facts = _load_hub(repo, config, split, known.revision, f"dataset.name {name}")
        rows = [Row(number, row) for number, row in enumerate(loaded, start=1)]
    else:
        file = _download(known, downloads / name)
        rows = read_rows(file, read_source(file)[0], PROMPT_KEYS).rows
        facts = {"url": known.url, "revision": known.revision, "sha256": sha256_file(file)}
    lines, left_out = _normalise(known, rows)
    if not lines:
        raise UserError(
            f"dataset.name (--name) {name}: none of {counted(len(rows), 'row')} is a prompt (the first: "
            f"{left_out[0]['reason'] if left_out else 'there is none'}); fetch it again"
        )
    facts = {"name": name, "about": known.about, "licence": known.licence, **facts, "left_out": left_out}
    if len(lines) != known.count:
        facts["note"] = f"{counted(len(lines), 'prompt')}, {known.count} are known"
    return _write(output, lines, facts)


def fetch_hub(repo: str, config: str | None, split: str | None, revision: str | None, output: Path) -> dict[str, Any]:
    """Write the rows of a dataset of the Hub as JSON lines, and OUTPUT.json with what was loaded.

    repo: or a local folder of data files. revision: None takes main. Raises UserError.
    """
    rows, found = _load_hub(repo, config, split, revision, f"dataset.huggingface {repo}")
    return _write(output, rows, {"name": repo, "config": config, "split": split, **found})


def fetched_facts(source: Path, digest: str) -> dict[str, Any] | None:
    """What OUTPUT.json says of a set that was fetched; None when the file is not one, or was changed."""
    try:
        facts = json.loads(source.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) and facts.get("output_sha256") == digest else None


def _write(output: Path, rows: Iterable[Mapping[str, Any]], facts: Mapping[str, Any]) -> dict[str, Any]:
    lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
    try:
        replace_file(output, "".join(lines))
    except UnicodeEncodeError:
        raise UserError(f"{output}: a text holds half of a surrogate pair, which is not a character") from None
    content = {**facts, "count": len(lines), "output_sha256": sha256_file(output)}
    write_json(output.with_suffix(".json"), content)
    return content


def _normalise(known: StandardSet, rows: Iterable[Row]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows with id, category and turns; and those that are not of the set or cannot be read, with the reason."""
    lines: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    for number, row in enumerate(rows, start=1):
        try:
            if row.data is None:
                raise RowError(row.problem)
            if not known.keep(row.data):
                left_out.append({"row": row.line, "reason": "not of the set that is measured, or only a placeholder"})
                continue
            whole = {**row.data, "prompt": known.form(row.data)} if known.form else row.data
            said = read_conversation(whole, known.columns)
        except (RowError, KeyError, TypeError, ValueError) as error:
            left_out.append({"row": row.line, "reason": f"not of the shape of {known.name}: {error}"})
            continue
        category = known.tasks.get(said.category or "", said.category) or known.category or known.name
        line: dict[str, Any] = {"id": said.id or f"{known.name}-{number}", "category": category}
        if said.system:
            line["system"] = said.system
        lines.append({**line, "turns": list(said.turns)})
    return lines, left_out


def _download(known: StandardSet, folder: Path) -> Path:
    """The file of a set, fetched when it is not there; checked against the hash that is known or was recorded."""
    file = folder / known.file
    recorded = file.with_name(f"{file.name}.sha256")
    if not file.is_file():
        try:
            request = urllib.request.Request(known.url, headers={"User-Agent": "specsplit"})
            reply = urllib.request.urlopen(request, timeout=TIMEOUT_S)
            with reply, replacing(file) as part, part.open("wb") as copy:
                shutil.copyfileobj(reply, copy)
        except (OSError, ValueError, urllib.error.URLError) as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(
                f"dataset.name (--name) {known.name}: cannot be fetched from {known.url} ({reason}). Where there is a "
                f"network: curl -L -o {known.file} {known.url}, and bring that file to {file}"
            ) from None
    digest = sha256_file(file)
    wanted = known.sha256 or (recorded.read_text(encoding="utf-8").partition(" ")[0] if recorded.is_file() else None)
    if wanted is None:
        replace_file(recorded, f"{digest}  {file.name}\n")
    elif digest != wanted:
        raise UserError(
            f"{file}: not the file of {known.name}: its sha256 is {digest}, wanted {wanted}. Delete it (and "
            f"{recorded.name}, where that is there) to fetch it again"
        )
    return file


def _load_hub(
    repo: str, config: str | None, split: str | None, revision: str | None, key: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a dataset, its url, and the commit that they are of (`revision`; "" when the Hub does not say)."""
    datasets = needed("datasets", f"{key}: datasets of the Hub")
    try:
        loaded = datasets.load_dataset(repo, config, split=split, revision=revision)
        if isinstance(loaded, dict):
            name = "test" if "test" in loaded else next(iter(loaded)) if len(loaded) == 1 else None
            if name is None:
                raise UserError(
                    f"{key}: has the splits {', '.join(loaded)}; set dataset.split (--split) to one of them"
                )
            loaded = loaded[name]
        rows = [dict(row) for row in loaded]
    except UserError:
        raise
    except Exception as error:  # whatever datasets, the Hub and HTTP libraries raise
        told = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UserError(
            f"{key}: cannot be loaded: {type(error).__name__}: {told}. Check id, config, split and revision. Without a "
            "network: load it where there is one, write it with save_to_disk, bring the folder here and set "
            "dataset.path (--source) to it; for a gated one accept its terms and set HF_TOKEN"
        ) from None
    return rows, {"url": f"https://huggingface.co/datasets/{repo}", "revision": _commit(repo, revision)}


def _commit(repo: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(repo, revision=revision, timeout=TIMEOUT_S).sha or "")
    except Exception:  # rows came from the cache, or from a local folder: the commit is not known
        return revision or ""
