# The configuration, checked, and the helpers that the rules share.
import json
import os
import shlex
from pathlib import Path

from specsplit.errors import UserError
from specsplit.pipeline_config import load_pipeline_config
from specsplit.workflow_runs import begin_run

try:
    resolved = load_pipeline_config(config)
except UserError as error:
    raise WorkflowError(str(error)) from None
# In place: scripts get this very object.
config.clear()
config.update(resolved)

GAMMAS = config["gammas"]
MODELS = sorted({config["target"]["model"], config["draft"]["model"]})
ROLES = ["draft", "target"]


wildcard_constraints:
    gamma=r"\d+",
    role="|".join(ROLES),
    model="|".join(MODELS),


# Jobs and workers end when this process does, and what a killed run left behind is cleared.
begin_run()


def source(*parts):
    """Files of the package that decide a result: declared as inputs, so that a change of code reruns it."""
    root = Path(workflow.basedir) / "src" / "specsplit"
    files = [
        f
        for part in parts
        for f in (
            [root / part]
            if part.endswith(".py")
            else sorted((root / part).rglob("*.py"))
        )
    ]
    return [os.path.relpath(f) for f in files]


def flags(**values):
    """Command-line flags: None and empty lists are left out, True and False become --flag and --no-flag."""
    words = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if value is True or value is False:
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list) and value:
            words += [flag, *map(str, value)]
        elif value is not None and value != []:
            words += [flag, str(value)]
    return shlex.join(words)


def unique(items):
    return list(dict.fromkeys(items))
