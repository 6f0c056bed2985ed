# SpecSplit: disaggregated speculative decoding as a reproducible experiment.
#
#   snakemake --cores 2 results/summary.csv
#
# leaves the tables, the figures and the provenance record under results/.
from snakemake.utils import min_version

min_version("9.0")


configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
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
include: "workflow/rules/settings.smk"  # the last, for it knows what the others are decided by


THIS_RUN = runs.Run()
DATED = Path(f"{ROOT}results/.dated")
if workflow.is_main_process and (warning := runs.lost_dates(DATED)):
    logger.warning(warning)


onstart:
    told(
        THIS_RUN.begin,
        given_cores(),
        [os.path.relpath(file) for file in workflow.configfiles],
        dated=DATED,
        deployed=bool(workflow.deployment_settings.deployment_method),
    )


# Jobs that came after the summary left tables and logs of their own beside it: those are sealed too.
SEAL = shlex.quote(f"{ROOT}results/provenance/SHA256SUMS")
SEAL_AGAIN = f"! test -f {SEAL} || specsplit provenance seal --add --output {SEAL} > /dev/null"


onsuccess:
    shell(SEAL_AGAIN)


onerror:
    print(THIS_RUN.last_words(), file=sys.stderr)
    shell(SEAL_AGAIN)


rule all:
    """The main job: the summary, and all of it on one page."""
    default_target: True
    input:
        "results/summary.csv",
        "results/report.html",
    localrule: True
