# SpecSplit: disaggregated speculative decoding as a reproducible experiment.
#
#   snakemake --cores 2 results/summary.csv
#
# leaves the tables, the figures and the provenance record under results/.
from snakemake.utils import min_version

min_version("9.11")


configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/settings.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/dataset.smk"
include: "workflow/rules/layers.smk"
include: "workflow/rules/workers.smk"
include: "workflow/rules/benchmark.smk"
include: "workflow/rules/analysis.smk"
include: "workflow/rules/provenance.smk"
include: "workflow/rules/theory.smk"
include: "workflow/rules/baselines.smk"
include: "workflow/rules/capacity.smk"
include: "workflow/rules/profile.smk"
include: "workflow/rules/distill.smk"


# Light work, or work that needs the internet: on a cluster it is done where snakemake runs, the rest in jobs.
localrules:
    all,
    settings,
    operation,
    prepare_model,
    prepare_dataset,
    calibration_prompts,
    merge,
    figures,
    summary,
    report,
    resolved_config,
    provenance,
    archive,
    peers,
    capacity,
    profile,
    distill_card,


rule all:
    default_target: True
    input:
        "results/summary.csv",
        "results/report.html",
