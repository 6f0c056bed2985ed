# From the runs to the tables and figures.


rule merge:
    input:
        requests=expand("results/runs/{point}/requests.csv", point=POINTS),
        rounds=expand("results/runs/{point}/per_round.csv", point=POINTS),
    output:
        requests="results/requests.csv",
        rounds="results/per_round.csv",
    log:
        "results/logs/merge.log",
    conda:
        "../../envs/specsplit.yaml"
    params:
        runs=expand("results/runs/{point}", point=POINTS),
        code=code_of("merge"),
    shell:
        "specsplit merge --results-dir results {params.runs} > {log} 2>&1"


rule figures:
    input:
        requests="results/requests.csv",
        rounds="results/per_round.csv",
    output:
        expand("results/figures/{name}.png", name=FIGURES),
        [figure_output(name, "Figures") for name in FIGURES],
    log:
        "results/logs/figures.log",
    conda:
        "../../envs/specsplit.yaml"
    params:
        settings=dict(
            confidence=config["statistics"]["confidence"],
            bootstrap_samples=config["statistics"]["bootstrap_samples"],
            seed=config["seed"],
        ),
        code=code_of(script="figures.py"),
    script:
        "../scripts/figures.py"


# The summary is made last: where it is, the figures and the record of how it came about are there as well.
rule summary:
    input:
        requests="results/requests.csv",
        rounds="results/per_round.csv",
        figures=rules.figures.output,
        provenance="results/provenance/provenance.json",
    output:
        summary=report(
            "results/summary.csv", caption="../report/summary.rst", category="Tables", labels={"what": "summary"}
        ),
        seal="results/provenance/SHA256SUMS",
    log:
        "results/logs/summary.log",
    conda:
        "../../envs/specsplit.yaml"
    params:
        settings=flags(
            confidence=config["statistics"]["confidence"],
            bootstrap_samples=config["statistics"]["bootstrap_samples"],
            seed=config["seed"],
        ),
        sealed=lambda wildcards: result_files(),
        code=code_of("analyze", "provenance seal"),
    shell:  # exit status 1: texts differ, which the tables say and keep
        "specsplit analyze --no-figures --results-dir results {params.settings} > {log} 2>&1 || test $? -eq 1"
        " && specsplit provenance seal --output {output.seal} {params.sealed} >> {log} 2>&1"


# Everything on one page that needs no other file.
rule report:
    input:
        "results/requests.csv",
        "results/per_round.csv",
        "results/summary.csv",
        "results/provenance/provenance.json",
        [path for path in rules.figures.output if path.endswith(".svg")],
        measured_beside_the_sweep(),
    output:
        report("results/report.html", caption="../report/report.rst", category="Report", labels={"what": "one page"}),
    log:
        "results/logs/report.log",
    conda:
        "../../envs/specsplit.yaml"
    params:
        settings=rules.summary.params.settings,
        code=code_of("report"),
    shell:
        "specsplit report --results-dir results --output {output} {params.settings} > {log} 2>&1"
