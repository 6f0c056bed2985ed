# From the runs to the tables and figures.


rule merge:
    """The rows of all runs in two tables."""
    input:
        requests=PLAN.run_files("requests.csv"),
        rounds=PLAN.run_files("per_round.csv"),
        references=PLAN.run_files("reference.csv"),
        decided=decided_by("merge", list(PLAN.points), config["keep_apart"], code=["merge"]),
    output:
        requests="results/requests.csv",
        rounds="results/per_round.csv",
        reference="results/reference.csv",
    log:
        "results/logs/merge.log",
    localrule: True
    conda:
        "../../envs/specsplit.yaml"
    params:
        folder=lambda wildcards, output: os.path.dirname(output.requests),
        runs=lambda wildcards, input: [os.path.dirname(path) for path in input.requests],
        settings=flags(keep_apart=config["keep_apart"]),
    shell:
        "specsplit merge --results-dir {params.folder:q} {params.runs:q} {params.settings} > {log:q} 2>&1"


rule figures:
    """The figures of the sweep."""
    input:
        requests="results/requests.csv",
        rounds="results/per_round.csv",
        reference="results/reference.csv",
        decided=decided_by("figures", INTERVALS, code=["figures"]),
    output:
        expand("results/figures/{name}.png", name=captions.DRAWN),
        [figure_output(name) for name in captions.DRAWN],
    log:
        "results/logs/figures.log",
    localrule: True
    conda:
        "../../envs/specsplit.yaml"
    params:
        folder=lambda wildcards, input: os.path.dirname(input.requests),
        settings=INTERVALS,
    shell:
        "specsplit figures --results-dir {params.folder:q} {params.settings} > {log:q} 2>&1"


rule summary:
    """A row for each configuration. Made last: where it is, figures and record are there as well, and sealed."""
    input:
        PLAN.result_files(),
        decided=decided_by("summary", INTERVALS, PRICES, code=["analyze", "provenance seal"]),
    output:
        summary=table_output("summary"),
        by_category=table_output(captions.BY_CATEGORY),
        seal="results/provenance/SHA256SUMS",
        manifest="results/provenance/manifest.json",
    log:
        "results/logs/summary.log",
    localrule: True
    conda:
        "../../envs/specsplit.yaml"
    params:
        folder=lambda wildcards, output: os.path.dirname(output.summary),
        settings=f"{INTERVALS} {PRICES}",
    shell:
        # Exit status 1: texts differ, which the tables say. The log is sealed as well, so nothing is written to it any more.
        "{{ specsplit analyze --no-figures --results-dir {params.folder:q} {params.settings}"
        " > {log:q} 2>&1 || test $? -eq 1; }} && specsplit provenance seal --output {output.seal:q}"
        " {output.summary:q} {input:q} 2>> {log:q} > /dev/null"


rule report:
    """Everything on one page that needs no other file."""
    input:
        summary="results/summary.csv",
        tables=expand("results/{name}.csv", name=["requests", "per_round", "reference"]),
        record="results/provenance/provenance.json",
        by_category=f"results/{captions.BY_CATEGORY}.csv",
        figures=[f"results/figures/{name}.svg" for name in captions.DRAWN],
        beside=beside_the_sweep,
        decided=decided_by("report", INTERVALS, PRICES, beside_the_sweep, code=["report", "provenance seal"]),
    output:
        report("results/report.html", caption="../report/report.rst", category="Report", labels={"what": "one page"}),
    log:
        "results/logs/report.log",
    localrule: True
    conda:
        "../../envs/specsplit.yaml"
    params:
        folder=lambda wildcards, input: os.path.dirname(input.summary),
        seal=lambda wildcards, input: f"{os.path.dirname(input.summary)}/provenance/SHA256SUMS",
        settings=f"{INTERVALS} {PRICES}",
    shell:
        "specsplit report --results-dir {params.folder:q} --output {output:q} {params.settings} > {log:q} 2>&1"
        " && specsplit provenance seal --add --output {params.seal:q} 2>> {log:q} > /dev/null"
