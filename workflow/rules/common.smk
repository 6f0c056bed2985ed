# The plan of the configuration, and what the rules share. Its functions are in src/specsplit/workflow of this checkout.
import importlib
import json
import os
import re
import shlex
import sys
from functools import partial
from pathlib import Path

# The folder of the project, whichever Snakefile of it was called.
PROJECT = Path(getattr(workflow.current_basedir, "path", "")) / "../.."
PACKAGE = PROJECT / "src" / "specsplit"


def of_checkout(*names):
    """Modules of the package in this checkout, whatever is installed. They need nothing that Snakemake lacks."""
    if not PACKAGE.is_dir():
        raise WorkflowError(f"{PACKAGE} is not here: clone the whole repository, and name its Snakefile by its path")
    others = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == PACKAGE.name}
    sys.path.insert(0, str(PACKAGE.parent))
    try:
        return [importlib.import_module(f"{PACKAGE.name}.{name}") for name in names]
    finally:
        sys.path.remove(str(PACKAGE.parent))
        for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE.name]:
            del sys.modules[name]
        sys.modules.update(others)


planning, files, runs, errors, captions, closure, capture, redaction = of_checkout(
    *("workflow.plan", "workflow.files", "workflow.runs", "errors", "analysis.captions"),
    *("provenance.closure", "provenance.capture", "provenance.redaction"),
)


def told(function, *arguments, **more):
    """What the function returns; a mistake of the user without a traceback."""
    try:
        return function(*arguments, **more)
    except errors.UserError as error:
        raise WorkflowError(str(error)) from None


# What a module's prefix puts before the paths of inputs and outputs, for those in settings and parameters.
ROOT = str(workflow.modifier.modify_path("results")).removesuffix("results")
for file in workflow.configfiles:
    told(files.check_yaml, Path(file))
PLAN = told(planning.Plan, config, ROOT)
config = PLAN.config  # checked, with every key
DATASET = PLAN.dataset(PROJECT)
flags, folder_of = files.flags, files.folder_of
INTERVALS = flags(**config["statistics"], seed=config["seed"])
PRICES = flags(**{f"{role}_price": config["prices"][role] for role in planning.ROLES})
# Files below results/ -> what the configuration says they hold: what decides results, and how jobs are operated.
DECIDES = {f"settings/{job}/settings.json": partial(PLAN.settings, job, operates=False) for job in PLAN.jobs}
DECIDES["provenance/config.json"] = partial(files.as_json, redaction.redact(config))
OPERATES = {f"settings/{job}/operation.json": partial(PLAN.settings, job, operates=True) for job in PLAN.jobs}


wildcard_constraints:
    point="|".join(map(re.escape, PLAN.worker_points)),
    role="|".join(planning.ROLES),
    draft="|".join(map(re.escape, PLAN.drafts)),
    recipe=re.escape(config["distill"]["name"]),
    model="|".join(map(re.escape, config["models"])),  # all: an ngram model may take the tokenizer of one that is not run


def given_cores():
    """The cores that Snakemake was given; None with --jobs alone, where each job has its own (set-threads in profiles)."""
    try:
        return workflow.cores
    except WorkflowError:
        return None


# Of jobs that measure time: nothing may run beside them.
EVERY_CORE = given_cores() or 1


def code_of(*commands):
    """Hash of all that the rule's commands import, so that a change of code reruns the rule.

    As inputs they would do that too, and every job would print a hundred names.
    """
    return closure.code_sha256(*commands, package=PACKAGE)


def decided_by(name, *what, code):
    """Input of a job: the file with what decides its result beside its other inputs: flags, outside files, code.

    what: functions are called with the name of the model, where each has a job of its own.
    """
    for model in config["models"] if "{model}" in name else [""]:
        file = f"settings/rules/{name}.json".replace("{model}", model)
        DECIDES[file] = partial(files.decided_json, what, model, code)
    return f"results/settings/rules/{name}.json"


def made_again(contents, file, *, missing):
    """No inputs. Has Snakemake make a file again that says something else than it should, or that is missing.

    By itself it knows of that by its notes in .snakemake alone, which results may be without: as a copy of them is.
    """
    path = f"{ROOT}results/{file}"
    in_bucket = getattr(workflow.storage_settings, "default_storage_provider", None)  # where the notes are all there is
    held = in_bucket or files.holds(Path(path), contents[file](), if_missing=not missing)
    if workflow.is_main_process and not held:
        workflow.dag.forcefiles.add(path)  # as --forcerun does
    return []


def settings_files(*jobs):
    """Inputs of a job: the files with the settings that decide what these jobs make."""
    return [f"results/settings/{job}/settings.json" for job in jobs]


def operation_file(job):
    """Input of a job: the file with how it is operated, whose change reruns nothing."""
    return ancient(f"results/settings/{job}/operation.json")


def measured_with(job, points, endpoints=None):
    """Inputs of a measurement beside the sweep: settings, prompts, and the workers of its points with what they serve."""
    endpoints = endpoints or partial(PLAN.endpoints_of, points)
    return {
        "settings": settings_files(job),
        "operation": operation_file(job),
        "workers": settings_files(*points),
        "endpoints": lambda wildcards: told(endpoints, workflow.non_local_exec),
        "prompts": "results/dataset/prompts.jsonl",
        "models": PLAN.models_of(points),
        "layers": PLAN.layers_of(points),
    }


def content_of(paths):
    """Hash of files, for one that was copied may have an old date. Files that a rule makes have none."""
    made = any(rule.is_producer(str(path)) for path in paths for rule in workflow.rules)
    return None if made else files.files_sha256(paths)


def prompts_content(_):
    """Hash of the file of prompts."""
    return content_of([Path(DATASET)])


def model_content(name):
    """Hash of a local model: weights, configuration, tokenizer, template."""
    folder = PLAN.local_folder(name)
    return content_of(files.model_files(folder)) if folder else None


def beside_the_sweep(wildcards):
    """Inputs: what was made beside the sweep, or is made in this call; shown in the report, and archived."""
    targets = getattr(getattr(workflow, "dag_settings", None), "targets", ())
    return files.beside_the_sweep(ROOT, targets)


def figure_output(name):
    """A figure that `snakemake --report` shows, under its caption."""
    labels = {"figure": {**captions.FIGURES, **captions.BESIDE}[name]}
    return report(f"results/figures/{name}.svg", caption=f"../report/{name}.rst", category="Figures", labels=labels)


def table_output(name):
    """A table that `snakemake --report` shows."""
    return report(f"results/{name}.csv", caption=f"../report/{name}.rst", category="Tables", labels={"what": name})
