# From the runs to the tables and figures.
from specsplit.analysis.figures import FIGURES


rule merge:
    input:
        requests=expand("results/runs/{point}/requests.csv", point=POINTS),
        rounds=expand("results/runs/{point}/per_round.csv", point=POINTS),
        code=source("analysis/tables.py", "analysis/reading.py"),
    output:
        requests="results/requests.csv",
        rounds="results/per_round.csv",
    log:
        "results/logs/merge.log",
    conda:
        "../../envs/specsplit.yaml"
    params:
        runs=expand("results/runs/{point}", point=POINTS),
    shell:
        "specsplit merge --results-dir results {params.runs} > {log} 2>&1"


rule figures:
    input:
        requests="results/requests.csv",
        rounds="results/per_round.csv",
        code=source("analysis"),
    output:
        expand("results/figures/{name}.{type}", name=FIGURES, type=["png", "svg"]),
    log:
        "results/logs/figures.log",
    conda:
        "../../envs/specsplit.yaml"
    params:
        confidence=config["statistics"]["confidence"],
        bootstrap_samples=config["statistics"]["bootstrap_samples"],
        seed=config["seed"],
    script:
        "../scripts/figures.py"


# The summary is made last: where it is, the figures and the record of how it came about are there as well.
rule summary:
    input:
        requests="results/requests.csv",
        rounds="results/per_round.csv",
        figures=rules.figures.output,
        provenance="results/provenance/provenance.json",
        code=source("analysis/tables.py", "analysis/reading.py", "analysis/statistics.py"),
    output:
        summary="results/summary.csv",
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
    shell:
        "specsplit analyze --no-figures --results-dir results {params.settings} > {log} 2>&1"
        " && specsplit provenance seal --output {output.seal} {params.sealed} >> {log} 2>&1"
