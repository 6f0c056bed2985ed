"""The source files that a command's result depends on: all that its modules import, found without importing them.

Followed is every import statement, those inside functions too, from specsplit.cli.main and the module of the command
on. Not followed are

- `import_module(...)`, by which a command loads what decides nothing of its result, such as the tables that `bench`
  without --only makes in the end,
- imports under TYPE_CHECKING, which no process runs,
- imports inside the functions of a package's `__init__.py`: names that it has for others. Here each module is imported
  by its own name.

A file beside a module that is no Python, and that the module names, is read by it: a template, a schema.

Snakemake calls this while it parses the rules, so it needs nothing but the standard library.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from specsplit.io import combined_sha256, sha256_file

PACKAGE = Path(__file__).parents[1]
# Who connects to a worker has results that the worker's code decides as well, in a process of its own.
OTHER_PROCESSES = {"rpc/connection.py": "worker"}
_sha256 = cache(sha256_file)


def command_files(*commands: str, package: Path = PACKAGE, scripts: Iterable[Path] = ()) -> list[str]:
    """Files of the package that decide what these commands and Python scripts do, relative to it and sorted.

    commands: as `bench` or `provenance verify`. package: the folder of the package's sources. Raises
    FileNotFoundError for a command or script that is not there, SyntaxError for a file that is no Python.
    """
    waiting = [*scripts, *(file for command in commands for file in _command_files(package, command))]
    found: set[Path] = set()
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += _needed(package, file)
    return sorted(file.relative_to(package).as_posix() for file in found if file.is_relative_to(package))


def code_sha256(*commands: str, package: Path = PACKAGE, scripts: Iterable[Path] = ()) -> str:
    """One hash over the names and contents of `command_files`."""
    files = command_files(*commands, package=package, scripts=scripts)
    return combined_sha256({file: _sha256(package / file) for file in files})


def _command_files(package: Path, command: str) -> list[Path]:
    module = command.replace("-", "_").replace(" ", ".")
    files = _module_files(package, f"{package.name}.cli.{module}")
    if files[-1].stem != module.rpartition(".")[2]:
        raise FileNotFoundError(f"{package}: no module of the command {command!r}")
    return [*_module_files(package, f"{package.name}.__main__"), *files]


@cache
def _needed(package: Path, file: Path) -> list[Path]:
    """The files of the package that a file itself needs."""
    if file.suffix != ".py":
        return []
    source = file.read_text(encoding="utf-8")
    modules = _imported(ast.parse(source, file).body, inside_functions=file.name != "__init__.py")
    needed = [path for module in modules for path in _module_files(package, module)]
    if not file.is_relative_to(package):
        return needed
    beside = (path for path in file.parent.iterdir() if path.is_file() and path.suffix not in {".py", ".pyc"})
    needed += [path for path in beside if path.name in source]
    other = OTHER_PROCESSES.get(file.relative_to(package).as_posix())
    return [*needed, *(_command_files(package, other) if other else [])]


def _imported(body: Iterable[ast.AST], *, inside_functions: bool) -> Iterator[str]:
    """Names of the modules that statements import; `from a import b` may mean the module a.b, so that is one too."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise SyntaxError(f"line {node.lineno}: a relative import is not followed; name the whole module")
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            yield from _imported(node.orelse, inside_functions=inside_functions)
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in ("body", "orelse", "handlers", "finalbody", "cases"):
                yield from _imported(getattr(node, part, None) or (), inside_functions=inside_functions)


def _module_files(package: Path, module: str) -> list[Path]:
    """The file of a module and the __init__.py of the packages it is in; nothing for what is not of this package."""
    top, *parts = module.split(".")
    if top != package.name:
        return []
    folder, files = package, [package / "__init__.py"]
    for part in parts:
        if (folder / f"{part}.py").is_file():
            return [*files, folder / f"{part}.py"]
        folder = folder / part
        if not (folder / "__init__.py").is_file():
            break  # a name in the module, not a module
        files.append(folder / "__init__.py")
    return files
