# The plan of the configuration, and what the rules share. Its functions are in src/specsplit/workflow of this checkout.
import json
import os
import re
import runpy
import shlex
import sys
from functools import partial
from pathlib import Path

# The folder of the project, whichever Snakefile of it was called.
PROJECT = Path(getattr(workflow.current_basedir, "path", "")) / "../.."
PACKAGE = PROJECT / "src" / "specsplit"
if not PACKAGE.is_dir():
    raise WorkflowError(f"{PACKAGE} is not here: clone the whole repository, and name its Snakefile by its path")
MODULES = [f"workflow.{name}" for name in ("plan", "files", "decided", "runs")]
MODULES += ["errors", "analysis.captions", "provenance.capture"]
of_checkout = runpy.run_path(str(PACKAGE / "workflow" / "checkout.py"))["of_checkout"]
planning, files, deciding, runs, errors, captions, capture = of_checkout(PACKAGE, MODULES)


def told(function, *arguments, **more):
    """What the function returns; a mistake of the user without a traceback."""
    try:
        return function(*arguments, **more)
    except errors.UserError as error:
        raise WorkflowError(str(error)) from None


told(files.check_project, PROJECT)
# What a module's prefix puts before the paths of inputs and outputs, for those in settings and parameters.
ROOT = str(workflow.modifier.modify_path("results")).removesuffix("results")
for file in workflow.configfiles:
    told(files.check_yaml, Path(file))
PLAN = told(planning.Plan, config, ROOT, PROJECT)
config = PLAN.config  # checked, with every key
DATASET = PLAN.dataset
DECIDED = deciding.Decided(PLAN, PACKAGE)
decided_by, settings_files = DECIDED.by, PLAN.settings_files
flags, folder_of = files.flags, files.folder_of
INTERVALS = flags(**config["statistics"], seed=config["seed"])
PRICES = flags(**{f"{role}_price": config["prices"][role] for role in planning.ROLES})


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
    }


def prompts_content(_):
    """Hash of the file of prompts, whatever its date says."""
    return files.content_sha256([Path(DATASET)], workflow.rules)


def model_content(name):
    """Hash of a local model: weights, configuration, tokenizer, template."""
    return files.content_sha256(PLAN.model_files(name), workflow.rules)


def beside_the_sweep(wildcards):
    """Inputs: what was made beside the sweep, or is made in this call; shown in the report, and archived."""
    targets = getattr(getattr(workflow, "dag_settings", None), "targets", ())
    return files.beside_the_sweep(ROOT, targets)


def figure_output(name, path=None):
    """A figure that `snakemake --report` shows, under its caption."""
    path = path or f"results/figures/{name}.svg"
    labels = {"figure": captions.TITLES[name]}
    return report(path, caption=f"../report/{name}.rst", category="Figures", labels=labels)


def table_output(name):
    """A table that `snakemake --report` shows."""
    return report(f"results/{name}.csv", caption=f"../report/{name}.rst", category="Tables", labels={"what": name})
