# One run per point of the sweep. A run takes every core, so that timing runs never overlap, whatever --cores says.


rule benchmark:
    input:
        settings=settings_files("{point}"),
        operation=operation_file("{point}"),
        endpoints=lambda wildcards: run_endpoints(wildcards.point),
        prompts="results/dataset/prompts.jsonl",
        models=lambda wildcards: models_of([wildcards.point])[0],
        layers=lambda wildcards: models_of([wildcards.point])[1],
    output:
        requests="results/runs/{point}/requests.csv",
        rounds="results/runs/{point}/per_round.csv",
        texts="results/runs/{point}/outputs.jsonl",
        run="results/runs/{point}/run.json",
        # Gamma 0 and the baselines, measured in turn with the requests of this run.
        reference="results/runs/{point}/reference.csv",
    log:
        "results/logs/benchmark/{point}.log",
    conda:
        "../../envs/specsplit.yaml"
    threads: EVERY_CORE
    resources:
        gpu=config["workers"]["gpus"],
    params:
        code=code_of("bench"),
    shell:
        "specsplit bench --only --settings {input.settings} {input.operation} --prompts {input.prompts}"
        " --results-dir results --gpus {resources.gpu}"
        # The log gets everything; a terminal, if there is one behind it, the bar.
        " --terminal-fd 3 3>&2 > {log} 2>&1"
