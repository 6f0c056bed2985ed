"""The SPECSPLIT_* variables: which there are, and that no other one is set."""

from __future__ import annotations

import os

from specsplit.errors import UserError
from specsplit.settings.base import Settings, did_you_mean
from specsplit.settings.distill import TrainingSettings, WritingSettings
from specsplit.settings.run import OrchestratorConfig
from specsplit.settings.serve import ServeSettings
from specsplit.settings.worker import DraftWorkerConfig, TargetWorkerConfig

# Variables that are no settings: a secret, the format of logs, and what a process tells those that it starts.
INTERNAL = {
    *("SPECSPLIT_TOKEN", "SPECSPLIT_LOG_FORMAT"),
    *("SPECSPLIT_LEASE_PID", "SPECSPLIT_LEASE_HOST", "SPECSPLIT_LEASE_FILE"),
    *("SPECSPLIT_STARTER_PID", "SPECSPLIT_WORKFLOW_COMMAND"),
    "SPECSPLIT_SOAK",  # marks the processes of tests/soak.py
}
CLASSES: list[type[Settings]] = [
    *(OrchestratorConfig, DraftWorkerConfig, TargetWorkerConfig, ServeSettings, WritingSettings, TrainingSettings)
]


def known_variables() -> set[str]:
    """Every variable that means something."""
    settings = {name for cls in CLASSES for field in cls.model_fields for name in cls.variables(field)}
    return settings | INTERNAL


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
    deciding = {
        name
        for cls in CLASSES
        for field in set(cls.model_fields) - cls.operating()
        for name in cls.variables(field)
        if os.environ.get(name)
    }
    if deciding:
        raise UserError(
            f"{', '.join(sorted(deciding))}: would change results behind the back of the configuration; unset it and "
            "set the key of config/config.yaml"
        )
