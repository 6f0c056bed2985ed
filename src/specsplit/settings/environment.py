"""The SPECSPLIT_* variables: which there are, and that no other one is set.

facts.json, made from the settings by scripts/settings.py, lists them, so that Snakemake checks them without pydantic.
"""

from __future__ import annotations

import json
import os
from importlib.resources import files
from typing import Any

from specsplit.errors import UserError
from specsplit.settings.names import did_you_mean

FACTS: dict[str, Any] = json.loads(files("specsplit.settings").joinpath("facts.json").read_text("utf-8"))
# Variables that are no settings: a secret, the format of logs, and what a process tells those that it starts.
INTERNAL = {
    *("SPECSPLIT_TOKEN", "SPECSPLIT_LOG_FORMAT"),
    *("SPECSPLIT_LEASE_PID", "SPECSPLIT_LEASE_HOST", "SPECSPLIT_LEASE_FILE"),
    *("SPECSPLIT_STARTER_PID", "SPECSPLIT_WORKFLOW_COMMAND"),
}


def known_variables() -> set[str]:
    """Every variable that means something."""
    return {*FACTS["variables"], *FACTS["deciding_variables"], *INTERNAL}


def check_environment() -> None:
    """Raise UserError for SPECSPLIT_* variables that mean nothing, with the closest one that does."""
    known = known_variables()
    unknown = [name for name in sorted(os.environ) if name.startswith("SPECSPLIT_") and name not in known]
    if unknown:
        raise UserError("\n".join(f"{name}: no such variable{did_you_mean(name, known)}" for name in unknown))


def refuse_overrides() -> None:
    """Raise UserError for variables that would change what the configuration of the workflow decides.

    What only operates a process, as an address, may be set.
    """
    deciding = [name for name in FACTS["deciding_variables"] if os.environ.get(name)]
    if deciding:
        raise UserError(
            f"{', '.join(sorted(deciding))}: would change results behind the back of the configuration; unset it and "
            "set the key of config/config.yaml"
        )
