"""What a command's result depends on: the files that its modules import, found in their sources."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from specsplit.cli.main import COMMANDS
from specsplit.io import combined_sha256, sha256_file
from specsplit.provenance.closure import PACKAGE, code_sha256, command_files

RULES = Path(__file__).parents[2] / "workflow" / "rules"
SOURCES = {
    "__init__.py": "def __getattr__(name):\n    from pkg import unused\n",
    "__main__.py": "from pkg.cli import main\n",
    "cli/__init__.py": "",
    "cli/main.py": "from importlib import import_module\nimport_module('pkg.cli.other')\n",
    "cli/run_it.py": "import pkg.lib.top as top\nfrom typing import TYPE_CHECKING\n"
    "if TYPE_CHECKING:\n    from pkg import typed\nelse:\n    from pkg import untyped\n",
    "cli/other.py": "",
    "cli/group/__init__.py": "",
    "cli/group/step.py": "class A:\n    def f(self):\n        try:\n            from pkg.lib import lazy\n"
    "        except ImportError:\n            from pkg.lib.lazy import constant\n",
    "lib/__init__.py": "from pkg.lib.exported import name\n",
    "lib/top.py": "open('page.html')\nimport numpy\n",
    "lib/page.html": "",
    "lib/unread.html": "",
    "lib/lazy.py": "with a as b:\n    match b:\n        case 1:\n            import pkg.deep\n",
    "lib/exported.py": "from pkg.lib import lazy_in_circle\n",
    "lib/lazy_in_circle.py": "from pkg.lib.exported import name\n",
    **dict.fromkeys(("unused.py", "typed.py", "untyped.py", "deep.py"), ""),
}
ALWAYS = ["__init__.py", "__main__.py", "cli/__init__.py", "cli/main.py"]
LIB = ["lib/__init__.py", "lib/exported.py", "lib/lazy_in_circle.py"]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for name, source in SOURCES.items():
        path = tmp_path / "pkg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return tmp_path / "pkg"


def test_every_kind_of_import_is_followed(package: Path) -> None:
    files = command_files("run-it", package=package)
    assert files == sorted([*ALWAYS, *LIB, "cli/run_it.py", "lib/top.py", "lib/page.html", "untyped.py"])
    files = command_files("group step", package=package)
    assert files == sorted([*ALWAYS, *LIB, "cli/group/__init__.py", "cli/group/step.py", "lib/lazy.py", "deep.py"])
    assert set(command_files("run-it", "group step", package=package)) == {
        *command_files("run-it", package=package),
        *files,
    }


def test_a_script_depends_on_what_it_imports(package: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("def f():\n    from pkg.lib.lazy import x\n")
    assert command_files(package=package, scripts=[script]) == sorted(["__init__.py", *LIB, "lib/lazy.py", "deep.py"])


def test_a_command_that_is_not_there_and_what_cannot_be_followed(package: Path) -> None:
    for command in ("walk", "group", "group walk", "run-it walk"):
        with pytest.raises(FileNotFoundError, match=f"no module of the command '{command}'"):
            command_files(command, package=package)
    (package / "untyped.py").write_text("from . import deep\n")
    with pytest.raises(SyntaxError, match="a relative import is not followed"):
        command_files("run-it", package=package)


def test_the_hash_changes_with_any_of_the_files_and_no_other(package: Path, tmp_path: Path) -> None:
    first = code_sha256("run-it", package=package)
    files = command_files("run-it", package=package)
    assert first == combined_sha256({name: sha256_file(package / name) for name in files})
    for changed in SOURCES:
        copy = shutil.copytree(package, tmp_path / changed.replace("/", "-") / "pkg")
        with (copy / changed).open("a") as file:
            file.write("\n")
        assert (code_sha256("run-it", package=copy) == first) is (changed not in files), changed


# ---- of this package


def test_a_command_does_not_depend_on_everything() -> None:
    of = {name: set(command_files(name)) for name in ("merge", "analyze", "bench", "worker", "prepare-dataset")}
    assert {"analysis/merging.py", "experiment/columns.py"} <= of["merge"]
    for name in ("merge", "analyze", "prepare-dataset"):
        heavy = {file for file in of[name] if file.startswith(("engines/", "worker/", "rpc/", "provenance/"))}
        assert heavy <= {"provenance/__init__.py", "provenance/facts.py"}, name  # facts: what runs have to share
    assert not {file for file in of["bench"] if file.startswith(("analysis/", "distill/"))}
    assert not {file for file in of["worker"] if file.startswith(("analysis/", "experiment/", "provenance/"))}
    assert {"analysis/report.html.j2"} <= set(command_files("report"))
    assert {"provenance/record_schema.json"} <= set(command_files("provenance record"))


@pytest.mark.parametrize(
    "command", ["bench", "race", "capacity", "context-curve", "states-cost", "theory-check", "overhead"]
)
def test_what_is_measured_with_workers_depends_on_theirs(command: str) -> None:
    assert set(command_files("worker")) <= set(command_files(command))


@pytest.mark.parametrize("command", [name for name in COMMANDS if not any(n.startswith(f"{name} ") for n in COMMANDS)])
def test_every_command_has_a_module(command: str) -> None:
    assert f"cli/{command.replace('-', '_').replace(' ', '/')}.py" in command_files(command)


def test_modules_import_each_other_by_their_names() -> None:
    """Not by names that a package's __init__.py fetches when they are asked for: those imports are not followed."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "specsplit":
                package = PACKAGE.joinpath(*str(node.module).split(".")[1:])
                for name in (alias.name for alias in node.names) if package.is_dir() else ():
                    there = name == "__version__" or any((package / part).exists() for part in (name, f"{name}.py"))
                    assert there or name in names_of(package / "__init__.py"), f"{file}: {node.module}.{name}"


def names_of(module: Path) -> set[str]:
    """What a module's own statements define or import."""
    names = set()
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def test_a_rule_depends_on_the_commands_that_it_runs() -> None:
    """`code` names the commands or the script of the rule; start_worker has none, for a worker is no result."""
    checked = 0
    for file in sorted(RULES.glob("*.smk")):
        for rule in re.split(r"^rule ", file.read_text(), flags=re.MULTILINE)[1:]:
            name = rule.partition(":")[0]
            shell = rule.partition("shell:")[2]
            runs = set(re.findall(r"specsplit ((?:distill |provenance )?[a-z-]+)", shell))
            scripts = set(re.findall(r"scripts/(\w+\.py)", rule))
            if name in {"start_worker", "archive"} or not runs | scripts:
                continue
            declared = re.search(r"code=\[(.*?)\]", rule)
            assert declared, name
            assert set(re.findall(r'"(.*?)"', declared[1])) - {"race", "serve"} == runs | scripts, name
            checked += 1
    assert checked > 15


def test_it_needs_no_other_module() -> None:
    """Snakemake calls it while it parses the rules, where specsplit may lack its dependencies."""
    code = (
        "import sys; before = set(sys.modules); import specsplit.provenance.closure as c; c.command_files('bench'); "
        "print({n.partition('.')[0] for n in set(sys.modules) - before} - set(sys.stdlib_module_names), "
        "sorted(n for n in sys.modules if n.startswith('specsplit')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split(" ", 1)[0] == "{'specsplit'}"
    assert (
        "['specsplit', 'specsplit.errors', 'specsplit.io', 'specsplit.provenance', 'specsplit.provenance.closure']"
        in done.stdout
    )
