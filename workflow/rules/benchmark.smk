# One run per point of the sweep. A run takes every core, so that timing runs never overlap, whatever --cores says.


rule benchmark:
    input:
        endpoints=lambda wildcards: endpoints_of([wildcards.point]),
        prompts="results/dataset/prompts.jsonl",
        models=lambda wildcards: models_of([wildcards.point])[0],
        layers=lambda wildcards: models_of([wildcards.point])[1],
        code=MEASURED_WITH,
    output:
        requests="results/runs/{point}/requests.csv",
        rounds="results/runs/{point}/per_round.csv",
        texts="results/runs/{point}/outputs.jsonl",
        run="results/runs/{point}/run.json",
    log:
        "results/logs/benchmark/{point}.log",
    conda:
        "../../envs/specsplit.yaml"
    threads: workflow.cores or 1
    params:
        addresses=lambda wildcards, input: flags(**{f"{Path(file).stem}_addr": file for file in input.endpoints}),
        settings=lambda wildcards: run_settings(wildcards.point),
        # Not used by the command: other workers, other results.
        workers=lambda wildcards: [worker_settings(role, wildcards.point) for role in run_roles(wildcards.point)],
        tokenizer=f"resources/models/{config['target']['model']}",
    shell:
        "specsplit bench --only --prompts {input.prompts} --results-dir results"
        " --tokenizer {params.tokenizer} {params.addresses} {params.settings} > {log} 2>&1"
