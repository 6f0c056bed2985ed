# One run per point of the sweep. A run takes every core, so that timing runs never overlap, whatever --cores says.


rule benchmark:
    input:
        endpoints=lambda wildcards: run_endpoints(wildcards.point),
        prompts="results/dataset/prompts.jsonl",
        models=lambda wildcards: models_of([wildcards.point])[0],
        layers=lambda wildcards: models_of([wildcards.point])[1],
    output:
        requests="results/runs/{point}/requests.csv",
        rounds="results/runs/{point}/per_round.csv",
        texts="results/runs/{point}/outputs.jsonl",
        run="results/runs/{point}/run.json",
    log:
        "results/logs/benchmark/{point}.log",
    conda:
        "../../envs/specsplit.yaml"
    threads: EVERY_CORE
    resources:
        gpu=config["workers"]["gpus"],
        workers=lambda wildcards: run_workers(wildcards.point),
        faults=fault_settings(),
    params:
        settings=lambda wildcards: run_settings(wildcards.point),
        # Not used by the command, which has it from the resources: other workers, other results.
        workers=lambda wildcards: [worker_settings(role, wildcards.point) for role in run_roles(wildcards.point)],
        tokenizer=TARGET_FOLDER,
        code=code_of("bench"),
    shell:
        "specsplit bench --only --prompts {input.prompts} --results-dir results"
        " --tokenizer {params.tokenizer} {resources.workers} {resources.faults} --gpus {resources.gpu} {params.settings}"
        # The log gets everything; a terminal, if there is one behind it, the bar.
        " --terminal-fd 3 3>&2 > {log} 2>&1"
