# What was run, on what, with what: the record that belongs to the tables.


rule resolved_config:
    output:
        "results/provenance/config.json",
    log:
        "results/logs/resolved_config.log",
    conda:
        "../../envs/specsplit.yaml"
    params:
        text=json.dumps(config, indent=2, sort_keys=True),
    shell:
        "printf '%s\n' {params.text:q} > {output} 2> {log}"


rule provenance:
    input:
        config="results/provenance/config.json",
        runs=expand("results/runs/gamma_{gamma}/run.json", gamma=GAMMAS),
        models=expand("resources/models/{model}/model.json", model=MODELS),
        dataset="results/dataset/manifest.json",
        prompts="results/dataset/prompts.jsonl",
        results=[
            "results/requests.csv",
            "results/per_round.csv",
            *expand("results/runs/gamma_{gamma}/outputs.jsonl", gamma=GAMMAS),
        ],
        code=source("provenance"),
    output:
        "results/provenance/provenance.json",
    log:
        "results/logs/provenance.log",
    conda:
        "../../envs/specsplit.yaml"
    shell:
        "specsplit provenance --config {input.config} --runs {input.runs} --models {input.models}"
        " --dataset {input.dataset} --results {input.prompts} {input.results} --output {output} > {log} 2>&1"
