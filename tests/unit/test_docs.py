"""What the documentation names exists: files, anchors, commands, flags, variables, keys, columns, modules, targets."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from specsplit.cli.main import COMMANDS, build_parser
from specsplit.experiment.columns import RequestRecord, RoundRecord
from specsplit.settings.schema import SCHEMA

ROOT = Path(__file__).parents[2]
DOCS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("config/*.md"), *ROOT.glob("resources/**/README.md")]
)
DOCS = [path for path in DOCS if "models" not in path.relative_to(ROOT).parts]
NAMES = [str(path.relative_to(ROOT)) for path in DOCS]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in DOCS}
PACKAGE = ROOT / "src" / "specsplit"
# Flags of other programs that the documentation names.
OTHERS_FLAGS = {
    *("--cores", "--config", "--configfile", "--keep-going", "--report", "--forcerun", "--resources", "--sdm"),
    *("--workflow-profile", "--drop-metadata", "--unlock", "--exclusive", "--check", "--jobs", "--cov", "--lint"),
    *("--dry-run", "--rulegraph", "--list-rules", "--directory"),
}


def code(text: str, *languages: str) -> Iterator[str]:
    """The fenced blocks of these languages."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S):
        if language in languages:
            yield block


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def inline(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(text))


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command in a shell block: without comments, prompts, redirections and what pipes follow."""
    for block in code(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|\||\||;", line):
                try:
                    words = shlex.split(part, comments=True)
                except ValueError:
                    continue
                if words:
                    yield words


def flags_of(command: list[str]) -> set[str]:
    """Every flag of one command of ours."""
    parser = build_parser(command)
    found: set[str] = set()
    for word in command:
        parser = next(a for a in parser._actions if a.choices and word in a.choices).choices[word]  # type: ignore[index]
    for action in parser._actions:
        found.update(action.option_strings)
        if isinstance(action.choices, dict):
            for sub in action.choices.values():
                found.update(flag for a in sub._actions for flag in a.option_strings)
    return found


def all_flags() -> set[str]:
    groups = {name.rpartition(" ")[0] for name in COMMANDS}
    return {flag for name in COMMANDS if name not in groups for flag in flags_of(name.split())}


def slug(heading: str) -> str:
    """The anchor of a heading, as code hosts make it."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    folder = (ROOT / name).parent
    for target in re.findall(r"\]\(([^()\s]+)\)", prose(TEXTS[name])):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (folder / path).resolve() if path else ROOT / name
        assert file.exists(), f"{name}: {target}"
        if anchor:
            headings = {slug(h) for h in re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)}
            assert anchor in headings, f"{name}: {target}"


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_understood(name: str) -> None:
    for words in commands(TEXTS[name]):
        if words[0] == "make":
            goals = [word for word in words[1:] if "=" not in word]
            missing = [goal for goal in goals if not re.search(rf"^{re.escape(goal)}:", makefile(), re.M)]
            assert not missing, f"{name}: make {missing}"
        elif words[0] == "specsplit":
            own = words[1:]
            command = own[:1] if own[0] not in groups() else own[:2]
            if own[0] in ("worker", "start-worker") and len(own) > 1:
                command = own[:2]
            known = flags_of(command)
            used = {word.partition("=")[0] for word in own if word.startswith("--")}
            assert used <= known, f"{name}: {' '.join(words)}: {sorted(used - known)}"


def groups() -> set[str]:
    return {name.rpartition(" ")[0] for name in COMMANDS if " " in name}


def makefile() -> str:
    return (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_targets_of_snakemake_are_made_by_a_rule(name: str) -> None:
    rules = "\n".join(
        path.read_text(encoding="utf-8") for path in [*ROOT.glob("workflow/rules/*.smk"), ROOT / "Snakefile"]
    )
    for words in commands(TEXTS[name]):
        if words[0] != "snakemake":
            continue
        for file in [word for word in words if word.startswith("config/") and word.endswith(".yaml")]:
            assert (ROOT / file).is_file(), f"{name}: {file}"
        for target in [word for word in words if word.startswith("results/") and "*" not in word]:
            stem = Path(target).stem
            assert target in rules or f'"{stem}"' in rules or "skip_layers" in target, f"{name}: {target}"


@pytest.mark.parametrize("name", NAMES)
def test_flags_exist(name: str) -> None:
    known = all_flags() | OTHERS_FLAGS
    for span in inline(TEXTS[name]):
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", span):
            assert flag in known or flag.replace("--no-", "--") in known, f"{name}: `{span}`"


@pytest.mark.parametrize("name", NAMES)
def test_modules_and_files_exist(name: str) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    names = tracked or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
    for span in inline(TEXTS[name]):
        if re.fullmatch(r"[\w/.-]+\.(py|smk|proto|toml|yml|rst|j2)", span) and not span.startswith(
            (".snakemake", "my")
        ):
            assert any(n == span or n.endswith(f"/{span}") for n in names), f"{name}: `{span}`"
        elif re.fullmatch(r"specsplit\.[\w.]+", span) and not re.fullmatch(r"specsplit\.v\d", span):
            path = PACKAGE.parent / Path(*span.split("."))
            assert path.with_suffix(".py").is_file() or path.is_dir() or hasattr_of(span), f"{name}: `{span}`"


def hasattr_of(dotted: str) -> bool:
    """Whether a dotted name is an attribute of a module."""
    from importlib import import_module

    module, _, attribute = dotted.rpartition(".")
    try:
        return hasattr(import_module(module), attribute)
    except ImportError:
        return False


SCRIPTS = [path for folder in ("benchmarks", "examples", "scripts") for path in ROOT.glob(f"{folder}/*.py")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_script_imports_is_there(script: Path) -> None:
    """Nothing else runs most of them before somebody needs one."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "specsplit":
            module = importlib.import_module(str(node.module))
            for name in node.names:
                assert hasattr(module, name.name) or importlib.util.find_spec(f"{node.module}.{name.name}"), name.name


def test_every_column_of_the_run_tables_is_explained() -> None:
    text = TEXTS["docs/results.md"]
    tables = {"requests.csv": RequestRecord, "per_round.csv": RoundRecord}
    for table, record in tables.items():
        (section,) = re.findall(rf"^## `{re.escape(table)}`.*?(?=^## )", text, re.M | re.S)
        for field in fields(record):
            alias = re.sub(r"^(draft|verify)_(wall|compute|queue)_ms$", r"\1_", field.name)
            assert f"`{field.name}`" in section or f"`{alias}`" in section, f"docs/results.md: {table}: {field.name}"


def test_columns_in_the_table_of_requests_exist() -> None:
    (section,) = re.findall(r"^## `requests.csv`.*?(?=^## )", TEXTS["docs/results.md"], re.M | re.S)
    known = {field.name for field in fields(RequestRecord)} | {"matches_gamma0"}
    for row in re.findall(r"^\| (`.*?) \|", section, re.M):
        assert set(re.findall(r"`(\w+)`", row)) <= known, row


def test_what_every_key_reruns_is_told() -> None:
    table = TEXTS["config/README.md"].partition("## What a change reruns")[2]
    told = {name.partition(".")[0] for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in inline(row)}
    assert set(SCHEMA["properties"]) <= told | {"workers", "faults"}


def test_the_calls_that_reading_names_are_where_it_says() -> None:
    rows = re.findall(r"^\| \d+ \| `([\w/.]+)` \| `([\w.]+)` \|", TEXTS["docs/reading.md"], re.M)
    assert len(rows) <= 10
    assert len({file for file, _ in rows}) <= 8
    for file, call in rows:
        tree: ast.AST = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
        for name in call.split("."):
            found = [node for node in ast.iter_child_nodes(tree) if getattr(node, "name", None) == name]
            assert found, f"docs/reading.md: {file} has no {call}"
            tree = found[0]
