"""Modules of the package in this checkout, whatever is installed.

The workflow runs this file by its path (runpy), so it imports nothing but the standard library.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType


def of_checkout(package: Path, names: Sequence[str]) -> list[ModuleType]:
    """Modules of a package, imported from the folder of its sources; what was imported of another copy stays in place.

    package: the folder. names: of its modules, relative to it.
    """

    def imported() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] == package.name]

    others = {name: sys.modules.pop(name) for name in imported()}
    sys.path.insert(0, str(package.parent))
    try:
        return [importlib.import_module(f"{package.name}.{name}") for name in names]
    finally:
        sys.path.remove(str(package.parent))
        for name in imported():
            del sys.modules[name]
        sys.modules.update(others)
