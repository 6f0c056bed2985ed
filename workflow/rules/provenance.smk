# What was run, on what, with what: the record that belongs to the tables.
from specsplit.jsonio import json_sha256


rule resolved_config:
    output:
        "results/provenance/config.json",
    log:
        "results/logs/resolved_config.log",
    conda:
        "../../envs/specsplit.yaml"
    params:
        sha256=json_sha256(config),
    script:
        "../scripts/resolved_config.py"


rule provenance:
    input:
        config="results/provenance/config.json",
        runs=expand("results/runs/{point}/run.json", point=POINTS),
        models=expand("resources/models/{model}/model.json", model=MODELS),
        dataset="results/dataset/manifest.json",
        prompts="results/dataset/prompts.jsonl",
        results=[
            "results/requests.csv",
            "results/per_round.csv",
            *expand("results/runs/{point}/outputs.jsonl", point=POINTS),
        ],
        code=source("provenance"),
    output:
        report("results/provenance/provenance.json", caption="../report/provenance.rst", category="Record"),
    log:
        "results/logs/provenance.log",
    conda:
        "../../envs/specsplit.yaml"
    shell:
        "specsplit provenance --config {input.config} --runs {input.runs} --models {input.models}"
        " --dataset {input.dataset} --results {input.prompts} {input.results} --output {output} > {log} 2>&1"
